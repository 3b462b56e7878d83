# SPDX-License-Identifier: Apache-2.0
"""RunGuards: stops a run that can't go well, and says in one line what was found. Part of every ``mtp fit``."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor
from torch.optim import Optimizer

from mtp_lightning.data.rows import fingerprint
from mtp_lightning.errors import RunError, one_line
from mtp_lightning.modeling.base import is_out_of_memory
from mtp_lightning.modeling.transformers_private import attention_kernel
from mtp_lightning.saving.checkpoint_files import newest_checkpoint, read_run_id
from mtp_lightning.training.collectives import all_reduce
from mtp_lightning.training.distributed import checkpoint_folders, gather, run_folder, stop_all
from mtp_lightning.training.sizing import ModelSize, StepSize, advice, estimate, gigabytes, model_size

NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}
"""What the operating system says where nothing can be written any more."""

COMPARED = ("seed_everything", "model", "data", "trainer")
"""Parts of a configuration that all processes of a run must have in common."""


class RunGuards(Callback):
    """Stops a run that can't go well.

    Before training: all processes have the same configuration and data, the run's folder can be written, and an estimate of
    the memory is printed. While training: a loss or a gradient that is not finite stops the run before it reaches a weight.

    Losses are looked at once an optimizer step, after the backward pass, so that a GPU waits for the processor once.

    Attributes:
        configuration: the run's configuration, key -> value as text; set by the command line.
        size: sizes of the model, once it is built.
        step: the largest step that the configuration makes.
    """

    def __init__(self) -> None:
        self.configuration: dict[str, str] = {}
        self.size: ModelSize | None = None
        self.step: StepSize | None = None
        self._losses: list[Tensor] = []
        self._rows: list[Tensor] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Compare the processes, and try the run's folder."""
        if stage != "fit":
            return
        folder = run_folder(trainer)
        rows = getattr(getattr(trainer, "datamodule", None), "rows", {})
        mine = {**self.configuration, **{f"data.{split}": fingerprint(each) for split, each in rows.items()}}
        if (found := disagreement(gather(mine))) is not None:
            stop_all(trainer, found)
        writes = trainer.is_global_zero and not getattr(trainer, "fast_dev_run", False)
        if (wrong := gather(unwritable(folder) if writes else None)[0]) is not None:
            stop_all(trainer, wrong)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say how large a step is."""
        module: Any = pl_module
        self._losses, self._rows = [], []
        self.size, self.step = model_size(module.model), step_size(trainer, module)
        if self.step is not None and trainer.is_global_zero:
            found = estimate(self.size, self.step)
            memory = memory_of(trainer.strategy.root_device)
            more = "" if found.total <= memory else f", more than its {gigabytes(memory)}: {self.memory_advice(trainer)}"
            print(f"memory: {found}, by estimate{more}", file=sys.stderr)

    def memory_advice(self, trainer: Trainer) -> str:
        """What to lower where a step does not fit.

        Args:
            trainer: the trainer.

        Returns:
            A sentence.
        """
        if self.size is None or self.step is None:
            return "Lower data.batch_size, data.block_fraction or data.max_length."
        return advice(self.size, self.step, memory_of(trainer.strategy.root_device))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Remember which rows these are."""
        self._rows.append(batch.row_ids)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Remember the loss; nothing waits for it yet."""
        self._losses.append(loss.detach())

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Refuse to step on what is not finite. All processes learn of it together."""
        losses, rows = self._losses, self._rows
        self._losses, self._rows = [], []
        if not losses:
            return
        values = torch.stack([loss.float() for loss in losses])
        # A loss scaler provokes infinite gradients, and skips them itself.
        scaled = isinstance(trainer.precision_plugin, MixedPrecision) and trainer.precision_plugin.scaler is not None
        norm = torch.zeros(()) if scaled else gradient_norm(pl_module.parameters())
        bad = torch.stack([(~values.isfinite()).any().float(), (~norm.isfinite()).float().to(values.device)])
        if not all_reduce(bad, "max").any():
            return
        wrong = [number for number, value in enumerate(values.tolist()) if value != value or abs(value) == float("inf")]
        mine = {
            "losses": [values[number].item() for number in wrong],
            "rows": [row for number in wrong for row in rows[number].tolist()],
            "all_rows": [row for each in rows for row in each.tolist()],
        }
        newest = newest_checkpoint(checkpoint_folders(trainer), read_run_id(run_folder(trainer)))
        stop_all(trainer, not_finite(gather(mine), trainer.global_step + 1, trainer.current_epoch, newest))


def as_text(config: Any) -> dict[str, str]:
    """A configuration as key -> value, to compare it between processes.

    Args:
        config: a parsed configuration.

    Returns:
        Texts; without the values that may differ from process to process.
    """
    return {key: str(value) for key, value in vars(config.as_flat()).items() if key.split(".")[0] in COMPARED}


def disagreement(processes: list[dict[str, str]]) -> str | None:
    """What not all processes have in common.

    Args:
        processes: key -> value of each process, by rank.

    Returns:
        A message, or None.
    """
    for key in dict.fromkeys(key for each in processes for key in each):
        values = [each.get(key, "nothing") for each in processes]
        if len(set(values)) > 1:
            other = next(rank for rank, value in enumerate(values) if value != values[0])
            return (
                f"the processes of this run disagree on {key}: {values[0]} in process 0, {values[other]} in process {other}."
                " Start all of them with the same configuration, code and data."
            )
    return None


