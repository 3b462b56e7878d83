# SPDX-License-Identifier: Apache-2.0
"""Memory and GPU-hours for bases of 0.6 to 70 billion parameters, from their shapes alone.

    python benchmarks/sizing.py [--max_length 2048] [--block_fraction 0.25] [--num_masks 8] [--rank 128] [--steps 50000]
                                [--rows_a_step 8] [--device_gb 80] [--tflops 989] [--utilization 0.3]

The memory is the estimate that ``mtp fit`` prints when it starts. The hours are the operations that the method asks for over
``tflops * utilization``: the utilization is an assumption, not a measurement, and hours scale with it.
"""

from __future__ import annotations

import argparse
import math
import warnings
from dataclasses import replace

import torch
from shapes import SHAPES, random_base

from mtp_lightning.model import MTPModel
from mtp_lightning.modeling.gated_lora import LoRA
from mtp_lightning.sampler_heads import GRUSamplerHead
from mtp_lightning.training.sizing import ModelSize, StepSize, estimate, gigabytes, model_size, step_flops


def size_of(name: str, num_masks: int, rank: int) -> ModelSize:
    """The sizes of a model on the meta device: its tensors have shapes and no data."""
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = random_base(name.lower(), torch.bfloat16, "meta")
        model = MTPModel(base, num_masks, LoRA(rank=rank), GRUSamplerHead(base.config.hidden_size // 2))
    return model_size(model)


def rows_that_fit(size: ModelSize, step: StepSize, budget: float) -> int:
    """The largest batch that fits on a device, or 0."""
    rows = 0
    while rows < 64 and estimate(size, replace(step, rows=rows + 1)).total <= budget:
        rows += 1
    return rows


def shards_needed(size: ModelSize, step: StepSize, budget: float) -> int | None:
    """The smallest number of devices, a power of 2, on which a row fits; None: not on 64."""
    for shards in (1, 2, 4, 8, 16, 32, 64):
        if rows_that_fit(size, replace(step, shards=shards), budget):
            return shards
    return None


def run() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, kind, value in (
        ("max_length", int, 2048), ("block_fraction", float, 0.25), ("num_masks", int, 8), ("rank", int, 128),
        ("steps", int, 50000), ("rows_a_step", int, 8), ("device_gb", float, 80.0), ("tflops", float, 989.0),
        ("utilization", float, 0.3),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=kind, default=value)
    parser.add_argument("--kernel", default="sdpa", choices=["sdpa", "flex_attention"])
    a = parser.parse_args()
    budget = 0.9 * a.device_gb * 1e9
    step = StepSize(rows=1, length=a.max_length, block_fraction=a.block_fraction, num_masks=a.num_masks, kernel=a.kernel,
                    checkpointing=True, autocast=True, cuda=True)  # fmt: skip
    print(
        f"rows of {a.max_length} tokens, block_fraction {a.block_fraction:g}: {step.length + step.mtp:,} positions per row;"
        f" k {a.num_masks}, rank {a.rank}, {a.kernel}, gradient checkpointing, bf16-mixed;"
        f" {a.steps:,} steps of {a.rows_a_step} rows; GPUs of {a.device_gb:g} GB, {a.tflops:g} TFLOP/s at"
        f" {a.utilization:.0%} (assumed)\n"
    )
    print("| base | weights | trained, AdamW | step of one row | GPUs a copy | on each GPU | TFLOP a row | GPU-hours |")
    print("|---|---|---|---|---|---|---|---|")
    for name in SHAPES:
        size = size_of(name, a.num_masks, a.rank)
        shards = shards_needed(size, step, budget)
        one = estimate(size, replace(step, shards=shards or 1))
        alone = estimate(size, step)
        flops = step_flops(size, step)
        hours = flops * a.rows_a_step * a.steps / (a.tflops * 1e12 * a.utilization) / 3600
        needed = "-" if shards is None else str(shards)
        print(
            f"| {name} | {gigabytes(alone.base)} | {gigabytes(alone.trained)} | {gigabytes(alone.step + alone.logits)} |"
            f" {needed} | {'-' if shards is None else gigabytes(one.total)} | {flops / 1e12:,.0f} |"
            f" {math.ceil(hours):,} |"
        )


if __name__ == "__main__":
    run()
