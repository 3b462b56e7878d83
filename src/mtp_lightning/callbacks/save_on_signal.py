# SPDX-License-Identifier: Apache-2.0
"""SaveOnSignal: SIGTERM, and the signal that SLURM sends before it takes a machine, save and exit. In every ``mtp fit``."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

from mtp_lightning.saving.checkpoint_files import LAST
from mtp_lightning.training.collectives import all_reduce
from mtp_lightning.training.distributed import checkpoint_folders, validation_is_due

EXIT_CODE = 143
"""Exit code of a run that was told to stop and has saved: 128 + SIGTERM, as a shell shows it."""


class SaveOnSignal(Callback):
    """Saves ``last.ckpt`` at the end of the training batch in which the signal came, and exits with code 143.

    A validation that is running or due is finished first. Lightning's own handlers broadcast and save inside the signal
    handler, in the middle of whatever runs, from which no run resumes exactly; they are replaced while training. On SLURM
    the signal is that of Lightning's ``SLURMEnvironment`` (``requeue_signal``, SIGUSR1 by default), and the job is requeued
    where its ``auto_requeue`` says so.
    """

    def __init__(self) -> None:
        self._received: int | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the signals over; Lightning puts the handlers of before back when it ends."""
        self._received = None
        if threading.current_thread() is not threading.main_thread():
            return
        for number in signals(trainer):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: Any) -> None:
        """Remember the signal: a handler may come at any moment, so it does nothing else."""
        self._received = number

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save and exit, if any process was told to; not between the batches of one step, whose gradients are not saved."""
        if trainer.fit_loop._should_accumulate():
            return
        received = self._received or 0
        if trainer.world_size > 1:  # not every process need get the signal
            told = torch.tensor(float(received), device=trainer.strategy.root_device)
            received = int(all_reduce(told, "max"))
        # A validation is finished first; where one is due after every batch, one is left out instead of waiting for ever.
        if not received or (validation_is_due(trainer) and trainer.val_check_batch != 1):
            return
        path = checkpoint_folders(trainer)[0] / LAST
        trainer.save_checkpoint(path, weights_only=False)
        if trainer.is_global_zero:
            requeued = requeue(trainer) if received == slurm_signal(trainer) else ""
            name = signal.Signals(received).name
            print(
                f"mtp: {name}: saved {str(path)!r} after step {trainer.global_step}{requeued}. Go on with --ckpt_path last.",
                file=sys.stderr,
                flush=True,
            )
        trainer.strategy.barrier("saved on a signal")
        # Lightning kills the first process as soon as one that it started ends with another code than 0.
        started_by_lightning = isinstance(trainer._accelerator_connector.cluster_environment, LightningEnvironment)
        raise SystemExit(0 if started_by_lightning and not trainer.is_global_zero else EXIT_CODE)


def slurm_signal(trainer: Trainer) -> int | None:
    """The signal by which SLURM announces the end, or None elsewhere."""
    environment = trainer._accelerator_connector.cluster_environment
    if not isinstance(environment, SLURMEnvironment):
        return None
    return int(environment.requeue_signal or signal.SIGUSR1)


def signals(trainer: Trainer) -> list[int]:
    """The signals that mean: save and exit."""
    slurm = slurm_signal(trainer)
    return [int(signal.SIGTERM)] + ([slurm] if slurm is not None else [])


def requeue(trainer: Trainer) -> str:
    """Put a SLURM job into the queue again, where Lightning's environment is told to.

    Args:
        trainer: the trainer.

    Returns:
        What to add to the message.
    """
    environment: Any = trainer._accelerator_connector.cluster_environment
    if not environment.auto_requeue:
        return ""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    job = f"{array}_{task}" if array else os.environ.get("SLURM_JOB_ID", "")
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f", job {job} could not be requeued ({error})"
    return f", job {job} requeued" if done.returncode == 0 else f", job {job} could not be requeued ({done.stderr.strip()})"
