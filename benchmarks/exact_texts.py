# SPDX-License-Identifier: Apache-2.0
"""Speculative against plain text on a real model: how many texts are equal, with ``exact`` and without, and its cost.

``python benchmarks/exact_texts.py MODEL --prompts F.jsonl`` decodes each batch of prompts in several ways, interleaved:
plain, with a fixed number of masks and with ``auto``, each by default and with ``exact``. Prints a Markdown table. A text
is equal if all its tokens are those of plain decoding in the same way (exact or not). Seconds are of all texts together.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from typing import Any

import torch

from mtp_lightning import MTPModel
from mtp_lightning.text.prompts import read_prompts

WAYS: dict[str, dict[str, Any]] = {
    "plain": {"decoding": "autoregressive"},
    "fixed": {"decoding": "quadratic"},
    "auto": {"num_masks": "auto"},
}


def main() -> None:
    """Decode and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="checkpoint or saved folder")
    parser.add_argument("--prompts", required=True)
    parser.add_argument("--num_prompts", type=int, default=100)
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--masks", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="in addition to plain")
    args = parser.parse_args()
    ways = list(dict.fromkeys(["plain", *args.ways]))
    torch.set_num_threads(args.threads)
    model = MTPModel.from_pretrained(args.model, dtype=args.dtype)
    prompts = [torch.tensor(prompt.input_ids) for prompt in read_prompts(args.prompts, model.tokenizer, args.num_prompts)]
    seconds = {(way, exact): 0.0 for exact in (False, True) for way in ways}
    equal, steps = dict.fromkeys(seconds, 0), dict.fromkeys(seconds, 0)
    for begin in range(0, len(prompts), args.batch_size):
        rows = prompts[begin : begin + args.batch_size]
        pad = torch.nn.utils.rnn.pad_sequence
        ids = pad(rows, batch_first=True, padding_side="left")
        mask = pad([torch.ones_like(row) for row in rows], batch_first=True, padding_side="left")
        texts = {}
        for exact, way in itertools.product((False, True), ways):
            options = {"num_masks": args.masks, "exact": exact, **WAYS[way]}
            start = time.perf_counter()
            out = model.generate(ids, mask, max_new_tokens=args.tokens, **options)
            seconds[way, exact] += time.perf_counter() - start
            steps[way, exact] += int(out.num_steps.sum())
            counts = (out.acceptance_length * out.num_steps).round().int().tolist()
            texts[way, exact] = [
                out.sequences[r, len(row) : len(row) + count].tolist()
                for r, (row, count) in enumerate(zip(rows, counts, strict=True))
            ]
            equal[way, exact] += sum(a == b for a, b in zip(texts[way, exact], texts["plain", exact], strict=True))
        print(f"{min(begin + args.batch_size, len(prompts))} of {len(prompts)}", file=sys.stderr, flush=True)
    print("| way | texts equal to plain | steps | seconds | over plain | over plain by default |\n|---|---|---|---|---|---|")
    for (way, exact), time_taken in seconds.items():
        ratios = [seconds["plain", exact] / time_taken, seconds["plain", False] / time_taken]
        name = f"{way}, exact" if exact else way
        cells = [
            f"{equal[way, exact]} of {len(prompts)}",
            steps[way, exact],
            f"{time_taken:.0f}",
            *(f"{r:.2f}" for r in ratios),
        ]
        print(f"| {name} | {' | '.join(map(str, cells))} |")


if __name__ == "__main__":
    main()
