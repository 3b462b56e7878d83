# SPDX-License-Identifier: Apache-2.0
"""LastCheckpoint: keeps ``last.ckpt``, the state to resume from."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from mtp_lightning.errors import UsageError
from mtp_lightning.saving.checkpoint_files import LAST
from mtp_lightning.training.distributed import checkpoint_folders
from mtp_lightning.training.lightning_private import counters_of_last_batch, is_accumulating, validation_follows


class LastCheckpoint(Checkpoint):
    """Writes ``last.ckpt`` after every validation, every N optimizer steps between validations, and at the end.

    Where a validation is due it is written after it, so that a resumed run has every validation once, and never between the
    batches of one optimizer step, whose gradients it would lose. List it after the callback that keeps the best checkpoint.

    A run that is stopped early (``trainer.max_time``, early stopping) ends its optimizer step first. Lightning then
    validates once more; ``last.ckpt`` is written before that, so that a resumed run is the one that was not stopped.

    Args:
        every_n_steps: also write it every N optimizer steps. None: after validations and at the end alone.
        dirpath: the folder. None: ``checkpoints`` in the run's folder.
    """

    def __init__(self, every_n_steps: int | None = None, dirpath: str | None = None) -> None:
        if every_n_steps is not None and every_n_steps < 1:
            raise UsageError(f"every_n_steps of LastCheckpoint must be 1 or more, got {every_n_steps}.")
        self.every_n_steps = every_n_steps
        self.dirpath = dirpath
        self.last_path: Path | None = None  # what was written last
        self._saved_at = 0  # optimizer step of the last write
        self._save_due = False  # a validation came between the batches of an optimizer step: write after the last of them
        self._stop_delayed = False  # a stop was asked for there: stop after the last of them
        self._stopped_at: int | None = None  # optimizer step with which the run is stopped early

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reset; the step that a run is resumed at was saved."""
        self._saved_at, self._save_due = trainer.global_step, False
        self._stop_delayed, self._stopped_at = False, None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save every N steps, and at the last one."""
        if is_accumulating(trainer):
            self._delay_stop(trainer)
            return
        if self._stop_delayed:
            self._stop_delayed, trainer.should_stop = False, True
        if validation_follows(trainer):
            return
        step, stops = trainer.global_step, is_stopped(trainer)
        regular = self.every_n_steps is not None and step % self.every_n_steps == 0
        if self._save_due or (step != self._saved_at and (regular or stops or is_last_step(trainer))):
            self._save(trainer)
        self._stopped_at = step if stops else None

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save, or have it done after the optimizer step in which this validation came."""
        if trainer.state.fn != "fit" or trainer.sanity_checking or self._stopped_at == trainer.global_step:
            return
        self._save_due = is_accumulating(trainer)
        if self._save_due:
            self._delay_stop(trainer)
        else:
            self._save(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save where a callback, such as early stopping, ends the run here, if this step was not saved."""
        if trainer.should_stop and self._saved_at != trainer.global_step:
            with counters_of_last_batch(trainer):
                self._save(trainer)

    def _delay_stop(self, trainer: Trainer) -> None:
        """Let the loop finish the optimizer step, whose gradients would be lost."""
        if trainer.should_stop:
            self._stop_delayed, trainer.should_stop = True, False

    def _save(self, trainer: Trainer) -> None:
        if getattr(trainer, "fast_dev_run", False):
            return
        self.last_path = last_checkpoint_path(trainer)
        trainer.save_checkpoint(self.last_path, weights_only=False)
        self._saved_at, self._save_due = trainer.global_step, False


def last_checkpoint_path(trainer: Trainer) -> Path:
    """Where a run's ``last.ckpt`` is. All processes must call it."""
    callbacks: list[Any] = cast(Any, trainer).callbacks
    named = next((each.dirpath for each in callbacks if isinstance(each, LastCheckpoint) and each.dirpath), None)
    return (Path(named) if named else checkpoint_folders(trainer)[-1]) / LAST


def is_last_step(trainer: Trainer) -> bool:
    """True if the batch that has just ended is the last one by ``max_steps`` or ``max_epochs``."""
    if 0 < trainer.max_steps <= trainer.global_step:
        return True
    last_epoch = trainer.max_epochs is not None and 0 < trainer.max_epochs <= trainer.current_epoch + 1
    return last_epoch and trainer.fit_loop.epoch_loop.batch_progress.is_last_batch


def is_stopped(trainer: Trainer) -> bool:
    """True if a callback, such as the time limit, ends the run with the batch that has just ended."""
    loop: Any = trainer.fit_loop
    epochs = loop.epoch_progress.current.processed + int(loop.epoch_loop.batch_progress.is_last_batch)
    reached = epochs >= (loop.min_epochs or 0) and trainer.global_step >= (loop.min_steps or 0)
    return bool(trainer.should_stop and reached)
