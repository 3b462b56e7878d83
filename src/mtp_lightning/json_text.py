# SPDX-License-Identifier: Apache-2.0
"""JSON in a file that a user wrote: its value, or a sentence that names the line."""

from __future__ import annotations

import json
import re
import sys
from typing import Any

from mtp_lightning.errors import RunError

_TEXT_OR_NUMBER = re.compile(r'"(?:[^"\\]|\\.)*"|\d+(?:\.\d+)?(?:[eE][-+]?\d+)?')


def read_json(text: str, source: str, line: int = 1) -> Any:
    """The value that a text stands for.

    Args:
        text: JSON.
        source: the file's name, for messages.
        line: number of the line in the file that the text begins in.

    Returns:
        Its value.

    Raises:
        RunError: it is no JSON, or has a number or brackets in one another that Python does not read.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise RunError(
            f"{source}, line {line - 1 + error.lineno}: expected JSON, got {error.msg} at column {error.colno}."
            " Correct or delete the line."
        ) from error
    except ValueError as error:  # Python's limit, which is there because longer ones take the square of their length
        most = sys.get_int_max_str_digits()
        # Of numbers with a point or an exponent any length is read.
        number = next(found for found in _TEXT_OR_NUMBER.finditer(text) if found[0].isdigit() and len(found[0]) > most)
        raise RunError(
            f"{source}, line {line + text.count(chr(10), 0, number.start())}: expected numbers of at most {most} digits, got"
            f" one of {len(number[0])}. Correct or delete the line."
        ) from error
    except RecursionError as error:
        place = source if "\n" in text else f"{source}, line {line}"
        raise RunError(
            f"{place}: expected JSON, got brackets in one another without end. Correct or delete them."
        ) from error
