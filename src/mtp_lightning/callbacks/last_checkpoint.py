# SPDX-License-Identifier: Apache-2.0
"""LastCheckpoint: keeps ``last.ckpt``, the state to go on from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from mtp_lightning.errors import UsageError
from mtp_lightning.saving.checkpoint_files import LAST
from mtp_lightning.training.distributed import checkpoint_folders, validation_is_due


class LastCheckpoint(Checkpoint):
    """Writes ``last.ckpt`` after every validation, every so many optimizer steps between them, and at the end.

    Where a validation is due it is written after it, so that a resumed run has every validation once, and never between the
    batches of one optimizer step, whose gradients it would lose. It belongs after the callback that keeps the best
    checkpoint.

    A run that is stopped early (``trainer.max_time``, early stopping) ends its optimizer step first. Lightning then
    validates once more; ``last.ckpt`` is written before that, so that a resumed run is the one that was not stopped.

    Args:
        every_n_steps: also write it every so many optimizer steps. None: after validations and at the end alone.
        dirpath: the folder. None: ``checkpoints`` in the run's folder.
    """

    def __init__(self, every_n_steps: int | None = None, dirpath: str | None = None) -> None:
        if every_n_steps is not None and every_n_steps < 1:
            raise UsageError(f"every_n_steps of LastCheckpoint must be 1 or more, got {every_n_steps}.")
        self.every_n_steps = every_n_steps
        self.dirpath = dirpath
        self._saved_at = 0
        self._owed = False
        self._stop_asked = False
        self._stopped_at: int | None = None
        self._folder: Path | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the folder."""
        self._folder = Path(self.dirpath) if self.dirpath else checkpoint_folders(trainer)[-1]
        self._saved_at = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A step that a run is resumed at was saved."""
        self._saved_at, self._owed = trainer.global_step, False
        self._stop_asked, self._stopped_at = False, None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save every so many steps, and at the last one."""
        if trainer.fit_loop._should_accumulate():
            self._put_off_stop(trainer)
            return
        if self._stop_asked:
            self._stop_asked, trainer.should_stop = False, True
        if validation_is_due(trainer):
            return
        step, stops = trainer.global_step, is_stopped(trainer)
        regular = self.every_n_steps is not None and step % self.every_n_steps == 0
        if self._owed or (step != self._saved_at and (regular or stops or is_last_step(trainer))):
            self._save(trainer)
        self._stopped_at = step if stops else None

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save; if it came between the batches of one optimizer step, after the last of them."""
        if trainer.state.fn != "fit" or trainer.sanity_checking or self._stopped_at == trainer.global_step:
            return
        self._owed = trainer.fit_loop._should_accumulate()
        if self._owed:
            self._put_off_stop(trainer)
        else:
            self._save(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save where a callback, such as early stopping, ends the run here, if this step was not saved."""
        if trainer.should_stop and self._saved_at != trainer.global_step:
            with counted_as_before_the_end(trainer):
                self._save(trainer)

    def _put_off_stop(self, trainer: Trainer) -> None:
        """Have the loop make the batches that are left of an optimizer step: the gradients so far would be lost."""
        if trainer.should_stop:
            self._stop_asked, trainer.should_stop = True, False

    def _save(self, trainer: Trainer) -> None:
        if getattr(trainer, "fast_dev_run", False):
            return
        assert self._folder is not None
        trainer.save_checkpoint(self._folder / LAST, weights_only=False)
        self._saved_at, self._owed = trainer.global_step, False


@contextmanager
def counted_as_before_the_end(trainer: Trainer) -> Iterator[None]:
    """Have Lightning's counters, at the end of an epoch, be those of the end of its last batch.

    From these it goes on with the next epoch. From those of an epoch's end it takes the next one for the same once more,
    where ``max_steps`` alone ends the run.

    Args:
        trainer: the trainer, in ``on_train_epoch_end``.

    Yields:
        Nothing.
    """
    loop: Any = trainer.fit_loop
    epochs, batches = loop.epoch_progress, loop.epoch_loop.batch_progress

    def count(by: int) -> None:
        for which in ("current", "total"):
            getattr(epochs, which).processed += by
            getattr(batches, which).completed += by
        loop.epoch_loop._batches_that_stepped += by

    count(-1)
    try:
        yield
    finally:
        count(1)


def is_last_step(trainer: Trainer) -> bool:
    """Whether training ends after the batch that has just ended, as far as the configuration decides it."""
    if 0 < trainer.max_steps <= trainer.global_step:
        return True
    last_epoch = trainer.max_epochs is not None and 0 < trainer.max_epochs <= trainer.current_epoch + 1
    return last_epoch and trainer.fit_loop.epoch_loop.batch_progress.is_last_batch


def is_stopped(trainer: Trainer) -> bool:
    """Whether training ends after the batch that has just ended because a callback, such as the time limit, said so."""
    loop: Any = trainer.fit_loop
    epochs = loop.epoch_progress.current.processed + int(loop.epoch_loop.batch_progress.is_last_batch)
    reached = epochs >= (loop.min_epochs or 0) and trainer.global_step >= (loop.min_steps or 0)
    return bool(trainer.should_stop and reached)
