# SPDX-License-Identifier: Apache-2.0
"""StepsProgressBar: one bar over the optimizer steps of a run, with the time left. Every command with a trainer uses it."""

from __future__ import annotations

import math
import sys
import time
from datetime import timedelta
from typing import Any

import rich
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from mtp_lightning.callbacks.run_clock import RunClock
from mtp_lightning.training.lightning_private import is_accumulating

SECONDS_BETWEEN_LINES = 30.0


class StepsProgressBar(ProgressBar):
    """Shows optimizer steps of the whole run, of resumed runs from the step they resume at; evaluations are named behind it.

    On a terminal it is one line; elsewhere a line is printed after the first step and then every half minute. The time left
    is that of the remaining steps at the run's pace, and of evaluations as long and as far apart as those so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self._enabled = True
        self._bar: Progress | None = None  # on a terminal
        self._task: TaskID = TaskID(0)
        self._what, self._done, self._total = "", 0, 0
        self._clock, self._last_line = RunClock(0), 0.0  # time.monotonic
        self._note = ""

    def disable(self) -> None:
        """Show nothing, in processes other than the first."""
        self._enabled = False
        self._stop()

    def enable(self) -> None:
        """Show again."""
        self._enabled = True

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print above the bar."""
        rich.get_console().print(*args, markup=False, highlight=False)

    def note(self, text: str) -> None:
        """Show what else is being done behind the bar, until its next step."""
        self._note = text
        self._show()

    def _start(self, what: str, total: float, first: int = 0) -> None:
        self._stop()
        self._what, self._done = what, first
        self._total = int(total) if total != float("inf") else 0
        self._clock, self._last_line = RunClock(first), -math.inf
        self._note = ""
        if self._enabled and rich.get_console().is_terminal:
            fields = [TextColumn("{task.fields[left]}"), TextColumn("{task.fields[note]}")]
            columns = [TextColumn("{task.description}"), BarColumn(None), MofNCompleteColumn(), *fields]
            self._bar = Progress(*columns, console=rich.get_console(), expand=True, refresh_per_second=2)
            self._task = self._bar.add_task(what, total=self._total or None, completed=first, left="", note="")
            self._bar.start()

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def time_left(self) -> str:
        """The time left as text, empty before the first step and after the last one."""
        left = self._clock.seconds_left(self._done, self._total or math.inf)
        return "" if left is None or self._done >= self._total else f"{timedelta(seconds=round(left))} left"

    def pause(self, trainer: Trainer) -> None:
        """An evaluation begins: its time is not that of a step."""
        self._clock.pause()

    def _step(self, done: int, note: str = "") -> None:
        self._done, self._note = done, note
        self._show()

    def _show(self) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, left=self.time_left(), note=self._note)
        elif self._enabled and self._what and time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            of = f" of {self._total}" if self._total else ""
            parts = [f"{self._what} {self._done}{of}", self.time_left(), self._note]
            print(", ".join(filter(None, parts)), file=sys.stderr, flush=True)

    # ---- training

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin the bar of Lightning's first look at the validation data."""
        self._start("sanity check", trainer.num_sanity_val_steps)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin the bar of the run."""
        self._start("step", float(trainer.estimated_stepping_batches), trainer.global_step)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Count time as that of steps again, after an evaluation."""
        self._clock.resume(trainer.global_step)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Show a step once its last batch is done."""
        if not is_accumulating(trainer):
            loss = self.get_metrics(trainer, pl_module).get("train/loss")
            self._step(trainer.global_step, f"loss {loss:.3f}" if isinstance(loss, float) else "")

    # ---- evaluation

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin a bar, except within a run."""
        if trainer.state.fn == "validate":
            self._start("validation batch", sum(trainer.num_val_batches))
        elif not trainer.sanity_checking:
            self.pause(trainer)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin a bar."""
        self._start("test batch", sum(trainer.num_test_batches))

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any, **__: Any
    ) -> None:
        """Show a batch, behind the bar of the run if there is one."""
        if trainer.sanity_checking or trainer.state.fn != "fit":
            self._step(batch_idx + 1)
        else:
            self.note(f"validation {batch_idx + 1}/{sum(map(int, trainer.num_val_batches))}")

    on_test_batch_end = on_validation_batch_end

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End a bar of its own."""
        if trainer.sanity_checking or trainer.state.fn == "validate":
            self._stop()

    def teardown(self, *_: Any, **__: Any) -> None:
        """End the bar; of an error too, which is printed below it."""
        self._stop()

    on_train_end = on_test_end = on_exception = teardown
