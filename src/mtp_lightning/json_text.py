# SPDX-License-Identifier: Apache-2.0
"""Reads JSON that a user wrote; errors name the file and the line."""

from __future__ import annotations

import json
from typing import Any

from mtp_lightning.errors import RunError, one_line


def read_json(text: str, source: str, line: int = 1) -> Any:
    """The value of JSON text that begins at a line of the source; RunError if it is not JSON or Python can't read it."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        problem = f"line {line - 1 + error.lineno}: expected JSON, got {error.msg} at column {error.colno}"
        raise RunError(f"{source}, {problem}. Correct or delete the line.") from error
    except (ValueError, RecursionError) as error:
        location = source if "\n" in text else f"{source}, line {line}"
        raise RunError(f"{location}: expected JSON, got what Python does not read: {one_line(error)}.") from error
