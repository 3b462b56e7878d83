# SPDX-License-Identifier: Apache-2.0
"""The training step on a CPU against the naive one (``naive_step.py``): time, peak memory, equality, and how it grows.

    python benchmarks/training_step.py --base FOLDER [--rows 4] [--length 247] [--blocks 32] [--naive]
    python benchmarks/training_step.py --check
    python benchmarks/training_step.py --plot docs/images/training_step.png
    python benchmarks/training_step.py --steady 1000 [--every_shape] [--naive]

Bfloat16 base, bf16-mixed, rank 32, GRU head of the base's width that reads z, distillation of both heads and latent
consistency, AdamW. Both steps alternate in one process, the first two of each are not counted; the peak is resident memory
above what was resident before the step. ``--check`` compares losses and gradients in float64. ``--plot`` shows the CPU time
of a random base of 4 layers of width 256 against row length, masks, blocks and batch. ``--steady`` trains it on batches of
mixed lengths and prints the resident memory, padded as the collator pads them, or with ``--every_shape`` not.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from naive_step import naive_sums, total
from shapes import random_base

from mtp_lightning.losses import AnchorDistillation, LatentConsistency, LossTerm, tiles
from mtp_lightning.model import MTPModel
from mtp_lightning.modeling.base import load_base
from mtp_lightning.modeling.gated_lora import LoRA
from mtp_lightning.modeling.masking import BLOCK_MULTIPLE, ROW_MULTIPLE, build_masked_input
from mtp_lightning.sampler_heads import GRUSamplerHead
from mtp_lightning.types import MaskedInput, TokenRow

TERMS: dict[str, LossTerm] = {
    "base": AnchorDistillation(head="base"),
    "sampler": AnchorDistillation(head="sampler"),
    "lcm": LatentConsistency(),
}
VOCAB = 8192
Sums = Callable[[MTPModel, MaskedInput, dict[str, LossTerm]], dict[str, Any]]


def our_sums(model: MTPModel, batch: MaskedInput, terms: dict[str, LossTerm]) -> dict[str, Any]:
    """The sums of the terms by the model's own forward pass."""
    return model(batch, terms).sums


def make_model(base: Any, num_masks: int = 8, rank: int = 32) -> MTPModel:
    """A model whose adapters are not at their start, where their first gradient is zero."""
    model = MTPModel(base, num_masks, LoRA(rank=rank), GRUSamplerHead(read_hidden=True)).train()
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.trained_parameters():
            if "lora_B" in name or name.endswith("output.weight"):
                parameter.normal_(std=0.01)
    return model


def make_batch(rows: int, length: int, num_masks: int, vocab: int, **options: Any) -> MaskedInput:
    """Rows of random tokens, the last a tenth shorter than the first."""
    draw = torch.Generator().manual_seed(0)
    lengths = [length - round(0.1 * length * row / max(1, rows - 1)) for row in range(rows)]
    ids = [torch.randint(vocab, (each,), generator=draw) for each in lengths]
    return build_masked_input([TokenRow(t, t, torch.zeros_like(t), r) for r, t in enumerate(ids)], num_masks, **options)


def step(model: MTPModel, batch: MaskedInput, sums: Sums, optimizer: torch.optim.Optimizer | None) -> dict[str, float]:
    """One step: seconds by part, CPU seconds of all threads, and the loss."""
    begin, cpu_begin = time.perf_counter(), time.process_time()
    with torch.autocast("cpu", torch.bfloat16):
        loss = total(sums(model, batch, TERMS), batch.counts)
    forward = time.perf_counter()
    loss.backward()
    backward = time.perf_counter()
    if optimizer is not None:
        optimizer.step()
        optimizer.zero_grad()
    end = time.perf_counter()
    seconds = {"forward": forward - begin, "backward": backward - forward, "total": end - begin}
    return {**seconds, "cpu": time.process_time() - cpu_begin, "loss": loss.item()}


