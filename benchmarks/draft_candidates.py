# SPDX-License-Identifier: Apache-2.0
"""Acceptance length and cost of a draft token by the number of candidates that the sampler head chooses from.

``python benchmarks/draft_candidates.py CHECKPOINT`` decodes prompts with a fixed number of masks, greedily and at
temperature 1, and prints a Markdown table: for each number of candidates the time of a draft token (that of a block's
draft over its length, calls interleaved, median), the acceptance length, and how many texts equal autoregressive
decoding. Prompts are decoded as one batch.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from mtp_lightning import MTPModel
from mtp_lightning.decoding.execution.decode_cache import decode_cache
from mtp_lightning.decoding.execution.decoding_mode import DecodingMode
from mtp_lightning.decoding.execution.step import draft_block
from mtp_lightning.decoding.executor import token_choice
from mtp_lightning.decoding.options import DecodingOptions
from mtp_lightning.evaluation.decoded_text import decode_batch
from mtp_lightning.evaluation.reporting import markdown_table, new_figure, save_figure, save_json
from mtp_lightning.text.prompts import read_prompts


@torch.inference_mode()
def draft_seconds(model: MTPModel, candidates: list[Any], masks: int, rounds: int) -> list[float]:
    """Seconds of a draft token of one row, for each number of candidates; drafted greedily from random hidden states."""
    decode_cache(model).prepare(model)
    device, width = model.base.device, model.mask_embeddings.shape[1]
    hidden = torch.randn(1, masks, width, device=device).to(model.base.dtype)
    zero = torch.zeros(1, dtype=torch.int64, device=device)
    choices = [token_choice(model, DecodingOptions(draft_candidates=count), [0]) for count in candidates]
    seconds: list[list[float]] = [[] for _ in choices]
    with DecodingMode(model).active():
        for _ in range(rounds + 1):
            for choice, found in zip(choices, seconds, strict=True):
                begin = time.perf_counter()
                draft_block(model, hidden, zero, zero, choice, True).tokens.tolist()
                found.append(time.perf_counter() - begin)
    return [statistics.median(found[1:]) / masks for found in seconds]


def acceptance(model: MTPModel, prompts: Any, options: DecodingOptions, expected: list[list[int]]) -> tuple[float, int]:
    """Acceptance length over all prompts, and how many texts are the expected ones."""
    texts, _ = decode_batch(model, prompts, options)
    steps = sum(len(text.accepted) for text in texts)
    equal = sum(text.tokens == other for text, other in zip(texts, expected, strict=True))
    return sum(len(text.tokens) for text in texts) / steps, equal


def save_plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Acceptance length and cost of a draft token, by candidates."""
    figure = new_figure(9, 3.5)
    left, right = figure.subplots(1, 2)
    names = [str(row["candidates"]) for row in rows]
    for temperature in rows[0]["acceptance_length"]:
        left.plot(names, [row["acceptance_length"][temperature] for row in rows], "o-", label=f"temperature {temperature}")
    right.plot(names, [row["draft_token_ms"] for row in rows], "o-")
    left.set(xlabel="candidates", ylabel="acceptance length")
    left.legend()
    right.set(xlabel="candidates", ylabel="ms per draft token", ylim=(0, None))
    save_figure(figure, path, dpi=120)


def main() -> None:
    """Print the table; write it as JSON and as a plot if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint")
    parser.add_argument("--candidates", nargs="+", default=["all", "256", "64", "16", "4", "1"])
    parser.add_argument("--masks", type=int, default=4)
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 1.0])
    parser.add_argument("--prompts", default="package://demo/prompts.jsonl")
    parser.add_argument("--num_prompts", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--dtype", default="float32", help="dtype of the texts; float64: exact")
    parser.add_argument("--timed_dtype", default="bfloat16", help="dtype in which drafting is timed")
    parser.add_argument("--rounds", type=int, default=15, help="timed drafts of each number of candidates")
    parser.add_argument("--output", type=Path, help="a JSON file; the plot is written next to it")
    args = parser.parse_args()
    candidates: list[Any] = [each if each == "all" else int(each) for each in args.candidates]
    rows: list[dict[str, Any]] = [{"candidates": count, "acceptance_length": {}, "equal": {}} for count in candidates]

    timed = MTPModel.from_pretrained(args.checkpoint, dtype=args.timed_dtype)
    for row, seconds in zip(rows, draft_seconds(timed, candidates, args.masks, args.rounds), strict=True):
        row["draft_token_ms"] = 1e3 * seconds
    del timed
    model = MTPModel.from_pretrained(args.checkpoint, dtype=args.dtype)
    prompts = read_prompts(args.prompts, model.tokenizer, args.num_prompts)
    for temperature in args.temperatures:
        common: dict[str, Any] = {"max_new_tokens": args.tokens, "temperature": temperature, "seed": 0}
        texts, _ = decode_batch(model, prompts, DecodingOptions("autoregressive", **common))
        for row in rows:
            options = DecodingOptions(num_masks=args.masks, draft_candidates=row["candidates"], **common)
            found = acceptance(model, prompts, options, [text.tokens for text in texts])
            row["acceptance_length"][temperature], row["equal"][temperature] = found

    header = ["candidates", "ms per draft token"]
    for temperature in args.temperatures:
        header += [f"temperature {temperature:g}", "equal texts"]
    cells = [[str(row["candidates"]), f"{row['draft_token_ms']:.2f}"] for row in rows]
    for row, line in zip(rows, cells, strict=True):
        for temperature in args.temperatures:
            line += [f"{row['acceptance_length'][temperature]:.3f}", f"{row['equal'][temperature]}/{len(prompts)}"]
    print("\n".join(markdown_table(header, cells)))
    if args.output:
        save_json(rows, args.output)
        save_plot(rows, args.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
