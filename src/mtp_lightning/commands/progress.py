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
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from mtp_lightning.evaluation.reporting import note

SECONDS_BETWEEN_LINES = 10.0


class Report(Protocol):
    """Shows how many of all are done, and of those under way a detail; they count for the time left as so many."""

    def __call__(self, done: int, count: int, under_way: float = 0.0, detail: str = "") -> None:
        """Show it; something is done or under way."""


@contextmanager
def counted(what: str) -> Iterator[Report]:
    """A function to call with what is done and the number of all: it shows both and the time left.

    A bar on a terminal, else a line every ten seconds.
    """
    if sys.stderr.isatty():
        left = (TimeRemainingColumn(), TextColumn("left{task.fields[detail]}"))
        columns = (TextColumn(what), BarColumn(None), TextColumn("{task.fields[number]}"), *left)
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task(what, total=None, number="", detail="")

            def update(done: int, count: int, under_way: float = 0.0, detail: str = "") -> None:
                number, more = f"{done}/{count}", detail and f", {detail}"
                bar.update(task, completed=done + under_way, total=count, number=number, detail=more)

            yield update
        return
    start = last = time.monotonic()

    def line(done: int, count: int, under_way: float = 0.0, detail: str = "") -> None:
        nonlocal last
        now = time.monotonic()
        if done == count or now - last >= SECONDS_BETWEEN_LINES:
            last, progress = now, done + under_way
            left = timedelta(seconds=round((now - start) / progress * (count - progress)))
            more = (detail and f", {detail}") + (f", {left} left" if done < count else "")
            note(f"[{now - start:6.0f} s] {what}: {done} of {count}{more}")

    yield line