def status(name: str) -> int:
    """A figure of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def peak_of(run: Callable[[], Any]) -> int:
    """Bytes of resident memory that a call takes at most, above what is in use before it."""
    ctypes.CDLL(None).malloc_trim(0)
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    run()
    return status("VmHWM") - before


def compare(arguments: argparse.Namespace) -> None:
    """Print seconds and peak memory of both steps."""
    base = load_base(arguments.base, dtype="bfloat16")
    model = make_model(base)
    batch = make_batch(arguments.rows, arguments.length, 8, model.unembed.vocab_size, max_blocks_per_row=arguments.blocks)
    optimizer = torch.optim.AdamW([p for _, p in model.trained_parameters()], lr=1e-4)
    steps = {"ours": our_sums, **({"naive": naive_sums} if arguments.naive else {})}
    print(json.dumps({"threads": torch.get_num_threads(), "ntp": batch.input_ids.numel(), "mtp": batch.mtp_labels.numel()}))
    for name, sums in steps.items():
        peak = peak_of(lambda sums=sums: step(model, batch, sums, None))
        print(json.dumps({"step": name, "peak_gb": round(peak / 1e9, 2)}), flush=True)
        model.zero_grad()
    seconds: dict[str, list[dict[str, float]]] = {name: [] for name in steps}
    for number in range(arguments.steps + 1):
        for name, sums in steps.items():
            measured = step(model, batch, sums, optimizer)
            if number:
                seconds[name].append(measured)
    for name, measured_steps in seconds.items():
        parts = ("forward", "backward", "total")
        print(json.dumps({"step": name, **{p: round(statistics.median(s[p] for s in measured_steps), 3) for p in parts}}))
    if arguments.naive:
        ratios = sorted(b["total"] / a["total"] for a, b in zip(*seconds.values(), strict=True))
        print(json.dumps({"naive_over_ours": [round(r, 2) for r in ratios]}))


def check() -> None:
    """Print the largest differences of losses and gradients in float64."""
    model = make_model(random_base("tiny", torch.float64, "cpu"), 4)
    batch = make_batch(3, 40, 4, 1000, block_fraction=0.6)
    results = []
    for sums in (our_sums, naive_sums):
        loss = total(sums(model, batch, TERMS), batch.counts)
        results.append((loss, *torch.autograd.grad(loss, [p for _, p in model.trained_parameters()])))
    (ours, *grads), (naive, *others) = results
    difference = max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(grads, others, strict=True))
    print(
        json.dumps({"loss": ours.item(), "difference": (ours - naive).item(), "largest relative of gradients": difference})
    )


def small_base() -> Any:
    """A random base of 4 layers of width 256."""
    sizes = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "vocab_size": VOCAB, "head_dim": 64}
    return random_base("tiny", torch.bfloat16, "cpu", **sizes)


def steady(num_steps: int, sums: Sums, every_shape: bool) -> None:
    """Print the resident memory over steps on batches of one or two rows of 40 to 200 tokens."""
    padding = {} if every_shape else {"row_multiple": ROW_MULTIPLE, "block_multiple": BLOCK_MULTIPLE}
    if every_shape:
        tiles.STATE_MULTIPLE = 1
    model, draw = make_model(small_base()), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW([p for _, p in model.trained_parameters()], lr=1e-4)
    for number in range(1, num_steps + 1):
        rows, length = (int(torch.randint(low, high, (), generator=draw)) for low, high in ((1, 3), (40, 201)))
        step(model, make_batch(rows, length, 8, VOCAB, max_blocks_per_row=16, **padding), sums, optimizer)
        if number % max(1, num_steps // 10) == 0:
            print(json.dumps({"step": number, "resident_mb": round(status("VmRSS") / 1e6)}), flush=True)


def plot(path: Path) -> None:
    """CPU time against row length, masks, block fraction and rows; the naive step as far as it fits a few seconds."""
    from matplotlib.figure import Figure

    usual = {"length": 512, "num_masks": 8, "block_fraction": 0.25, "rows": 1}
    sweeps = {
        "length": [256, 512, 1024, 2048, 4096],
        "num_masks": [1, 2, 4, 8, 16],
        "block_fraction": [0.0625, 0.125, 0.25, 0.5, 1.0],
        "rows": [1, 2, 4, 8],
    }
    figure = Figure(figsize=(11, 2.8), layout="constrained")
    axes = figure.subplots(1, len(sweeps))
    models = {k: make_model(small_base(), k) for k in sweeps["num_masks"]}
    for axis, (name, values) in zip(axes, sweeps.items(), strict=True):
        for label, sums in (("ours", our_sums), ("naive", naive_sums)):
            points = []
            for value in values:
                size = {**usual, name: value}
                model, fraction = models[size["num_masks"]], size["block_fraction"]
                batch = make_batch(
                    int(size["rows"]), int(size["length"]), int(size["num_masks"]), VOCAB, block_fraction=fraction
                )
                positions = batch.input_ids.shape[1] + batch.mtp_labels[0].numel()
                if label == "naive" and positions > 4200:
                    break
                times = [step(model, batch, sums, None)["cpu"] for _ in range(3)]
                model.zero_grad()
                points.append((value, min(times[1:])))
                print(
                    json.dumps(
                        {"step": label, **size, "positions": len(batch.row_ids) * positions, "cpu_seconds": points[-1][1]}
                    )
                )
            axis.plot(*zip(*points, strict=True), marker="o", label=label)
        axis.set(xlabel=name, xscale="log", yscale="log", xticks=values, xticklabels=[f"{v:g}" for v in values])
        axis.minorticks_off()
    axes[0].set_ylabel("CPU seconds per step")
    axes[0].legend()
    figure.savefig(path, dpi=110)


def run() -> None:
    """The chosen measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default=None, help="folder or hub id of a base model")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=247)
    parser.add_argument("--blocks", type=int, default=32)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--naive", action="store_true")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--plot", type=Path, default=None)
    parser.add_argument("--steady", type=int, default=0)
    parser.add_argument("--every_shape", action="store_true")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.check:
        check()
    if arguments.plot is not None:
        plot(arguments.plot)
    if arguments.steady:
        steady(arguments.steady, naive_sums if arguments.naive else our_sums, arguments.every_shape)
    if arguments.base is not None:
        compare(arguments)


if __name__ == "__main__":
    run()
