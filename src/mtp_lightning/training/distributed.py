# SPDX-License-Identifier: Apache-2.0
"""What the processes of a run share: sums, values, one error message, and the run's folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, NoReturn

import torch.distributed
from lightning import Trainer
from torch import Tensor

from mtp_lightning.errors import RunError


def all_reduce(value: Tensor, how: Literal["sum", "mean", "max"]) -> Tensor:
    """Reduce a tensor over all processes, which overwrites it; all must call it. A mean needs floating point.

    Lightning's own reduction waits at a barrier first.
    """
    if not is_distributed():
        return value
    operation = torch.distributed.ReduceOp.MAX if how == "max" else torch.distributed.ReduceOp.SUM
    torch.distributed.all_reduce(value, op=operation)
    return value / torch.distributed.get_world_size() if how == "mean" else value


def gather(value: Any) -> list[Any]:
    """The picklable values of all processes by rank, in each of them. All must call it."""
    if not is_distributed():
        return [value]
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def is_distributed() -> bool:
    """True if processes are connected."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def stop_all(trainer: Trainer, message: str) -> NoReturn:
    """Stop the run in all processes, each of which must call it; the first raises a RunError with the message.

    The others exit with 0: Lightning kills the first as soon as another one ends with an error, and the message would be
    lost.
    """
    if trainer.is_global_zero:
        raise RunError(message)
    raise SystemExit(0)


def run_folder(trainer: Trainer) -> Path:
    """The folder of a run: the first logger's. All processes must call it."""
    return Path(trainer.log_dir or trainer.default_root_dir)


def checkpoint_folders(trainer: Trainer) -> list[Path]:
    """Folders for a run's checkpoints, existing or not, the run's own at the end. All processes must call it."""
    named = [Path(folder) for callback in trainer.checkpoint_callbacks if (folder := getattr(callback, "dirpath", None))]
    return [*named, run_folder(trainer) / "checkpoints"]
