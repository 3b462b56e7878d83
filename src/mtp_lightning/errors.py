# SPDX-License-Identifier: Apache-2.0
"""The two kinds of error that a user can mend. The command line prints their one line and no traceback."""

from __future__ import annotations


class MTPError(Exception):
    """Says in one line what was expected, what came and what to change."""


class UsageError(MTPError, ValueError):
    """The command or the configuration is wrong (exit code 2)."""


class RunError(MTPError, RuntimeError):
    """All else that a user can mend: a missing or broken file, data that can't be used (exit code 1)."""


def one_line(error: BaseException, limit: int = 300) -> str:
    """The message of somebody else's error on one line, shortened, to quote it in one of ours.

    Args:
        error: the error.
        limit: how many characters to keep at most; a longer message ends after a whole word.

    Returns:
        The message, or the error's class name where it has none; without a period at its end, for ours goes on.
    """
    text = " ".join(str(error).split()) or type(error).__name__
    if len(text) > limit:
        return text[:limit].rpartition(" ")[0].rstrip(".,;: ") + " …" if " " in text[:limit] else text[: limit - 1] + "…"
    return text.rstrip(".!")


def os_reason(error: OSError) -> str:
    """What the operating system says is wrong, without its number and the file's name, which our message has.

    Args:
        error: the error.

    Returns:
        A few words.
    """
    return error.strerror or one_line(error)