def unwritable(folder: Path) -> str | None:
    """Why a run's folder can't be written, found by writing to it.

    Args:
        folder: the folder; it is made where it is not there.

    Returns:
        A message, or None.
    """
    trial = folder / f".mtp_{os.getpid()}.part"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with trial.open("wb") as file:
            file.write(b"mtp")
        trial.unlink()
    except OSError as error:
        return (
            f"the run's folder {str(folder)!r} can't be written: {error.strerror or one_line(error)}."
            " Change the loggers' save_dir or make room; nothing was trained."
        )
    return None


def gradient_norm(parameters: Iterable[torch.nn.Parameter]) -> Tensor:
    """The norm of this process's gradients; with sharded parameters of its shards.

    Args:
        parameters: parameters, some without gradient.

    Returns:
        Scalar float32, not finite where any gradient is not.
    """
    norms = []
    for parameter in parameters:
        gradient: Any = parameter.grad
        if gradient is not None:
            local = gradient.to_local() if hasattr(gradient, "to_local") else gradient
            norms.append(torch.linalg.vector_norm(local, dtype=torch.float32 if local.dtype.itemsize < 8 else None))
    return torch.stack([norm.float() for norm in norms]).norm() if norms else torch.zeros(())


def not_finite(processes: list[dict[str, list[Any]]], step: int, epoch: int, newest: Path | None) -> str:
    """The message on a loss or a gradient that is not finite.

    Args:
        processes: of each process ``losses`` that are not finite, their ``rows``, and ``all_rows`` of the step.
        step: number of the optimizer step that was about to be made.
        epoch: the epoch.
        newest: the run's newest complete checkpoint, or None.

    Returns:
        The message.
    """
    losses = [loss for each in processes for loss in each["losses"]]
    key = "rows" if losses else "all_rows"
    rows = ", ".join(str(row) for row in sorted({row for each in processes for row in each[key]})[:20])
    what = f"the loss is {losses[0]}" if losses else "a gradient is not finite, though the loss is,"
    if newest is None:
        good = "No checkpoint was written before"
    else:
        reached = torch.load(newest, map_location="cpu", weights_only=True, mmap=True)["global_step"]
        good = f"The last good checkpoint is {str(newest)!r}, of step {reached}"
    return (
        f"{what} at step {step} (epoch {epoch}, rows {rows} of data.train); no weight was changed by it. {good}."
        " Look at these rows, lower the learning rate or trainer.gradient_clip_val, and go on with --ckpt_path last."
    )


def step_size(trainer: Trainer, module: Any) -> StepSize | None:
    """The largest step that a run's configuration makes.

    Args:
        trainer: the trainer.
        module: an ``MTPModule`` whose model is built.

    Returns:
        Its size, or None where the data is not ours.
    """
    data: Any = getattr(trainer, "datamodule", None)
    if not hasattr(data, "block_fraction"):
        return None
    strategy: Any = trainer.strategy
    sharded = any(hasattr(parameter, "placements") for parameter in module.model.parameters())
    return StepSize(
        rows=data.batch_size,
        length=data.max_length,
        block_fraction=data.block_fraction,
        max_blocks=data.max_blocks_per_row,
        num_masks=module.num_masks,
        kernel=attention_kernel(module.model.base),
        checkpointing=module.gradient_checkpointing,
        autocast="mixed" in str(trainer.precision),
        cuda=strategy.root_device.type == "cuda",
        shards=trainer.world_size if sharded else 1,
        offloaded=bool(getattr(strategy, "cpu_offload", False)),
    )


def memory_of(device: torch.device) -> float:
    """Bytes of memory that a device has, or that this machine has for a CPU.

    Args:
        device: the device.

    Returns:
        Bytes.
    """
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[1])
    try:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (ValueError, OSError):  # a system that does not say
        return float("inf")


def explain(error: BaseException, guards: RunGuards | None, trainer: Trainer) -> RunError | None:
    """The sentence for what went wrong outside of this program while it trained.

    Args:
        error: what was raised.
        guards: the run's guards, which know the step's size.
        trainer: the trainer.

    Returns:
        The error to raise instead, or None for what is not known.
    """
    text = one_line(error, 200)
    go_on = " Go on with --ckpt_path last."
    if is_out_of_memory(error):
        if guards is None or guards.size is None:
            return RunError(
                f"memory ran out before training began ({text}). Take a smaller base, model.dtype: bfloat16,"
                " model.quantization: 4bit, or more processes with --config configs/strategies/fsdp2.yaml."
            )
        more, said = guards.memory_advice(trainer), "" if guards.step is None else estimate(guards.size, guards.step)
        return RunError(
            f"memory ran out in step {trainer.global_step + 1} ({text}). The estimate was: {said}. {more}{go_on}"
        )
    if isinstance(error, RuntimeError) and "DataLoader worker" in text:
        return RunError(
            f"a process that makes batches has ended ({text}). It may have run out of memory or have been killed: lower"
            f" data.num_workers, or set it to 0 to see its own error.{go_on}"
        )
    if any(
        words in text for words in ("Connection closed by peer", "Connection reset by peer", "NCCL communicator was abort")
    ):
        return RunError(
            f"another process of this run has ended, and this one can't go on alone ({text}). Its own message stands above,"
            f" unless it was killed.{go_on}"
        )
    if isinstance(error, OSError) and error.errno in NO_ROOM:
        name = "a file" if error.filename is None else repr(str(error.filename))
        return RunError(f"{name} could not be written: {error.strerror}. Make room or give another folder.{go_on}")
    return None
