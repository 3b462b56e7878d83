# SPDX-License-Identifier: Apache-2.0
"""ResumeExactly: puts into a checkpoint what Lightning leaves out of it. Part of every ``mtp fit``."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger

from mtp_lightning.errors import RunError
from mtp_lightning.saving.checkpoint_files import RESUME, write_run_id
from mtp_lightning.trainer.metrics_writer import MetricsWriter
from mtp_lightning.training.distributed import figures_are_logged, gather, run_folder, stop_all
from mtp_lightning.training.random_state import random_state, set_random_state


class ResumeExactly(Callback):
    """Saves the random state of every process, how far ``metrics.csv`` was, and the figures that were about to be logged.

    It saves what callbacks monitor, too: one that decides at the end of an epoch finds the figures of a validation that was
    made before the checkpoint.

    On resume the file is cut back to there, so that each figure stands in it once. The random state is put back before the
    first batch; a run with another number of processes draws anew.

    A run that begins at step 0 gets a name, which its folder and its checkpoints bear: ``--ckpt_path last`` is not to go on
    from a checkpoint that an earlier run has left in the folder.

    Attributes:
        run: the run's name; set by the command line where a run is gone on with.
    """

    def __init__(self) -> None:
        self.run: str | None = None
        self._loaded: dict[str, Any] | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Agree on the run's name."""
        if self.run is None:
            self.run = gather(uuid.uuid4().hex)[0]

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the entry. All processes come here; one of them writes."""
        if (settle := getattr(pl_module, "settle_figures", None)) is not None:  # they are among those that wait
            settle()
        states = gather(random_state())
        lines = [writer.num_lines() if trainer.is_global_zero else 0 for writer in writers(trainer)]
        checkpoint[RESUME] = {
            "run": self.run or "",
            "random": states,
            "lines": lines,
            "pending": pending_figures(trainer),
            "monitored": {name: value.detach().cpu().clone() for name, value in trainer.callback_metrics.items()},
        }

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep the entry until training begins."""
        self._loaded = checkpoint.get(RESUME)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Name the run's folder; cut ``metrics.csv`` back, and log what was about to be.

        By now all is loaded and fits together: a start that fails takes no folder over.
        """
        folder = run_folder(trainer)  # all processes ask for it together
        if self._loaded is not None:
            for name, value in self._loaded.get("monitored", {}).items():
                trainer.callback_metrics[name] = value.clone().to(pl_module.device)
        wrong = self._take_over(trainer, folder) if trainer.is_global_zero else None
        if (wrong := gather(wrong)[0]) is not None:
            stop_all(trainer, wrong)

    def _take_over(self, trainer: Trainer, folder: Path) -> str | None:
        """Write to the run's folder, in one process; gives what was wrong, for all of them to end."""
        try:
            if not getattr(trainer, "fast_dev_run", False):
                write_run_id(folder, self.run or "")
            if self._loaded is not None:
                for writer, lines in zip(writers(trainer), self._loaded["lines"], strict=False):
                    writer.keep(lines)
                self._log_pending(trainer, self._loaded["pending"])
        except RunError as error:
            return str(error)
        return None

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log what was about to be where no step is left: the run was ended after its last checkpoint and before that."""
        loaded = self._loaded
        if loaded is None or not trainer.is_global_zero:
            return
        pairs = zip(writers(trainer), loaded["lines"], strict=False)
        if any(writer.num_lines() <= lines for writer, lines in pairs):
            self._log_pending(trainer, loaded["pending"])

    def _log_pending(self, trainer: Trainer, pending: dict[str, Any] | None) -> None:
        if pending is None:
            return
        for logger in trainer.loggers:
            logger.log_metrics(dict(pending["figures"]), step=pending["step"])
            logger.save()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Put the random state back, once: what ran before this batch has drawn from it."""
        if self._loaded is None:
            return
        states, self._loaded = self._loaded["random"], None
        if len(states) == trainer.world_size:
            set_random_state(states[trainer.global_rank])


def writers(trainer: Trainer) -> list[MetricsWriter]:
    """The writers of ``metrics.csv``, of the loggers that have ours."""
    found = [logger._experiment for logger in trainer.loggers if isinstance(logger, CSVLogger)]
    return [writer for writer in found if isinstance(writer, MetricsWriter)]


def pending_figures(trainer: Trainer) -> dict[str, Any] | None:
    """Figures of a training step that Lightning logs only after ``on_train_batch_end``, where checkpoints may be written.

    Args:
        trainer: the trainer.

    Returns:
        ``step`` and ``figures``, or None where nothing is about to be logged.
    """
    loop = trainer.fit_loop.epoch_loop
    progress: Any = loop.batch_progress.total
    if progress.completed == progress.processed or loop._should_accumulate() or not figures_are_logged(trainer):
        return None
    figures = {name: float(value) for name, value in trainer._logger_connector.metrics["log"].items()}
    return {"step": loop._batches_that_stepped, "figures": {**figures, "epoch": trainer.current_epoch}} if figures else None
