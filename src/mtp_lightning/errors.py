# SPDX-License-Identifier: Apache-2.0
"""The two kinds of error that a user can mend. The command line prints their one line and no traceback."""

from __future__ import annotations


class MTPError(Exception):
    """Says in one line what was expected, what came and what to change."""


class UsageError(MTPError, ValueError):
    """The command or the configuration is wrong (exit code 2)."""


class RunError(MTPError, RuntimeError):
    """All else that a user can mend: a missing or broken file, data that can't be used (exit code 1)."""
