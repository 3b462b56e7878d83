# SPDX-License-Identifier: Apache-2.0
"""Training steps on one GPU: peak memory, time of a step, utilization, for full blocks and a quarter of them.

    python benchmarks/gpu_training.py [--shape llama-3.1-8b] [--attention sdpa|flex_attention] [--steps 8]

The base has the shape of Llama-3.1-8B and random weights in bfloat16; rank 128, k 8, rows of 2,048 random tokens, GRU
sampler head, distillation losses, gradient checkpointing, AdamW, bf16-mixed: ``configs/qwen.yaml`` without its data.
The first two steps are not counted. The estimate of each setting is printed with the measurement. A setting that runs
out of memory says so, and the next one follows. ``--shape tiny --device cpu`` tries the script out.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from typing import Any

import torch
from shapes import NAMED, random_base

from mtp_lightning.callbacks.throughput import PEAK_TFLOPS
from mtp_lightning.losses import AnchorDistillation, LatentConsistency, LossTerm
from mtp_lightning.losses.base import term_value
from mtp_lightning.model import MTPModel
from mtp_lightning.modeling.base import is_out_of_memory
from mtp_lightning.modeling.gated_lora import LoRA
from mtp_lightning.modeling.masking import build_masked_input
from mtp_lightning.sampler_heads import GRUSamplerHead
from mtp_lightning.training.run_size import device_memory, peak_memory
from mtp_lightning.training.sizing import StepSize, advice, estimate, gigabytes, model_size, step_flops
from mtp_lightning.types import TokenRow

WARM_UP = 2


def make_model(arguments: argparse.Namespace) -> MTPModel:
    """A random base with the trained parts."""
    base = random_base(arguments.shape, torch.bfloat16, arguments.device, arguments.attention)
    head = GRUSamplerHead(base.config.hidden_size // 2)
    model = MTPModel(base, arguments.num_masks, LoRA(rank=arguments.rank), head)
    if arguments.checkpointing:
        model.enable_gradient_checkpointing()
    return model.train()


def steps(model: MTPModel, arguments: argparse.Namespace, block_fraction: float) -> dict[str, Any]:
    """Train for a few steps and return the measurements."""
    device = torch.device(arguments.device)
    terms: dict[str, LossTerm] = {
        "base": AnchorDistillation(head="base"),
        "sampler": AnchorDistillation(head="sampler"),
        "lcm": LatentConsistency(),
    }
    optimizer = torch.optim.AdamW([p for _, p in model.trained_parameters()], lr=1e-4)
    draw = torch.Generator().manual_seed(1)
    seconds, losses = [], []
    ntp = mtp = 0
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for number in range(arguments.steps + WARM_UP):
        ids = [torch.randint(model.unembed.vocab_size, (arguments.length,), generator=draw) for _ in range(arguments.rows)]
        rows = [TokenRow(tokens, tokens, torch.zeros_like(tokens), row) for row, tokens in enumerate(ids)]
        batch = build_masked_input(rows, arguments.num_masks, block_fraction=block_fraction, epoch=number).to(device)
        ntp, mtp = batch.input_ids.numel(), batch.mtp_labels.numel()
        wait(device)
        begin = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16):
            output = model(batch, terms)
            loss = torch.stack([term_value(sums, batch.counts) for sums in output.sums.values()]).sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for _, p in model.trained_parameters()], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        wait(device)
        seconds.append(time.perf_counter() - begin)
        losses.append(loss.item())
    sorted_seconds = sorted(seconds[WARM_UP:])
    median = sorted_seconds[len(sorted_seconds) // 2]
    size, step = model_size(model), step_of(arguments, block_fraction)
    flops = step_flops(size, step, ntp, mtp)
    peak = arguments.peak_tflops or next((v for k, v in PEAK_TFLOPS.items() if k in device_name(device)), None)
    return {
        "block_fraction": block_fraction,
        "positions": ntp + mtp,
        "peak_gb": round(peak_memory(device) / 1e9, 2),
        "estimated_gb": round(estimate(size, step).total / 1e9, 2),
        "seconds_a_step": round(median, 4),
        "fastest_and_slowest": [round(sorted_seconds[0], 4), round(sorted_seconds[-1], 4)],
        "tokens_per_second": round(ntp / median, 1),
        "positions_per_second": round((ntp + mtp) / median, 1),
        "tflop_a_step": round(flops / 1e12, 3),
        "tflops": round(flops / median / 1e12, 2),
        "utilization": None if peak is None else round(flops / median / (peak * 1e12), 3),
        "first_and_last_loss": [round(losses[0], 4), round(losses[-1], 4)],
    }


def step_of(arguments: argparse.Namespace, block_fraction: float) -> StepSize:
    """The step's size, for the estimate."""
    return StepSize(
        rows=arguments.rows,
        length=arguments.length,
        block_fraction=block_fraction,
        num_masks=arguments.num_masks,
        kernel=arguments.attention,
        checkpointing=arguments.checkpointing,
        autocast=True,
        cuda=arguments.device == "cuda",
    )


def wait(device: torch.device) -> None:
    """Synchronise with the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def device_name(device: torch.device) -> str:
    """The GPU's name."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def run() -> None:
    """Measure each setting and print JSON, one line each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=NAMED, default="llama-3.1-8b")
    parser.add_argument("--attention", choices=["sdpa", "flex_attention"], default="sdpa")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--num_masks", type=int, default=8)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--block_fractions", type=float, nargs="+", default=[0.25, 1.0])
    parser.add_argument("--no_checkpointing", dest="checkpointing", action="store_false")
    parser.add_argument("--peak_tflops", type=float, default=None, help="790: what a real product reaches on an H100")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    print(json.dumps({"name": device_name(device), "torch": torch.__version__, **vars(arguments)}), flush=True)
    model = make_model(arguments)
    size = model_size(model)
    for block_fraction in arguments.block_fractions:
        print(f"block_fraction {block_fraction:g}: {estimate(size, step_of(arguments, block_fraction))}, estimated")
        try:
            print(json.dumps(steps(model, arguments, block_fraction)), flush=True)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            memory = device_memory(device)
            remedy = advice(size, step_of(arguments, block_fraction), memory)
            print(json.dumps({"block_fraction": block_fraction, "memory_ran_out_of": gigabytes(memory), "advice": remedy}))
        for parameter in model.parameters():
            parameter.grad = None
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    run()
