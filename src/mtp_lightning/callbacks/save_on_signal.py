# SPDX-License-Identifier: Apache-2.0
"""SaveOnSignal: save and exit on Ctrl-C, SIGTERM, and SLURM's signal before time is up. Part of every ``mtp fit``."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from typing import Any, cast

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

from mtp_lightning.callbacks.last_checkpoint import last_checkpoint_path
from mtp_lightning.training.distributed import all_reduce
from mtp_lightning.training.lightning_private import cluster_environment, is_accumulating, validation_follows

INTERRUPTED, EXIT_CODE = 130, 143
"""Exit codes of a run that has saved after Ctrl-C, and after another signal, as a shell shows SIGINT and SIGTERM."""


class EvaluationStopped(Exception):
    """Ctrl-C came before or during an evaluation: see ``stop_after_ctrl_c``."""


class SaveOnSignal(Callback):
    """Saves ``last.ckpt`` at the end of the training batch in which the signal came, and exits with code 143 (Ctrl-C: 130).

    A second Ctrl-C ends the run at once.
    A validation that is running or due is finished first. Ctrl-C ends ``AcceptanceEvaluation`` after the prompt that it
    decodes, in a single process and unless a callback monitors its figures; all other decoding is finished.

    Lightning's own handlers broadcast and save inside the signal handler, in the middle of whatever runs, from which no run
    resumes exactly; they are replaced while training. On SLURM the signal is that of Lightning's ``SLURMEnvironment``
    (``requeue_signal``, SIGUSR1 by default), and the job is requeued if its ``auto_requeue`` is set.
    """

    def __init__(self) -> None:
        self._received: int | None = None
        self._process = os.getpid()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Install the handlers; Lightning restores the previous ones at the end."""
        self._received, self._process = None, os.getpid()
        if threading.current_thread() is not threading.main_thread():
            return
        for number in filter(None, (signal.SIGTERM, signal.SIGINT, slurm_signal(trainer))):
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: Any) -> None:
        """Only remember the signal: a handler may run at any moment."""
        if os.getpid() != self._process:  # a worker that loads data: it ends with the run
            return
        if number == signal.SIGINT:
            if self._received == number:
                raise KeyboardInterrupt
            os.write(2, b"\nmtp: Ctrl-C: saving after this step; again: end at once\n")  # print may be interrupted itself
        self._received = number

    @property
    def is_interrupted(self) -> bool:
        """True once Ctrl-C has come."""
        return self._received == signal.SIGINT

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save and exit if any process got a signal; not between the batches of one step, whose gradients are not saved."""
        if is_accumulating(trainer):
            return
        received = self._received or 0
        if trainer.world_size > 1:
            received = int(all_reduce(torch.tensor(float(received), device=trainer.strategy.root_device), "max"))
        # A validation is finished first, except where one is due after every batch: the run would never stop.
        if not received or (validation_follows(trainer) and trainer.val_check_batch != 1):
            return
        path = last_checkpoint_path(trainer)
        trainer.save_checkpoint(path, weights_only=False)
        if trainer.is_global_zero:
            requeued = requeue(trainer) if received == slurm_signal(trainer) else ""
            name = "Ctrl-C" if received == signal.SIGINT else signal.Signals(received).name
            print(
                f"mtp: {name}: saved {str(path)!r} after step {trainer.global_step}{requeued}."
                " Resume with the same command and --ckpt_path last.",
                file=sys.stderr,
                flush=True,
            )
        trainer.strategy.barrier("saved on a signal")
        # Lightning kills the first process as soon as one that it started ends with another code than 0.
        started_by_lightning = isinstance(cluster_environment(trainer), LightningEnvironment)
        code = INTERRUPTED if received == signal.SIGINT else EXIT_CODE
        raise SystemExit(0 if started_by_lightning and not trainer.is_global_zero else code)


def stop_after_ctrl_c(trainer: Trainer, names: tuple[str, ...]) -> None:
    """Raise ``EvaluationStopped`` after Ctrl-C, in a single process and unless a callback monitors such ``names``."""
    callbacks: list[Any] = cast(Any, trainer).callbacks
    interrupted = any(isinstance(callback, SaveOnSignal) and callback.is_interrupted for callback in callbacks)
    monitored = any(str(getattr(callback, "monitor", "")).startswith(names) for callback in callbacks)
    if interrupted and not monitored and trainer.world_size == 1 and trainer.state.fn == "fit":
        raise EvaluationStopped


def slurm_signal(trainer: Trainer) -> int | None:
    """The signal by which SLURM announces the end of a job, or None outside of SLURM."""
    environment = cluster_environment(trainer)
    return int(environment.requeue_signal or signal.SIGUSR1) if isinstance(environment, SLURMEnvironment) else None


def requeue(trainer: Trainer) -> str:
    """Requeue a SLURM job, unless ``auto_requeue`` is off; returns what to add to the message."""
    if not cluster_environment(trainer).auto_requeue:
        return ""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    job = f"{array}_{task}" if array else os.environ.get("SLURM_JOB_ID", "")
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, timeout=60)
        failure = None if done.returncode == 0 else done.stderr.strip()
    except (OSError, subprocess.TimeoutExpired) as error:
        failure = str(error)
    return f", job {job} could not be requeued ({failure})" if failure is not None else f", job {job} requeued"
