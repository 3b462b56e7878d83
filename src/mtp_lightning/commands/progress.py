# SPDX-License-Identifier: Apache-2.0
"""Progress: how far a long command is, on standard error."""

from __future__ import annotations

import sys
import time

SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Prints a line with the time since the start, at most every ten seconds."""

    def __init__(self) -> None:
        self._start = self._last = time.monotonic()

    @property
    def seconds(self) -> float:
        """Time since the start."""
        return time.monotonic() - self._start

    def __call__(self, text: str, always: bool = False) -> None:
        """Print the text if the last line is long enough ago, or in any case with ``always``."""
        now = time.monotonic()
        if always or now - self._last >= SECONDS_BETWEEN_LINES:
            self._last = now
            print(f"[{now - self._start:6.0f} s] {text}", file=sys.stderr, flush=True)


def note(text: str) -> None:
    """Print a line on standard error at once."""
    print(text, file=sys.stderr, flush=True)
