# SPDX-License-Identifier: Apache-2.0
"""Acceptance by the size of the draft shortlist, and the share of training labels that it covers.

``python benchmarks/draft_vocabulary.py runs/demo/checkpoints/best.ckpt`` decodes the demo's prompts with k masks and prints
the acceptance length of each domain for shortlists of several sizes, and how many texts equal autoregressive decoding. A
checkpoint without counts gets those of the first epoch of ``--config``. Counts only; nothing is timed.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
import yaml

from mtp_lightning import MTPModel
from mtp_lightning.data.collator import MaskedInputCollator
from mtp_lightning.data.loader import build_dataloader
from mtp_lightning.data.preparing import prepare
from mtp_lightning.decoding.options import DecodingOptions
from mtp_lightning.decoding.shortlist import shortlist_size
from mtp_lightning.evaluation.acceptance import evaluate_prompts, summarise
from mtp_lightning.modeling.label_counts import LabelCounts, count_labels
from mtp_lightning.text.prompts import read_prompts


def count_training_labels(model: MTPModel, config: str) -> LabelCounts:
    """Labels of the masks in an epoch of a configuration's training data."""
    data = yaml.safe_load(Path(config).read_text())["data"]
    rows = prepare(data["train"], model.tokenizer, max_length=data["max_length"])[0].rows
    collator = MaskedInputCollator(
        num_masks=model.num_masks,
        block_fraction=data.get("block_fraction", 1.0),
        max_blocks_per_row=data.get("max_blocks_per_row"),
        seed=data.get("seed", 0),
        context=model.context,
    )
    counts = torch.zeros(model.unembed.vocab_size, dtype=torch.int64)
    for batch in build_dataloader(rows, collator, data["batch_size"], seed=data.get("seed", 0)):
        count_labels(counts, batch.mtp_labels)
    return LabelCounts(counts)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--config", default="configs/demo.yaml")
    parser.add_argument("--sizes", type=int, nargs="+", default=[2048, 1536, 1280, 1024, 512, 256, 128])
    parser.add_argument("--prompts", default="package://demo/prompts.jsonl")
    parser.add_argument("--num_prompts", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    model = MTPModel.from_pretrained(args.model, dtype=args.dtype)
    counts = model.label_counts = model.label_counts or count_training_labels(model, args.config)
    vocab_size = model.unembed.vocab_size
    default_size = shortlist_size(counts, vocab_size, "auto")
    print(
        f"{int(counts.counts.sum()):,} labels; {int((counts.counts > 0).sum()):,} of {vocab_size:,} tokens occur. auto"
        f" would choose {default_size:,}: {counts.default_size:,} tokens have nearly all labels.\n"
    )
    prompts = read_prompts(args.prompts, model.tokenizer, args.num_prompts)
    results: list[dict[str, Any]] = []
    for size in args.sizes:
        options = DecodingOptions(
            num_masks=model.num_masks,
            max_new_tokens=args.tokens,
            temperature=args.temperature,
            seed=0,
            draft_vocabulary=size,
        )
        found = summarise(evaluate_prompts(model, prompts, options, num_lossless=len(prompts)))
        groups = {**found["domains"], "overall": found["overall"]}
        if not results:
            print(
                f"| tokens | labels among them | {' | '.join(groups)} | equal texts |\n|---|---|{'---|' * (len(groups) + 1)}"
            )
        share, lossless = counts.share(size), found["overall"]["lossless"]
        cells = " | ".join(f"{each['acceptance_length']:.2f}" for each in groups.values())
        print(f"| {size:,} | {share:.2%} | {cells} | {lossless['equal']}/{lossless['checked']} |", flush=True)
        results.append({"tokens": size, "share": share, **found})
    if args.output:
        args.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
