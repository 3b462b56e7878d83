# SPDX-License-Identifier: Apache-2.0
"""Progress: how far a long command is, on standard error."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mtp_lightning.evaluation.reporting import note

SECONDS_BETWEEN_LINES = 10.0


@contextmanager
def counted(what: str) -> Iterator[Callable[[int, int], None]]:
    """A function to call with what is done and the number of all: it shows both and the time left.

    A bar on a terminal, else a line every ten seconds. The first call comes after the first of all is done.
    """
    if sys.stderr.isatty():
        columns = (TextColumn(what), BarColumn(None), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("left"))
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task(what, total=None)
            yield lambda done, count: bar.update(task, completed=done, total=count)
        return
    start = last = time.monotonic()

    def line(done: int, count: int) -> None:
        nonlocal last
        now = time.monotonic()
        if done == count or now - last >= SECONDS_BETWEEN_LINES:
            last = now
            left = timedelta(seconds=round((now - start) / done * (count - done)))
            note(f"[{now - start:6.0f} s] {what}: {done} of {count}" + (f", {left} left" if done < count else ""))

    yield line
