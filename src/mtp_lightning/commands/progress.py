# SPDX-License-Identifier: Apache-2.0
"""Progress: how far a long command is, on standard error."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

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


@contextmanager
def counted(what: str) -> Iterator[Callable[[int, int], None]]:
    """A function to call with what is done and the number of all: it shows both and the time left.

    A bar on a terminal, else a line every ten seconds. The first call comes after the first of all is done.
    """
    if sys.stderr.isatty():
        columns = (TextColumn(what), BarColumn(None), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("left"))
        with RichProgress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task(what, total=None)
            yield lambda done, count: bar.update(task, completed=done, total=count)
        return
    progress = Progress()

    def line(done: int, count: int) -> None:
        left = timedelta(seconds=round(progress.seconds / done * (count - done)))
        progress(f"{what}: {done} of {count}" + (f", {left} left" if done < count else ""), always=done == count)

    yield line
