# SPDX-License-Identifier: Apache-2.0
"""Reads JSON that a user wrote; errors name the file and the line."""

from __future__ import annotations

import json
from typing import Any

from mtp_lightning.errors import RunError, one_line


def read_json(text: str, source: str, line: int = 1) -> Any:
    """The value of JSON text that begins at a line of the source; RunError if it is not JSON or Python can't read it.

    NaN, which pandas writes for a missing value, is read as null.
    """
    try:
        value, end = decode_json(text, len(text) - len(text.lstrip()))
        if text[end:].strip():
            raise json.JSONDecodeError("Extra data", text, end)
        return value
    except (ValueError, RecursionError) as error:
        raise not_json(error, source, line) from error


def decode_json(text: str, begin: int = 0) -> tuple[Any, int]:
    """The JSON value that begins at a character of the text, and where it ends; the errors are those of ``json``."""
    try:
        return _DECODER.raw_decode(text, begin)
    except json.JSONDecodeError:
        raise
    except ValueError:  # an integer of thousands of digits
        return _DECODER_OF_HUGE_NUMBERS.raw_decode(text, begin)


def not_json(error: Exception, source: str, line: int = 1) -> RunError:
    """The error for text that begins at a line of the source and that ``decode_json`` failed on."""
    if isinstance(error, json.JSONDecodeError):
        what = error.msg.removesuffix(" at").removesuffix(" starting")  # some end like this, others do not
        problem = f"line {line - 1 + error.lineno}: expected JSON, got {what} at column {error.colno}"
        return RunError(f"{source}, {problem}. Correct or delete the line.")
    return RunError(f"{source}, line {line}: expected JSON, got what Python does not read: {one_line(error)}.")


def _integer(digits: str) -> int | float:
    try:
        return int(digits)
    except ValueError:  # thousands of digits
        return float(digits)


def _constant(name: str) -> float | None:
    return None if name == "NaN" else float(name)


# strict=False: real files hold tabs in strings. Two decoders: a function of ours is called for each integer, which is slow.
_DECODER = json.JSONDecoder(parse_constant=_constant, strict=False)
_DECODER_OF_HUGE_NUMBERS = json.JSONDecoder(parse_constant=_constant, strict=False, parse_int=_integer)
