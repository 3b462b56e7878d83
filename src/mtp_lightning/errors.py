# SPDX-License-Identifier: Apache-2.0
"""The two kinds of user-fixable error. The command line prints their one line and no traceback."""

from __future__ import annotations


class MTPError(Exception):
    """A user-fixable error: one line that says what was expected and what came."""


class UsageError(MTPError, ValueError):
    """The command or the configuration is wrong (exit code 2)."""


class RunError(MTPError, RuntimeError):
    """Any other user-fixable error: a missing or broken file, unusable data (exit code 1)."""


def one_line(error: BaseException | str, limit: int = 300) -> str:
    """Another library's error or message on one line, without its final period, cut after a word at ``limit`` characters.

    An error without a message gives the name of its class.
    """
    text = " ".join(str(error).split()) or type(error).__name__
    if len(text) > limit:
        return text[:limit].rpartition(" ")[0].rstrip(".,;: ") + " …" if " " in text[:limit] else text[: limit - 1] + "…"
    return text.rstrip(".!")


def os_reason(error: OSError) -> str:
    """The operating system's reason, without the error number and the file's name."""
    return error.strerror or one_line(error)
