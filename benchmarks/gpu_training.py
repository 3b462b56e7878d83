# SPDX-License-Identifier: Apache-2.0
"""Training steps on one GPU: time, peak memory, utilisation, kernels that take most time, for full blocks and a quarter.

    python benchmarks/gpu_training.py [--shape llama-3.1-8b] [--attention sdpa|flex_attention] [--steps 6]

The base has the shape of Llama-3.1-8B and random weights in bfloat16; rank 128, k 8, rows of 2,048 random tokens, GRU
sampler head, distillation losses, gradient checkpointing, AdamW, bf16-mixed: ``configs/qwen.yaml`` without its data.
The first two steps are not counted: one warms up, one counts the operations (matrix products and attention, recomputation
included). One more step is profiled. The estimate is printed with the measurement. A setting that runs out of
memory says so, and the next one follows. ``--figures FILE`` also writes JSON and a plot. ``--shape tiny --device cpu`` tries
the script out.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from shapes import NAMED, device_name, random_base, record, wait
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from mtp_lightning.callbacks.throughput import PEAK_TFLOPS
from mtp_lightning.evaluation.reporting import new_figure, save_figure
from mtp_lightning.losses import AnchorDistillation, LatentConsistency, LossTerm
from mtp_lightning.losses.base import term_value
from mtp_lightning.model import MTPModel
from mtp_lightning.modeling.base_source import is_out_of_memory
from mtp_lightning.modeling.gated_lora import LoRA
from mtp_lightning.modeling.masking import build_masked_input
from mtp_lightning.sampler_heads import GRUSamplerHead
from mtp_lightning.training.run_size import device_memory, peak_memory
from mtp_lightning.training.sizing import StepSize, advice, estimate, gigabytes, model_size, step_flops
from mtp_lightning.types import MaskedInput, TokenRow

WARM_UP = 2


class FlopCounter(TorchDispatchMode):
    """Counts the operations of matrix products and attention. Not torch's own: its hooks forbid ``torch.autograd.grad``."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if (count := flop_registry.get(func.overloadpacket)) is not None:
            self.total += count(*args, **(kwargs or {}), out_val=out)
        return out


