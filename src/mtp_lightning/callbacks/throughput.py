# SPDX-License-Identifier: Apache-2.0
"""Throughput: how fast a run is, what it waits for, how much memory it takes and how long it has left."""

from __future__ import annotations

import resource
import sys
import time
from dataclasses import replace
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer

from mtp_lightning.callbacks.run_guards import step_size
from mtp_lightning.errors import UsageError
from mtp_lightning.training.collectives import all_reduce
from mtp_lightning.training.distributed import figures_are_logged
from mtp_lightning.training.sizing import ModelSize, StepSize, model_size, step_flops

PEAK_TFLOPS = {"B200": 2250, "H200": 989, "H100": 989, "A100": 312, "L40S": 362, "RTX 4090": 165, "L4": 121, "V100": 125}
"""Dense 16-bit peak of a GPU by a part of its name, in 1e12 operations a second; the makers' figures."""


class Throughput(Callback):
    """Logs figures of speed whenever Lightning logs the loss, each over the steps since the last time.

    - ``train/tokens_per_second``: tokens of rows, padding not counted, of all processes.
    - ``train/positions_per_second``: positions that the model computes, masks and padding too, of all processes.
    - ``train/model_flop_utilization``: operations that the method asks for (what is recomputed to save memory is not
      counted) over the peak of the devices; left out where the peak is not known.
    - ``train/peak_memory_gb``: most memory so far, of the GPU, or of the process on a CPU; of the process that needs most.
    - ``train/data_wait_share``: share of the time that training waited for a batch, of the process that waited longest.
    - ``train/hours_left``: until the last step at the run's pace so far, checkpoints included, and for the evaluations that
      are still to come, as long as those so far and as far apart.

    Validations, evaluations in training and sample texts are left out of all speeds and of the waiting.

    Args:
        peak_tflops: peak of one device in 1e12 operations a second. None: by the GPU's name, if it is known.
    """

    def __init__(self, peak_tflops: float | None = None) -> None:
        if peak_tflops is not None and peak_tflops <= 0:
            raise UsageError(f"peak_tflops of Throughput must be above 0, got {peak_tflops}.")
        self.peak_tflops = peak_tflops
        self.size: ModelSize | None = None
        self.step: StepSize | None = None
        self._tokens: torch.Tensor | int = 0
        self._ntp = self._mtp = self._rows = 0
        self._waited = self._paused = 0.0
        self._begun = self._started = self._asked = 0.0
        self._pause: float | None = None
        self._evaluations: dict[int, float] = {}
        self._first_step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock, and have the loop say when it asks for a batch."""
        module: Any = pl_module
        self.size, self.step = model_size(module.model), step_size(trainer, module)
        self._started, self._first_step = time.perf_counter(), trainer.global_step
        self._pause, self._evaluations = None, {}
        self._reset()
        loop: Any = trainer.fit_loop.epoch_loop
        before, after = type(loop)._on_before_fetch, type(loop)._on_after_fetch

        def asks() -> None:
            self.go_on(trainer)  # after a validation, and what other callbacks did at its end
            self._asked = time.perf_counter()
            before(loop)

        def gets() -> None:
            after(loop)
            self._waited += time.perf_counter() - self._asked

        loop._on_before_fetch, loop._on_after_fetch = asks, gets

    def _reset(self) -> None:
        self._tokens = self._ntp = self._mtp = self._rows = 0
        self._waited = self._paused = 0.0
        self._begun = time.perf_counter()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock until the next batch is asked for."""
        if not trainer.sanity_checking:
            self.pause(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Let it go on, where the batch was there already."""
        self.go_on(trainer)

    def pause(self, trainer: Trainer) -> None:
        """Stop the clock: what follows is no training. Nothing where it stands already.

        Args:
            trainer: the trainer.
        """
        if self._pause is None:
            device = trainer.strategy.root_device
            if device.type == "cuda":
                torch.cuda.synchronize(device)  # what was asked for before is training still
            self._pause = time.perf_counter()

    def go_on(self, trainer: Trainer) -> None:
        """Let the clock go on. Nothing where it runs.

        Args:
            trainer: the trainer.
        """
        if self._pause is not None:
            seconds, self._pause = time.perf_counter() - self._pause, None
            self._paused += seconds
            step = trainer.global_step
            self._evaluations[step] = self._evaluations.get(step, 0.0) + seconds

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count a batch, and log when Lightning does."""
        self.go_on(trainer)
        self._tokens = self._tokens + (batch.document_ids >= 0).sum()  # on the device: nothing waits for it yet
        self._ntp += batch.input_ids.numel()
        self._mtp += batch.mtp_labels.numel()
        self._rows += batch.input_ids.shape[0]
        if trainer.fit_loop._should_accumulate() or not figures_are_logged(trainer):
            return
        device = trainer.strategy.root_device
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # the clock is to count what was done, not what was asked for
        seconds = time.perf_counter() - self._begun - self._paused
        sums = torch.tensor([float(self._tokens), self._ntp + self._mtp], dtype=torch.float64, device=device)
        most = torch.tensor([peak_memory(device), self._waited / seconds], dtype=torch.float64, device=device)
        tokens, positions = all_reduce(sums, "sum").tolist()
        memory, waited = all_reduce(most, "max").tolist()
        figures = {
            "train/tokens_per_second": tokens / seconds,
            "train/positions_per_second": positions / seconds,
            "train/peak_memory_gb": memory / 1e9,
            "train/data_wait_share": waited,
        }
        if (peak := self.peak(device)) is not None and self.size is not None and self.step is not None:
            step = replace(self.step, length=max(1, self._ntp // self._rows))
            done = step_flops(self.size, step, self._ntp, self._mtp)
            figures["train/model_flop_utilization"] = done / seconds / (peak * 1e12)
        total = trainer.max_steps if trainer.max_steps > 0 else float(trainer.estimated_stepping_batches)
        steps = trainer.global_step - self._first_step
        if steps > 0 and total != float("inf"):
            pace = (time.perf_counter() - self._started - sum(self._evaluations.values())) / steps
            left = max(0.0, total - trainer.global_step)
            figures["train/hours_left"] = (left * pace + evaluation_seconds(self._evaluations, left)) / 3600
        pl_module.log_dict({name: float(value) for name, value in figures.items()})
        self._reset()

    def peak(self, device: torch.device) -> float | None:
        """Peak of a device in 1e12 operations a second, or None."""
        if self.peak_tflops is not None or device.type != "cuda":
            return self.peak_tflops
        name = torch.cuda.get_device_name(device)
        return next((value for part, value in PEAK_TFLOPS.items() if part in name), None)


def pause_clocks(trainer: Trainer) -> None:
    """Stop the clocks of a run until the next batch: what follows is an evaluation.

    Args:
        trainer: the trainer.
    """
    known: Any = trainer
    for each in known.callbacks:
        if isinstance(each, Throughput):
            each.pause(trainer)


def evaluation_seconds(evaluations: dict[int, float], left: float) -> float:
    """How long the evaluations that are still to come will take.

    Args:
        evaluations: seconds of those so far, by the optimizer step that they came after.
        left: optimizer steps to come.

    Returns:
        Seconds. They are taken to be as long as those so far, and as far apart; one alone as far as it is from step 0.
    """
    if not evaluations:
        return 0.0
    first, last = min(evaluations), max(evaluations)
    apart = (last - first) / (len(evaluations) - 1) if len(evaluations) > 1 else first
    return left // max(1.0, apart) * sum(evaluations.values()) / len(evaluations)


def peak_memory(device: torch.device) -> float:
    """The most memory that was in use so far, in bytes.

    Args:
        device: a GPU, whose allocator is asked; else this process's resident size is meant.

    Returns:
        Bytes.
    """
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1.0 if sys.platform == "darwin" else 1024.0)
