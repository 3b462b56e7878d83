# SPDX-License-Identifier: Apache-2.0
"""RunGuards: stops a run that can't go well, with one line that says why. Part of every ``mtp fit``."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.optim import Optimizer

from mtp_lightning.callbacks.acceptance_evaluation import AcceptanceEvaluation
from mtp_lightning.callbacks.throughput import Throughput
from mtp_lightning.data.rows import fingerprint
from mtp_lightning.errors import UsageError
from mtp_lightning.saving.checkpoint_files import newest_checkpoint, read_run_id
from mtp_lightning.trainer.run_errors import memory_message, unwritable_message
from mtp_lightning.training.distributed import all_reduce, checkpoint_folders, gather, run_folder, stop_all
from mtp_lightning.training.module import MTPModule
from mtp_lightning.training.run_size import device_memory, step_size
from mtp_lightning.training.sizing import ModelSize, StepSize, advice, estimate, gigabytes, model_size

COMPARED = ("seed_everything", "model", "data", "trainer")
"""Parts of a configuration that all processes of a run must have in common."""


class RunGuards(Callback):
    """Stops a run that can't go well.

    Before training: all processes must have the same configuration and data, and the run's folder must be writable; an
    estimate of the memory is printed. While training: a loss or a gradient that is not finite stops the run before it
    reaches a weight; ``train/gradient_norm``, before clipping, is logged (not with a loss scaler).

    Losses are checked once an optimizer step, after the backward pass, so that the host waits for the GPU once.

    Attributes:
        configuration: the run's configuration, key -> value as text; set by the command line.
    """

    def __init__(self) -> None:
        self.configuration: dict[str, str] = {}
        self._size: ModelSize | None = None  # once the model is built
        self._step: StepSize | None = None
        self._losses: list[Tensor] = []  # of the batches of the current optimizer step
        self._rows: list[Tensor] = []  # their row ids

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Compare the processes, and try the run's folder."""
        if stage != "fit":
            return
        rows = getattr(getattr(trainer, "datamodule", None), "rows", {})
        fingerprints = {f"data.{split}": fingerprint(split_rows) for split, split_rows in rows.items()}
        error = disagreement(gather({**self.configuration, **fingerprints}))
        if error is None:
            folder = run_folder(trainer)  # all processes must ask
            writes = trainer.is_global_zero and not getattr(trainer, "fast_dev_run", False)
            error = gather(unwritable_message(folder) if writes else None)[0]
        if error is not None:
            stop_all(trainer, error)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print how large a step is."""
        module: Any = pl_module
        self._losses, self._rows = [], []
        self._size, self._step = model_size(module.model), step_size(trainer, module)
        if self._step is None or not trainer.is_global_zero:
            return
        needed, memory = estimate(self._size, self._step), device_memory(trainer.strategy.root_device)
        excess = ""
        if needed.total > memory:
            excess = f", more than its {gigabytes(memory)}: {advice(self._size, self._step, memory)}"
        print(f"memory: {needed}, by estimate{excess}", file=sys.stderr)

    def out_of_memory(self, trainer: Trainer, reason: str) -> str:
        """The message for a run whose memory ran out."""
        if self._size is None:
            return memory_message(reason)
        if self._step is None:
            return memory_message(reason, trainer.global_step + 1)
        memory = device_memory(trainer.strategy.root_device)
        estimated, remedy = str(estimate(self._size, self._step)), advice(self._size, self._step, memory)
        return memory_message(reason, trainer.global_step + 1, f" The estimate was: {estimated}. {remedy}")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Keep the row ids."""
        self._rows.append(batch.row_ids)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Keep the loss; nothing waits for it yet."""
        self._losses.append(loss.detach())

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Refuse to step on what is not finite. All processes find out together."""
        losses, rows = self._losses, self._rows
        self._losses, self._rows = [], []
        if not losses:
            return
        values = torch.stack([loss.float() for loss in losses])
        # A loss scaler provokes infinite gradients, and skips them itself.
        scaled = isinstance(trainer.precision_plugin, MixedPrecision) and trainer.precision_plugin.scaler is not None
        trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        norm = torch.zeros(()) if scaled else gradient_norm(trained)
        bad = torch.stack([(~values.isfinite()).any().float(), (~norm.isfinite()).float().to(values.device)])
        if not all_reduce(bad, "max").any():
            if not scaled:
                is_sharded = any(hasattr(parameter, "placements") for parameter in trained)  # DTensors
                pl_module.log("train/gradient_norm", whole_norm(norm, is_sharded))
            return
        bad_batches = (~values.isfinite()).nonzero().flatten().tolist()
        report = {
            "losses": [values[number].item() for number in bad_batches],
            "rows": [row for number in bad_batches for row in rows[number].tolist()],
            "all_rows": [row for batch_rows in rows for row in batch_rows.tolist()],
        }
        newest = newest_checkpoint(checkpoint_folders(trainer), read_run_id(run_folder(trainer)))
        terms = sorted(
            name.removeprefix("train/loss/")
            for name, value in trainer.callback_metrics.items()
            if name.startswith("train/loss/") and not value.isfinite()
        )
        stop_all(trainer, not_finite(gather(report), trainer.global_step + 1, trainer.current_epoch, newest, terms))


