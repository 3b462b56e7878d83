# SPDX-License-Identifier: Apache-2.0
"""Throughput: how fast a run is, how long it waits for data, how much memory it needs and how long it has left."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer

from mtp_lightning.callbacks.run_clock import RunClock
from mtp_lightning.callbacks.steps_progress_bar import StepsProgressBar
from mtp_lightning.errors import UsageError
from mtp_lightning.training.distributed import all_reduce
from mtp_lightning.training.lightning_private import is_accumulating, is_logging_step, watch_fetching
from mtp_lightning.training.run_size import peak_memory, step_size
from mtp_lightning.training.sizing import ModelSize, StepSize, model_size, step_flops

PEAK_TFLOPS = {
    "B200": 2250,
    "H200": 989,
    "H100": 989,
    "A100": 312,
    "V100": 125,
    "L40S": 362,  # before L40, and that before L4: the first that fits counts
    "L40": 181,
    "L4": 121,
    "RTX 4090": 165,
}
"""Dense 16-bit peak of a GPU by a part of its name, in 1e12 operations per second; the makers' figures."""


class Throughput(Callback):
    """Logs figures of speed whenever Lightning logs the loss, each over the steps since the last time.

    - ``train/tokens_per_second``: tokens of rows, without padding, of all processes.
    - ``train/positions_per_second``: positions that the model computes, with masks and padding, of all processes.
    - ``train/model_flop_utilization``: operations that the method needs (recomputation to save memory is not counted) over
      the peak of the devices; left out where the peak is not known.
    - ``train/peak_memory_gb``: the most memory so far, of the GPU, or of the process on a CPU; of the process that needs
      most.
    - ``train/data_wait_share``: share of the time that training waited for a batch, of the process that waited longest.
    - ``train/hours_left``: until the last step at the run's pace so far, checkpoints included, and for the evaluations that
      are still to come, as long as those so far and as far apart.

    Validations, evaluations in training and sample texts are left out of all speeds and of the waiting.

    Args:
        peak_tflops: peak of one device in 1e12 operations per second. None: by the GPU's name, if it is known.
    """

    def __init__(self, peak_tflops: float | None = None) -> None:
        if peak_tflops is not None and peak_tflops <= 0:
            raise UsageError(f"peak_tflops of Throughput must be above 0, got {peak_tflops}.")
        self.peak_tflops = peak_tflops
        self._size: ModelSize | None = None
        self._step: StepSize | None = None
        self.clock = RunClock(0)
        self._fetch_began = 0.0
        self._knows_waits = False
        self._reset()

    def _reset(self) -> None:
        """Begin a new interval between two logged steps."""
        self._interval_began = time.perf_counter()
        self._waited = self._paused = 0.0  # seconds
        self._tokens: torch.Tensor | int = 0  # without padding, as are the masks
        self._masks: torch.Tensor | int = 0
        self._positions = self._rows = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock, and measure the loop's waits for batches."""
        module: Any = pl_module
        self._size, self._step = model_size(module.model), step_size(trainer, module)
        self.clock = RunClock(trainer.global_step)
        self._reset()

        def before() -> None:
            self.resume(trainer)  # after a validation, and what other callbacks did at its end
            self._fetch_began = time.perf_counter()

        def after() -> None:
            self._waited += time.perf_counter() - self._fetch_began

        self._knows_waits = watch_fetching(trainer, before, after)

    def pause(self, trainer: Trainer) -> None:
        """Stop the clock, if it runs: what follows is not training."""
        if self.clock.pause_began is None:
            _synchronize(trainer.strategy.root_device)  # the steps before are
            self.clock.pause()

    def resume(self, trainer: Trainer) -> None:
        """Restart the clock, if it is stopped."""
        self._paused += self.clock.resume(trainer.global_step)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock until the next batch is fetched."""
        if not trainer.sanity_checking:
            self.pause(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Restart it, if the batch had been fetched already."""
        self.resume(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count a batch, and log when Lightning does."""
        self.resume(trainer)
        # On the device: nothing waits for them yet.
        self._tokens = self._tokens + (batch.document_ids >= 0).sum()
        self._masks = self._masks + (batch.starts >= 0).sum() * batch.mtp_labels.shape[2]
        self._positions += batch.input_ids.numel() + batch.mtp_labels.numel()
        self._rows += batch.input_ids.shape[0]
        if is_accumulating(trainer) or not is_logging_step(trainer):
            return
        device = trainer.strategy.root_device
        _synchronize(device)  # count what was computed, not what was queued
        seconds = time.perf_counter() - self._interval_began - self._paused
        sums = torch.tensor([float(self._tokens), self._positions], dtype=torch.float64, device=device)
        maxima = torch.tensor([peak_memory(device), self._waited / seconds], dtype=torch.float64, device=device)
        tokens, positions = all_reduce(sums, "sum").tolist()
        memory, wait_share = all_reduce(maxima, "max").tolist()
        figures = {
            "tokens_per_second": tokens / seconds,
            "positions_per_second": positions / seconds,
            "peak_memory_gb": memory / 1e9,
            **({"data_wait_share": wait_share} if self._knows_waits else {}),
            **self._utilization(device, seconds),
            **self._hours_left(trainer),
        }
        pl_module.log_dict({f"train/{name}": float(value) for name, value in figures.items()})
        self._reset()

    def _utilization(self, device: torch.device, seconds: float) -> dict[str, float]:
        peak = self.peak(device)
        if peak is None or self._size is None or self._step is None:
            return {}
        tokens, masks = float(self._tokens), float(self._masks)  # without padding
        step = replace(self._step, length=max(1, round(tokens / self._rows)))
        flops = step_flops(self._size, step, tokens, masks)
        return {"model_flop_utilization": flops / seconds / (peak * 1e12)}

    def _hours_left(self, trainer: Trainer) -> dict[str, float]:
        left = self.clock.seconds_left(trainer.global_step, float(trainer.estimated_stepping_batches))
        return {} if left is None else {"hours_left": left / 3600}

    def peak(self, device: torch.device) -> float | None:
        """Peak of a device in 1e12 operations per second, or None if it is not known."""
        if self.peak_tflops is not None or device.type != "cuda":
            return self.peak_tflops
        name = torch.cuda.get_device_name(device)
        return next((value for part, value in PEAK_TFLOPS.items() if part in name), None)


def pause_clocks(trainer: Trainer) -> None:
    """Stop the clocks of a run until the next batch: an evaluation follows."""
    untyped: Any = trainer
    for callback in untyped.callbacks:
        if isinstance(callback, Throughput | StepsProgressBar):
            callback.pause(trainer)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