def make_model(arguments: argparse.Namespace) -> MTPModel:
    """A random base with the trained parts."""
    base = random_base(arguments.shape, torch.bfloat16, arguments.device, arguments.attention)
    head = GRUSamplerHead(base.config.hidden_size // 2)
    model = MTPModel(base, arguments.num_masks, LoRA(rank=arguments.rank), head)
    if arguments.checkpointing:
        model.enable_gradient_checkpointing()
    return model.train()


def train_step(model: MTPModel, optimizer: torch.optim.Optimizer, batch: MaskedInput) -> torch.Tensor:
    """One optimizer step; returns the loss."""
    terms: dict[str, LossTerm] = {
        "base": AnchorDistillation(head="base"),
        "sampler": AnchorDistillation(head="sampler"),
        "lcm": LatentConsistency(),
    }
    with torch.autocast(batch.input_ids.device.type, torch.bfloat16):
        output = model(batch, terms)
        loss = torch.stack([term_value(sums, batch.counts) for sums in output.sums.values()]).sum()
    loss.backward()
    torch.nn.utils.clip_grad_norm_([p for _, p in model.trained_parameters()], 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def measure(model: MTPModel, arguments: argparse.Namespace, block_fraction: float) -> dict[str, Any]:
    """Train for a few steps and return the figures."""
    device = arguments.device
    optimizer = torch.optim.AdamW([p for _, p in model.trained_parameters()], lr=1e-4)
    draw = torch.Generator().manual_seed(1)
    seconds, losses = [], []
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for number in range(arguments.steps + WARM_UP):
        batch = random_batch(model, arguments, block_fraction, draw, number)
        with contextlib.ExitStack() as stack:
            if number == WARM_UP - 1:
                counter = stack.enter_context(FlopCounter())
            wait(device)
            begin = time.perf_counter()
            loss = train_step(model, optimizer, batch)
            wait(device)
            seconds.append(time.perf_counter() - begin)
        losses.append(loss.item())
    peak_bytes, median = peak_memory(torch.device(device)), statistics.median(seconds[WARM_UP:])
    size, step = model_size(model), step_of(arguments, block_fraction)
    ntp, mtp = batch.input_ids.numel(), batch.mtp_labels.numel()
    counted, needed = counter.total, step_flops(size, step, ntp, mtp)
    peak = arguments.peak_tflops or next((v for k, v in PEAK_TFLOPS.items() if k in device_name(device)), None)
    return {
        "positions": ntp + mtp,
        "seconds_a_step": round(median, 4),
        "fastest_and_slowest": [round(min(seconds[WARM_UP:]), 4), round(max(seconds[WARM_UP:]), 4)],
        "tokens_per_second": round(ntp / median, 1),
        "positions_per_second": round((ntp + mtp) / median, 1),
        "peak_gb": round(peak_bytes / 1e9, 2),
        "estimated_gb": round(estimate(size, step).total / 1e9, 2),
        "tflop_counted": round(counted / 1e12, 6),
        "tflop_without_recomputation": round(needed / 1e12, 6),
        "tflops": round(counted / median / 1e12, 2),
        "utilisation": None if peak is None else round(counted / median / (peak * 1e12), 3),
        "model_flop_utilisation": None if peak is None else round(needed / median / (peak * 1e12), 3),
        "first_and_last_loss": [round(losses[0], 4), round(losses[-1], 4)],
        "top_kernels": top_kernels(model, optimizer, batch),
    }


def random_batch(
    model: MTPModel, arguments: argparse.Namespace, block_fraction: float, draw: torch.Generator, number: int
) -> MaskedInput:
    """Rows of random tokens with their blocks."""
    ids = [torch.randint(model.unembed.vocab_size, (arguments.length,), generator=draw) for _ in range(arguments.rows)]
    rows = [TokenRow(tokens, tokens, torch.zeros_like(tokens), row) for row, tokens in enumerate(ids)]
    batch = build_masked_input(rows, arguments.num_masks, block_fraction=block_fraction, epoch=number)
    return batch.to(torch.device(arguments.device))


def top_kernels(
    model: MTPModel, optimizer: torch.optim.Optimizer, batch: MaskedInput, count: int = 10
) -> list[dict[str, Any]]:
    """The kernels (on a CPU: operations) of one step that take most time, with their share of all kernels' time."""
    cuda = batch.input_ids.is_cuda
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as profiled:
        train_step(model, optimizer, batch)
        wait("cuda" if cuda else "cpu")
    times = [(e.key, e.self_device_time_total if cuda else e.self_cpu_time_total, e.count) for e in profiled.key_averages()]
    total = sum(microseconds for _, microseconds, _ in times) or 1.0
    return [
        {"name": name[:100], "ms": round(microseconds / 1e3, 3), "share": round(microseconds / total, 3), "calls": calls}
        for name, microseconds, calls in sorted(times, key=lambda entry: -entry[1])[:count]
    ]


def plot(results: dict[str, Any], path: Path) -> None:
    """The kernels of each setting that take most time."""
    figure = new_figure(9, 3.2 * len(results))
    axes = figure.subplots(len(results), 1, squeeze=False)[:, 0]
    for axis, (name, figures) in zip(axes, results.items(), strict=True):
        kernels = figures["top_kernels"][::-1]
        axis.barh([f"{kernel['name'][:50]} ({kernel['calls']})" for kernel in kernels], [k["ms"] for k in kernels])
        axis.tick_params(axis="y", labelsize=7)
        axis.set_title(f"{name}: {figures['seconds_a_step']:.3f} s a step, {figures['peak_gb']} GB", fontsize=9)
        axis.set_xlabel("ms")
    save_figure(figure, path, dpi=100)


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


def run() -> None:
    """Measure each setting and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=NAMED, default="llama-3.1-8b")
    parser.add_argument("--attention", choices=["sdpa", "flex_attention"], default="sdpa")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--num_masks", type=int, default=8)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--block_fractions", type=float, nargs="+", default=[0.25, 1.0])
    parser.add_argument("--no_checkpointing", dest="checkpointing", action="store_false")
    parser.add_argument("--peak_tflops", type=float, default=None, help="790: what a real product reaches on an H100")
    parser.add_argument("--figures", type=Path, default=None, help="JSON file to add the figures to")
    arguments = parser.parse_args()
    device = device_name(arguments.device)
    print(f"{device}, torch {torch.__version__}, {arguments.shape}, {arguments.attention}", flush=True)
    results: dict[str, Any] = {}
    model = make_model(arguments)
    size = model_size(model)
    for block_fraction in arguments.block_fractions:
        print(f"block_fraction {block_fraction:g}: {estimate(size, step_of(arguments, block_fraction))}, estimated")
        try:
            figures = measure(model, arguments, block_fraction)
            print(json.dumps(figures, indent=1), flush=True)
            results[f"block_fraction {block_fraction:g}"] = figures
            record(arguments.figures, "training", {"device": device, **results})
            if arguments.figures is not None:
                plot(results, arguments.figures.with_name("training.png"))
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            memory = device_memory(torch.device(arguments.device))
            remedy = advice(size, step_of(arguments, block_fraction), memory)
            print(f"block_fraction {block_fraction:g}: out of memory, {gigabytes(memory)}. {remedy}", flush=True)
        for parameter in model.parameters():
            parameter.grad = None
        gc.collect()
        if arguments.device == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    run()
