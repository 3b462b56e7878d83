# SPDX-License-Identifier: Apache-2.0
"""Averages the weights of several states of one training run, and measures the result on held-out text.

    python scripts/demo_base/average.py --states early middle late --prose TALES.jsonl STORIES.txt --output base

Each later state fitted its training text better and held-out text worse; their mean was better on held-out
code and prose than any of them.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import torch
from corpus import documents
from train import perplexity
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    """Average, measure and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--states", nargs="+", type=Path, required=True, help="folders that train.py wrote")
    parser.add_argument("--prose", nargs="+", required=True, help="as for train.py")
    parser.add_argument("--code", help="as for train.py")
    parser.add_argument("--tokens", type=int, required=True, help="total tokens that the last state was trained on")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    models = [AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in args.states]
    tokenizer = AutoTokenizer.from_pretrained(args.states[-1])
    mean = models[-1].eval()
    with torch.no_grad():
        for name, parameter in mean.named_parameters():
            parameter.copy_(torch.stack([dict(model.named_parameters())[name] for model in models]).mean(0))
    mean = mean.to(torch.bfloat16)
    mean.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    mean = mean.float()
    rng = random.Random(0)
    report: dict[str, float] = {}
    for name, texts in documents(args.prose, args.code, 300, held_out=True).items():
        ids = tokenizer(rng.sample(texts, min(len(texts), 100)))["input_ids"]
        docs = [row + [tokenizer.eos_token_id] for row in ids]
        report[name] = perplexity(mean, docs, mean.config.max_position_embeddings)
    report["tokens"] = args.tokens
    (args.output / "perplexity.json").write_text(json.dumps(report, indent=1) + "\n")
    print("held-out perplexity", json.dumps(report))


if __name__ == "__main__":
    main()