def check_monitors(trainer: Trainer, module: MTPModule) -> None:
    """Refuse a callback that monitors what is never logged, unless code of a user's own may log it."""
    callbacks: list[Callback] = cast(Any, trainer).callbacks
    if not all(type(part).__module__.startswith(("mtp_lightning.", "lightning.")) for part in (module, *callbacks)):
        return
    names, beginnings = {"step", "epoch", *module.logged_names}, ["lr-"]
    for callback in callbacks:
        if isinstance(callback, AcceptanceEvaluation):
            is_timed = callback.num_speed_pairs and not isinstance(trainer.strategy, ModelParallelStrategy)  # sharded
            names |= {"val/acceptance_length", *(("val/speed_up",) if is_timed else ())}
            beginnings.append("val/acceptance_length/")  # and a domain
        elif isinstance(callback, Throughput):
            beginnings.append("train/")
    for callback in callbacks:
        monitor = getattr(callback, "monitor", None)
        if monitor is not None and monitor not in names and not monitor.startswith(tuple(beginnings)):
            near = difflib.get_close_matches(monitor, sorted(names), n=1)
            remedy = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(sorted(names))}."
            key = f"trainer.callbacks: {type(callback).__name__}.monitor"
            raise UsageError(f"{key} {monitor!r} is nothing that this run logs; {remedy}")


def as_text(config: Any) -> dict[str, str]:
    """The keys of a parsed configuration that must be equal in all processes, with their values as text."""
    return {key: str(value) for key, value in vars(config.as_flat()).items() if key.split(".")[0] in COMPARED}


def disagreement(processes: list[dict[str, str]]) -> str | None:
    """A message that names the first key whose value is not the same in all processes, or None."""
    for key in dict.fromkeys(key for settings in processes for key in settings):
        values = [settings.get(key, "nothing") for settings in processes]
        if len(set(values)) > 1:
            other = next(rank for rank, value in enumerate(values) if value != values[0])
            return (
                f"the processes of this run disagree on {key}: {values[0]} in process 0, {values[other]} in process {other}."
                " Start all of them with the same configuration, code and data."
            )
    return None


def gradient_norm(parameters: Iterable[torch.nn.Parameter]) -> Tensor:
    """The norm of this process's gradients, of its shards where sharded: a float64 scalar, not finite if any gradient is."""
    norms = []
    for parameter in parameters:
        gradient: Any = parameter.grad
        if gradient is not None:
            local = gradient.to_local() if hasattr(gradient, "to_local") else gradient
            norms.append(torch.linalg.vector_norm(local, dtype=torch.float32 if local.dtype.itemsize < 8 else None))
    return torch.stack([norm.double() for norm in norms]).norm() if norms else torch.zeros((), dtype=torch.float64)


def whole_norm(norm: Tensor, sharded: bool) -> Tensor:
    """The norm of all gradients, before clipping; with shards all processes must call it."""
    return all_reduce(norm.square(), "sum").sqrt() if sharded else norm


def not_finite(
    processes: list[dict[str, list[Any]]], step: int, epoch: int, newest: Path | None, terms: Sequence[str] = ()
) -> str:
    """The message on a loss or a gradient that is not finite; ``newest`` is the run's newest complete checkpoint.

    ``terms`` are the names of the loss terms that are not finite.

    Each process reports ``losses`` that are not finite, their ``rows``, and ``all_rows`` of the optimizer step.
    """
    losses = [loss for report in processes for loss in report["losses"]]
    key = "rows" if losses else "all_rows"
    rows = ", ".join(str(row) for row in sorted({row for report in processes for row in report[key]})[:20])
    of_terms = f" (model.losses: {', '.join(terms)})" if terms else ""
    what = f"the loss is {losses[0]}{of_terms}" if losses else "a gradient is not finite, though the loss is,"
    if newest is None:
        last_good = "No checkpoint was written before"
    else:
        reached = torch.load(newest, map_location="cpu", weights_only=True, mmap=True)["global_step"]
        last_good = f"The last good checkpoint is {str(newest)!r}, of step {reached}"
    return (
        f"{what} at step {step} (epoch {epoch}, rows {rows} of data.train); no weight was changed by it. {last_good}."
        " Inspect these rows, lower trainer.gradient_clip_val and resume with --ckpt_path auto; or start a new run with a"
        " lower learning rate."
    )
