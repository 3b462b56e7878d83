# SPDX-License-Identifier: Apache-2.0
"""Time of decoding steps of random models in large shapes, and tokens a second at the paper's acceptance lengths.

    python benchmarks/large_shapes.py [--shapes qwen3-4b llama-3.1-8b] [--batches 1 8 32] [--masks 1 2 4 8]
    python benchmarks/large_shapes.py --device cpu --shapes qwen3-0.6b --batches 1 --context 512 --modes eager

For each shape and batch size it times three things with ``--context`` tokens in the cache: the base's own forward pass of
(k + 1)^2 positions, our step of one token, and our quadratic step, which feeds (k + 1)^2 positions, verifies k drafts and
draws k new ones with a GRU head; eager, and as graphs. Figures are medians. A random model rejects nearly all drafts;
the time of a step does not depend on it. Then follow the tokens a second and the speed-up that the acceptance lengths of
Samragh et al. 2025, Table 1 would give. ``--figures FILE`` also writes all of it as JSON, and a plot beside it.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from shapes import NAMED, device_name, random_base, record, wait
from transformers import DynamicCache

from mtp_lightning.decoding.loop import decode_rows
from mtp_lightning.decoding.options import DecodingOptions
from mtp_lightning.evaluation.reporting import markdown_table, new_figure, save_figure
from mtp_lightning.model import MTPModel
from mtp_lightning.modeling.base_source import is_out_of_memory
from mtp_lightning.modeling.gated_lora import LoRA
from mtp_lightning.modeling.transformers_private import cache_keyword
from mtp_lightning.sampler_heads import GRUSamplerHead

PAPER = {
    "GSM8k": [1.84, 2.58, 3.21, 3.75, 4.20, 4.60, 4.95, 5.22],
    "HumanEval": [1.86, 2.63, 3.30, 3.87, 4.40, 4.79, 5.14, 5.35],
    "AlpacaEval": [1.61, 1.97, 2.18, 2.31, 2.40, 2.45, 2.49, 2.52],
    "average": [1.67, 2.14, 2.48, 2.69, 2.88, 2.99, 3.10, 3.17],
}
"""Acceptance length for 1 to 8 masks."""
WARM_UP = 3
"""Steps that are not counted: the prompt's, an eager one, the one that makes a graph."""


@torch.inference_mode()
def forward_times(model: MTPModel, prompts: torch.Tensor, counts: list[int], repeats: int) -> dict[int, float]:
    """Seconds of the base's forward pass of each number of positions after the prompts."""
    base, device, batch = model.base, prompts.device.type, len(prompts)
    keyword, cache = cache_keyword(type(base.get_decoder())), DynamicCache(config=base.config)
    base(prompts, **{keyword: cache}, logits_to_keep=1)
    seconds: dict[int, list[float]] = {count: [] for count in counts}
    for number in range(repeats + 1):
        for count in counts:
            ids = prompts[:, :1].expand(batch, count)
            wait(device)
            begin = time.perf_counter()
            base(ids, **{keyword: cache}, logits_to_keep=1)
            wait(device)
            if number:
                seconds[count].append(time.perf_counter() - begin)
            cache.crop(-count)
    return {count: statistics.median(values) for count, values in seconds.items()}


def step_time(model: MTPModel, prompts: torch.Tensor, masks: int, compiled: bool, repeats: int) -> float:
    """Seconds of a step with this number of masks, in each of as many blocks and one more; 0: one token."""
    options = DecodingOptions(
        decoding="quadratic" if masks else "autoregressive",
        num_masks=masks or "auto",
        max_new_tokens=(WARM_UP + repeats) * (masks + 1) + 1,
        eos_token_id=[],
        compile=compiled,
    )
    seconds, begin = [], time.perf_counter()
    for _ in islice(decode_rows(model, list(prompts), options), WARM_UP + repeats):  # reads the tokens of each step
        seconds.append(time.perf_counter() - begin)
        begin = time.perf_counter()
    return statistics.median(seconds[WARM_UP:])


