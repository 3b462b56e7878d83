# SPDX-License-Identifier: Apache-2.0
"""Acceptance of the two rules that verify sampled drafts, side by side.

``python benchmarks/verification.py MODEL`` samples every prompt with the same seeds by coupled verification and by
the rejection rule, with k masks, and prints the acceptance length of each by domain, at several temperatures, with
greedy decoding for comparison. Counts only; nothing is timed.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from mtp_lightning import MTPModel
from mtp_lightning.text.prompts import read_prompts

RULES: dict[str, dict[str, Any]] = {"coupled": {"verification": "coupled"}, "rejection": {"verification": "rejection"}}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--prompts", default="package://demo/prompts.jsonl")
    parser.add_argument("--num_prompts", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 0.7, 1.0])
    parser.add_argument("--top_p", type=float, default=0.9)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    model = MTPModel.from_pretrained(args.model)
    prompts = read_prompts(args.prompts, model.tokenizer, args.num_prompts)
    domains = list(dict.fromkeys(prompt.domain or "all" for prompt in prompts))
    results: list[dict[str, Any]] = []
    print(f"| temperature | verification | {' | '.join(domains)} | overall |\n|---|---|{'---|' * (len(domains) + 1)}")
    for temperature in args.temperatures:
        for name, options in ({"greedy": {}} if temperature == 0 else RULES).items():
            counts: dict[str, list[int]] = {domain: [0, 0] for domain in domains}
            for prompt in prompts:
                for seed in range(args.seeds if temperature else 1):
                    sampling = {"temperature": temperature, "top_p": args.top_p, "seed": seed} if temperature else {}
                    out = model.generate(
                        torch.tensor([prompt.input_ids]),
                        max_new_tokens=args.tokens,
                        num_masks=model.num_masks,
                        draft_candidates="all",
                        **sampling,
                        **options,
                    )
                    steps = int(out.num_steps[0])
                    counts[prompt.domain or "all"][0] += round(float(out.acceptance_length[0]) * steps)
                    counts[prompt.domain or "all"][1] += steps
            lengths = {domain: tokens / steps for domain, (tokens, steps) in counts.items()}
            total = [sum(column) for column in zip(*counts.values(), strict=True)]
            lengths["overall"] = total[0] / total[1]
            results.append({"temperature": temperature, "verification": name, "acceptance_length": lengths})
            print(f"| {temperature} | {name} | {' | '.join(f'{length:.2f}' for length in lengths.values())} |", flush=True)
    if args.output:
        args.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
