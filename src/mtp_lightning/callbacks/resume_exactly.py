# SPDX-License-Identifier: Apache-2.0
"""ResumeExactly: adds to a checkpoint what Lightning leaves out of it. Part of every ``mtp fit``."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger

from mtp_lightning.errors import RunError
from mtp_lightning.saving.checkpoint_files import RESUME, write_run_id
from mtp_lightning.trainer.metrics_writer import MetricsWriter
from mtp_lightning.training.distributed import gather, run_folder, stop_all
from mtp_lightning.training.lightning_private import is_accumulating, is_logging_step, step_metrics
from mtp_lightning.training.random_state import random_state, set_random_state


class ResumeExactly(Callback):
    """Saves the random state of every process, the length of ``metrics.csv``, and metrics that are not logged yet.

    It also saves what callbacks monitor: one that decides at the end of an epoch finds the figures of a validation that was
    made before the checkpoint.

    On resume ``metrics.csv`` is cut back to its length at the checkpoint, so that each figure is in it once. The random
    state is restored before the first batch; a run with another number of processes starts from new states.

    A run that begins at step 0 gets an id, which its folder and its checkpoints carry: ``--ckpt_path last`` must not resume
    from a checkpoint that an earlier run has left in the folder.

    Attributes:
        run: the run's id; set by the command line where a run is resumed.
    """

    def __init__(self) -> None:
        self.run: str | None = None
        self._loaded: dict[str, Any] | None = None  # the entry of the checkpoint that the run resumes from

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Agree on the run's id."""
        if self.run is None:
            self.run = gather(uuid.uuid4().hex)[0]

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the entry. All processes come here; one of them writes."""
        checkpoint[RESUME] = {
            "run": self.run or "",
            "random": gather(random_state()),
            "lines": [writer.num_lines() for writer in metrics_writers(trainer)],
            "pending": pending_metrics(trainer),
            "monitored": {name: value.detach().cpu().clone() for name, value in trainer.callback_metrics.items()},
        }

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep the entry until training begins."""
        self._loaded = checkpoint.get(RESUME)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the run's id, cut ``metrics.csv`` back, and log what was about to be.

        By now everything is loaded and fits together: a start that fails changes nothing in the folder.
        """
        folder = run_folder(trainer)  # all processes must ask
        if self._loaded is not None:
            for name, value in self._loaded.get("monitored", {}).items():
                trainer.callback_metrics[name] = value.clone().to(pl_module.device)
        error = self._claim_folder(trainer, folder) if trainer.is_global_zero else None
        if (error := gather(error)[0]) is not None:
            stop_all(trainer, error)

    def _claim_folder(self, trainer: Trainer, folder: Path) -> str | None:
        """Write to the run's folder, in one process; returns an error for all of them to stop with."""
        try:
            if not getattr(trainer, "fast_dev_run", False):
                write_run_id(folder, self.run or "")
            if self._loaded is not None:
                for writer, lines in zip(metrics_writers(trainer), self._loaded["lines"], strict=False):
                    writer.keep(lines)
                self._log_pending(trainer, self._loaded["pending"])
        except RunError as error:
            return str(error)
        return None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Restore the random state, once: what ran before this batch has drawn from it."""
        if self._loaded is None:
            return
        states, self._loaded = self._loaded["random"], None
        if len(states) == trainer.world_size:
            set_random_state(states[trainer.global_rank])

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the pending metrics of a run without a step left, which never starts to train."""
        if self._loaded is None:
            return
        pairs = zip(metrics_writers(trainer), self._loaded["lines"], strict=False)
        if any(writer.num_lines() <= lines for writer, lines in pairs):
            self._log_pending(trainer, self._loaded["pending"])

    def _log_pending(self, trainer: Trainer, pending: dict[str, Any] | None) -> None:
        if pending is None:
            return
        for logger in trainer.loggers:
            logger.log_metrics(dict(pending["figures"]), step=pending["step"])
            logger.save()


def metrics_writers(trainer: Trainer) -> list[MetricsWriter]:
    """The writers of ``metrics.csv``, in the first process."""
    experiments = [logger.experiment for logger in trainer.loggers if isinstance(logger, CSVLogger)]
    return [writer for writer in experiments if isinstance(writer, MetricsWriter)]


def pending_metrics(trainer: Trainer) -> dict[str, Any] | None:
    """``step`` and ``figures`` that Lightning is about to log, or None.

    It logs the metrics of a training step only after ``on_train_batch_end``, in which checkpoints are written.
    """
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress.total
    batch_has_ended = progress.completed == progress.processed
    if batch_has_ended or is_accumulating(trainer) or not is_logging_step(trainer):
        return None
    figures = {name: float(value) for name, value in step_metrics(trainer).items()}
    step = trainer.global_step - 1  # Lightning counts logged steps from 0
    return {"step": step, "figures": {**figures, "epoch": trainer.current_epoch}} if figures else None
