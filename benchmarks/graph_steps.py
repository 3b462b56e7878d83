# SPDX-License-Identifier: Apache-2.0
"""What a quadratic step takes over a step of one token, eager and as a graph, for random models of large shapes.

``python benchmarks/graph_steps.py --shape qwen3-4b --device cuda`` prints a Markdown table: for k masks a step feeds
(k + 1)^2 positions, verifies k drafts and draws k new ones with a GRU head; 2,048 tokens are in the cache. Eager and
graph steps alternate, and figures are medians. Nothing is decoded: a random model has no text, and time does not
depend on it.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from large_shapes import random_model, shape_arguments

from mtp_lightning.decoding.execution.decode_cache import decode_cache, rounded_slots
from mtp_lightning.decoding.execution.step import Drafts
from mtp_lightning.decoding.executor import EAGER_RUNS, CompiledExecutor, EagerExecutor, token_choice
from mtp_lightning.decoding.options import DecodingOptions
from mtp_lightning.decoding.planning.draft_plan import Plan
from mtp_lightning.decoding.row_cache import RowCache
from mtp_lightning.decoding.state import DecodeState
from mtp_lightning.model import MTPModel


@torch.inference_mode()
def measure(model: MTPModel, context: int, masks: list[int], repeats: int, graphs: bool) -> None:
    """Print the table."""
    device, options = model.base.device, DecodingOptions()
    decode_cache(model).prepare(model)
    choice = token_choice(model, options, [0])
    executors: dict[str, EagerExecutor] = {"eager": EagerExecutor(model, options, choice)}
    if graphs:
        EAGER_RUNS[device.type] = 0
        executors["graph"] = CompiledExecutor(model, options, choice)
    prompt = torch.randint(model.unembed.vocab_size, (context,), device=device)
    slots, plain = rounded_slots(context + (max(masks) + 1) ** 2), Plan(0, 0, "last")
    cache = RowCache(model.base, 1)
    cache.reserve(slots, slots)
    state = DecodeState([prompt], [slots], cache, choice)
    state.commit(plain, executors["eager"].run(plain, state))
    (row,) = state.rows
    plans = {0: plain} | {k: Plan(k, k, "all") for k in masks}
    seconds: dict[tuple[int, str], list[float]] = {}
    for number in range(repeats + 2):
        for k, plan in plans.items():
            for name, executor in executors.items():
                row.num_drafts = k
                state.drafts = Drafts(torch.randint(model.unembed.vocab_size, (1, k), device=device), None)
                begin = time.perf_counter()
                executor.run(plan, state)  # reads the tokens, so it waits for the device
                if number > 1:  # the first two compile kernels
                    seconds.setdefault((k, name), []).append(time.perf_counter() - begin)
    names = list(executors)
    print("| masks | positions | " + " | ".join(f"{name}, ms | over 1 token" for name in names) + " |")
    print("|---|---|" + "---|---|" * len(names))
    for k in plans:
        cells = []
        for name in names:
            ratios = [a / b for a, b in zip(seconds[k, name], seconds[0, name], strict=True)]
            cells += [f"{1e3 * statistics.median(seconds[k, name]):.2f}", f"{statistics.median(ratios):.2f}"]
        print(f"| {k} | {1 + k + (1 + k) * k} | " + " | ".join(cells) + " |", flush=True)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    shape_arguments(parser, "qwen3-4b", "cuda")
    parser.add_argument("--context", type=int, default=2048, help="tokens in the cache")
    parser.add_argument("--masks", type=int, nargs="+", default=list(range(1, 9)))
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--graphs", choices=["true", "false"], default="true")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    model = random_model(args.shape, args.dtype, args.device, args.rank)
    print(f"{args.shape}, {args.dtype}, {args.device}, rank {args.rank}, {args.context} tokens in the cache\n")
    measure(model, args.context, args.masks, args.repeats, args.graphs == "true")


if __name__ == "__main__":
    main()
