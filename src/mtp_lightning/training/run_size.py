# SPDX-License-Identifier: Apache-2.0
"""The size of a run's training step, and how much memory its device has and has used."""

from __future__ import annotations

import os
import sys
from typing import Any

import torch
from lightning import Trainer

from mtp_lightning.modeling.transformers_private import attention_kernel
from mtp_lightning.training.sizing import StepSize


def step_size(trainer: Trainer, module: Any) -> StepSize | None:
    """The largest step of a run of an ``MTPModule``, or None if its data is not an ``MTPDataModule``'s."""
    data: Any = getattr(trainer, "datamodule", None)
    if not hasattr(data, "block_fraction"):
        return None
    strategy: Any = trainer.strategy
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
        shards=trainer.world_size if module.model.is_sharded else 1,
        offloaded=bool(getattr(strategy, "cpu_offload", False)),
    )


def device_memory(device: torch.device) -> float:
    """Bytes of memory of a GPU, or of this machine for a CPU; infinite if the system does not say."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[1])
    try:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf
        return float("inf")


def peak_memory(device: torch.device) -> float:
    """The most bytes in use so far: by a GPU's allocator, else the resident size of this process; NaN on Windows."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    try:
        import resource
    except ImportError:
        return float("nan")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1.0 if sys.platform == "darwin" else 1024.0)
