# SPDX-License-Identifier: Apache-2.0
"""Progress: how far a long command is, on standard error."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mtp_lightning.evaluation.reporting import note

SECONDS_BETWEEN_LINES = 10.0


class Report(Protocol):
    """Shows how many of all are done, above 0 and a fraction where one is half done, and a detail of those under way."""

    def __call__(self, done: float, count: int, detail: str = "") -> None:
        """Show it."""


@contextmanager
def counted(what: str) -> Iterator[Report]:
    """A function to call with what is done and the number of all: it shows both and the time left.

    A bar on a terminal, else a line every ten seconds.
    """
    if sys.stderr.isatty():
        left = (TimeRemainingColumn(), TextColumn("left{task.fields[detail]}"))
        with Progress(TextColumn(what), BarColumn(None), MofNCompleteColumn(), *left, console=Console(stderr=True)) as bar:
            task = bar.add_task(what, total=None, detail="")

            def update(done: float, count: int, detail: str = "") -> None:
                bar.update(task, completed=done, total=count, detail=detail and f", {detail}")

            yield update
        return
    start = last = time.monotonic()

    def line(done: float, count: int, detail: str = "") -> None:
        nonlocal last
        now = time.monotonic()
        if done == count or now - last >= SECONDS_BETWEEN_LINES:
            last = now
            left = timedelta(seconds=round((now - start) / done * (count - done)))
            more = (detail and f", {detail}") + (f", {left} left" if done < count else "")
            note(f"[{now - start:6.0f} s] {what}: {int(done)} of {count}{more}")

    yield line