def measure(model: MTPModel, batch: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """All times of one batch size, in milliseconds, and what follows from them."""
    # Graphs read a cache whose size is a power of two: prompt and steps together just fill it.
    length = arguments.context - (WARM_UP + arguments.repeats + max(arguments.masks) + 1) * (max(arguments.masks) + 1) - 1
    prompts = torch.randint(model.unembed.vocab_size, (batch, length), device=model.base.device)
    masks = [0, *arguments.masks]
    forward = forward_times(model, prompts, [(k + 1) ** 2 for k in masks], arguments.repeats)
    figures: dict[str, Any] = {"forward_ms": {count: round(1e3 * value, 3) for count, value in forward.items()}}
    for mode in arguments.modes:
        steps = {k: step_time(model, prompts, k, mode == "graph", arguments.repeats) for k in masks}
        figures[f"{mode}_step_ms"] = {k: round(1e3 * value, 3) for k, value in steps.items()}
        figures[f"{mode}_projected"] = {
            text: {
                k: {
                    "tokens_per_second": round(batch * lengths[k - 1] / steps[k], 1),
                    "speed_up": round(lengths[k - 1] * steps[0] / steps[k], 2),
                }
                for k in arguments.masks
            }
            for text, lengths in PAPER.items()
        }
    weights = sum(p.numel() * p.element_size() for p in model.base.parameters())
    figures["plain_step_reads_gb_per_second"] = {
        mode: round(weights / 1e6 / figures[f"{mode}_step_ms"][0], 1) for mode in arguments.modes
    }
    return figures


def report(name: str, figures: dict[str, Any], arguments: argparse.Namespace) -> None:
    """Print the tables of one shape and batch size."""
    header = ["masks", "positions", "forward, ms", *(f"{mode} step, ms" for mode in arguments.modes)]
    rows = [
        [str(k), str((k + 1) ** 2), str(figures["forward_ms"][(k + 1) ** 2])]
        + [str(figures[f"{mode}_step_ms"][k]) for mode in arguments.modes]
        for k in [0, *arguments.masks]
    ]
    print(f"\n{name}\n\n" + "\n".join(markdown_table(header, rows)) + "\n", flush=True)
    for mode in arguments.modes:
        projected = figures[f"{mode}_projected"]
        cells = [
            [text, *(f"{by_k[k]['tokens_per_second']:,.0f} ({by_k[k]['speed_up']:.2f})" for k in arguments.masks)]
            for text, by_k in projected.items()
        ]
        print(f"tokens a second (speed-up), {mode} steps, by the paper's acceptance lengths\n")
        print("\n".join(markdown_table(["text", *(f"{k} masks" for k in arguments.masks)], cells)) + "\n", flush=True)


def plot(results: dict[str, dict[str, Any]], path: Path, modes: list[str]) -> None:
    """Step time by positions, a panel for each shape and batch size."""
    columns = min(3, len(results))
    num_rows = -(-len(results) // columns)
    figure = new_figure(4.2 * columns, 3.4 * num_rows)
    axes = figure.subplots(num_rows, columns, squeeze=False)
    for axis in axes.flat[len(results) :]:
        axis.set_visible(False)
    for axis, (name, figures) in zip(axes.flat, results.items(), strict=False):
        axis.plot(list(figures["forward_ms"]), list(figures["forward_ms"].values()), marker="o", label="forward of the base")
        for mode in modes:
            steps = figures[f"{mode}_step_ms"]
            axis.plot([(k + 1) ** 2 for k in steps], list(steps.values()), marker="s", label=f"our {mode} step")
        axis.set_title(name, fontsize=9)
        axis.set_xlabel("positions of a row")
        axis.set_ylabel("ms")
        axis.set_ylim(bottom=0)
    axes[0][0].legend(fontsize=8)
    save_figure(figure, path, dpi=100)


def main() -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", choices=NAMED, nargs="+", default=["qwen3-4b", "llama-3.1-8b"])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--masks", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--modes", choices=["eager", "graph"], nargs="+", default=["eager", "graph"])
    parser.add_argument("--context", type=int, default=2048, help="tokens in the cache, at most")
    parser.add_argument("--repeats", type=int, default=8, help="steps that are timed")
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--figures", type=Path, default=None, help="JSON file to add the figures to")
    arguments = parser.parse_args()
    results: dict[str, Any] = {}
    device = device_name(arguments.device)
    print(f"{device}, torch {torch.__version__}, {arguments.dtype}, rank {arguments.rank}", flush=True)
    for shape in arguments.shapes:
        base = random_base(shape, getattr(torch, arguments.dtype), arguments.device)
        model = MTPModel(base.eval(), max(arguments.masks), LoRA(rank=arguments.rank), GRUSamplerHead()).eval()
        for batch in arguments.batches:
            name = f"{shape}, batch {batch}"
            try:
                results[name] = measure(model, batch, arguments)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                print(f"{name}: out of memory", flush=True)
                continue
            finally:
                model.clear_decode_cache()
            report(name, results[name], arguments)
            record(arguments.figures, "decoding", {"device": device, **results})
            if arguments.figures is not None:
                plot(results, arguments.figures.with_name("decoding.png"), arguments.modes)
        del model, base
        gc.collect()
        if arguments.device == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
