# SPDX-License-Identifier: Apache-2.0
"""Time of a decoding step against the positions it feeds, next to transformers' forward pass and the memory's limit.

``python benchmarks/step_time.py BASE`` (a folder, hub id or GGUF file) or ``--shape qwen3-0.6b`` (random weights). Adapters
and sampler head are random, so drafts are rejected; what a step costs does not depend on that. Columns, in milliseconds:

* forward: transformers' decoder over n positions with a cache, and the unembedding of the k + 1 that a step verifies;
* step: everything between two yields of ``decode_rows`` with k masks, n = (k + 1)^2 positions, drafts included;
* without head: the same with drafts from the base's head (``sampler_head=False``), so without the sampler head's chain;
* compiled: the step with ``compile=True`` (``--compile``; a minute or more for each shape on a CPU).

All are interleaved, round by round; the ratios are medians over the rounds with their quartiles. The limit is the time that
reading the base's weights once takes at the bandwidth measured here. Writes ``step_time.json`` and ``step_time.png``.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from shapes import NAMED, random_base
from transformers import DynamicCache, PreTrainedModel

from mtp_lightning.decoding.loop import decode_rows
from mtp_lightning.decoding.options import DecodingOptions
from mtp_lightning.model import MTPModel
from mtp_lightning.modeling.base import load_base
from mtp_lightning.modeling.gated_lora import LoRA
from mtp_lightning.modeling.transformers_private import cache_keyword
from mtp_lightning.sampler_heads import GRUSamplerHead


def seconds(call: Callable[[], object]) -> float:
    """The time of a call."""
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def read_seconds(num_bytes: int) -> float:
    """The time that reading this many bytes takes, at the bandwidth of summing a buffer that no cache holds."""
    buffer = torch.ones(1 << 26, dtype=torch.int64)
    fastest = min(seconds(buffer.sum) for _ in range(5))
    return fastest * num_bytes / (buffer.numel() * 8)


class Forward:
    """Transformers' forward pass over n positions, repeated over the same cached context."""

    def __init__(self, base: PreTrainedModel, context: torch.Tensor, num_positions: int, num_logits: int) -> None:
        self.base, self.num_logits, self.cache = base, num_logits, DynamicCache()
        self.named: dict[str, Any] = {cache_keyword(type(base.get_decoder())): self.cache}
        base(context, logits_to_keep=1, **self.named)
        B, length = context.shape
        self.tokens = context[:, :1].expand(-1, num_positions)
        self.positions = torch.arange(length, length + num_positions)[None].expand(B, -1)
        self.mask = torch.ones(B, 1, num_positions, length + num_positions, dtype=torch.bool) if num_positions > 1 else None

    def __call__(self) -> None:
        """One pass."""
        out = self.base(
            self.tokens,
            attention_mask=self.mask,
            position_ids=self.positions,
            logits_to_keep=self.num_logits,
            **self.named,
        )
        out.logits.argmax(-1).tolist()
        self.cache.crop(-self.tokens.shape[1])


def steps(model: MTPModel, prompts: torch.Tensor, masks: int, warm_up: int, rounds: int, **options: Any) -> Iterator[object]:
    """Full steps with this number of masks; 0: plain ones. After ``warm_up`` of them ``rounds`` are left."""
    kind = {"decoding": "autoregressive"} if masks == 0 else {"num_masks": masks}
    most = (warm_up + rounds) * (masks + 1)  # no more: compiled steps read the slots of all tokens that there may be
    made = decode_rows(model, list(prompts), DecodingOptions(eos_token_id=[], max_new_tokens=most, **kind, **options))
    for _ in range(warm_up):
        next(made)
    return made


@torch.inference_mode()
def measure(model: MTPModel, plain: PreTrainedModel, args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row of times for each number of masks."""
    torch.manual_seed(0)
    prompts = torch.randint(3, 1000, (args.batch_size, args.context))
    rows = []
    for masks in args.masks:
        calls: dict[str, Callable[[], object]] = {
            "forward": Forward(plain, prompts, (masks + 1) ** 2, masks + 1),
            "step": steps(model, prompts, masks, 4, args.rounds).__next__,
        }
        if masks:
            calls["without head"] = steps(model, prompts, masks, 4, args.rounds, sampler_head=False).__next__
        if args.compile:
            calls["compiled"] = steps(model, prompts, masks, 12, args.rounds, compile=True).__next__
        calls["forward"]()
        times = {name: [] for name in calls}
        for _ in range(args.rounds):
            for name, call in calls.items():
                times[name].append(seconds(call))
        rows.append({"masks": masks, "positions": (masks + 1) ** 2, "seconds": times})
    return rows


def table(rows: list[dict[str, Any]], limit: float) -> str:
    """The times as Markdown."""
    names = list(rows[-1]["seconds"])
    lines = [f"| masks | positions | {' | '.join(names)} | step over forward |", "|---" * (len(names) + 3) + "|"]
    for row in rows:
        cells = [f"{1e3 * statistics.median(row['seconds'][name]):.1f}" if name in row["seconds"] else "" for name in names]
        ratios = [a / b for a, b in zip(row["seconds"]["step"], row["seconds"]["forward"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        lines.append(
            f"| {row['masks']} | {row['positions']} | {' | '.join(cells)} | {middle:.2f} ({low:.2f} to {high:.2f}) |"
        )
    return "\n".join([*lines, "", f"Reading the base's weights once: {1e3 * limit:.1f} ms."])


def plot(rows: list[dict[str, Any]], limit: float, title: str, path: Path) -> None:
    """Times against positions, with the memory's limit."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for name in rows[-1]["seconds"]:
        points = [(r["positions"], 1e3 * statistics.median(r["seconds"][name])) for r in rows if name in r["seconds"]]
        axes.plot(*zip(*points, strict=True), marker="o", label=name)
    axes.axhline(1e3 * limit, color="gray", linestyle="--", label="reading the weights once")
    axes.set(xlabel="positions a row", ylabel="milliseconds", title=title, ylim=(0, None))
    axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base", nargs="?", help="folder, hub id or GGUF file of a base model")
    parser.add_argument("--shape", choices=NAMED, help="random weights of this shape instead")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--context", type=int, default=200, help="tokens before the first step")
    parser.add_argument("--masks", type=int, nargs="+", default=[0, 1, 2, 4, 6, 8])
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--output", type=Path, default=Path("."))
    args = parser.parse_args()
    if (args.base is None) == (args.shape is None):
        parser.error("give a base or --shape")
    torch.set_num_threads(args.threads)
    dtype = getattr(torch, args.dtype)
    base = load_base(args.base, dtype=args.dtype) if args.base else random_base(args.shape, dtype, "cpu")
    plain = copy.deepcopy(base)  # without adapters
    width = base.config.get_text_config().hidden_size
    model = MTPModel(base.eval(), 8, LoRA(rank=args.rank), GRUSamplerHead(hidden_size=width, read_hidden=True)).eval()
    limit = read_seconds(sum(p.numel() * p.element_size() for p in plain.parameters()))
    rows = measure(model, plain, args)
    title = (
        f"{args.base or args.shape}, {args.dtype}, batch {args.batch_size}, {args.context} tokens, {args.threads} threads"
    )
    print(f"{title}\n\n{table(rows, limit)}", flush=True)
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "step_time.json").write_text(json.dumps({"title": title, "limit": limit, "rows": rows}))
    plot(rows, limit, title, args.output / "step_time.png")


if __name__ == "__main__":
    main()
