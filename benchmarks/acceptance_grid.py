# SPDX-License-Identifier: Apache-2.0
"""Acceptance length for 1..k masks, both decodings, with and without the sampler head, on held-out prompts.

    python benchmarks/acceptance_grid.py runs/demo/checkpoints/best.ckpt

Prints the layout of the paper's Table 1, the share of prompts on which more masks, or quadratic instead of linear, gave a
lower acceptance length, and whether every text was the autoregressive one. Writes a JSON file and a plot beside the
checkpoint.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path
from typing import Any

import torch

from mtp_lightning import MTPModel
from mtp_lightning.metrics.functional import repeated_ngrams
from mtp_lightning.prompts import read_prompts


def lengths(rows: list[dict[str, Any]], domain: str | None) -> float:
    """Tokens over steps of the prompts of a domain, or of all."""
    chosen = [row for row in rows if domain in (None, row["domain"])]
    return sum(row["tokens"] for row in chosen) / sum(row["steps"] for row in chosen)


def lower(worse: list[dict[str, Any]], better: list[dict[str, Any]]) -> float:
    """Share of prompts where the setting that should be ahead is behind."""
    pairs = list(zip(worse, better, strict=True))
    return sum(b["tokens"] / b["steps"] < w["tokens"] / w["steps"] - 1e-9 for w, b in pairs) / len(pairs)


def plot(means: dict[str, dict[str, list[float]]], path: Path) -> None:
    """Acceptance length against the number of masks, one panel a domain."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    domains = list(next(iter(means.values())))
    figure, axes = pyplot.subplots(1, len(domains), figsize=(3.4 * len(domains), 3.4), sharey=True, layout="constrained")
    for axis, domain in zip(axes, domains, strict=True):
        for name, rows in means.items():
            axis.plot(range(1, len(rows[domain]) + 1), rows[domain], marker="o", markersize=3, label=name)
        axis.set_title(domain)
        axis.set_xlabel("masks in a block")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("acceptance length (tokens a step)")
    axes[-1].legend(fontsize=8)
    figure.savefig(path, dpi=130)


def main() -> None:
    """Decode the grid."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--prompts", default="package://demo/prompts.jsonl")
    parser.add_argument("--num_prompts", type=int, default=30)
    parser.add_argument("--max_new_tokens", type=int, default=96)
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    model = MTPModel.from_pretrained(args.model, dtype=args.dtype)
    prompts = read_prompts(args.prompts, model.tokenizer, args.num_prompts)
    domains = list(dict.fromkeys(prompt.domain for prompt in prompts))
    reference = []
    for prompt in prompts:
        ids = torch.tensor([prompt.input_ids])
        out = model.generate(ids, max_new_tokens=args.max_new_tokens, decoding="autoregressive")
        reference.append(out.sequences[0].tolist())
    repeats = [repeated_ngrams(text[len(p.input_ids) :]) for text, p in zip(reference, prompts, strict=True)]
    print(f"{len(prompts)} prompts, mean share of repeated 8-grams {sum(repeats) / len(repeats):.3f}", flush=True)

    heads = [True, False] if model.sampler_head is not None else [False]
    results: dict[str, list[list[dict[str, Any]]]] = {}
    different = 0
    for decoding, head in itertools.product(("quadratic", "linear"), heads):
        name = f"{decoding}, {'sampler head' if head else 'base head'}"
        results[name] = []
        for masks in range(1, model.num_masks + 1):
            rows = []
            for prompt, expected in zip(prompts, reference, strict=True):
                out = model.generate(
                    torch.tensor([prompt.input_ids]),
                    max_new_tokens=args.max_new_tokens,
                    decoding=decoding,
                    num_masks=masks,
                    sampler_head=head,
                )
                different += out.sequences[0].tolist() != expected
                accepted = out.accepted_per_step[0]
                rows.append({"domain": prompt.domain, "tokens": sum(accepted) + len(accepted), "steps": len(accepted)})
            results[name].append(rows)
            print(f"{name}, {masks} masks: {lengths(rows, None):.3f}", flush=True)

    means = {
        name: {(domain or "all"): [lengths(rows, domain) for rows in grid] for domain in [None, *domains]}
        for name, grid in results.items()
    }
    print("\n| decoding, draft | domain | " + " | ".join(str(j + 1) for j in range(model.num_masks)) + " |")
    print("|---|---|" + "---|" * model.num_masks)
    for name, by_domain in means.items():
        for domain, values in by_domain.items():
            print(f"| {name} | {domain} | " + " | ".join(f"{value:.2f}" for value in values) + " |")
    print()
    orders = {}
    for name, grid in results.items():
        orders[f"{name}: one mask more is lower"] = [lower(a, b) for a, b in itertools.pairwise(grid)]
    for head in heads:
        suffix = "sampler head" if head else "base head"
        orders[f"quadratic below linear, {suffix}"] = [
            lower(a, b) for a, b in zip(results[f"linear, {suffix}"], results[f"quadratic, {suffix}"], strict=True)
        ]
    for name, shares in orders.items():
        print(f"share of prompts, {name}: " + ", ".join(f"{value:.2f}" for value in shares))
    total = len(prompts) * len(results) * model.num_masks
    print(f"texts that differ from autoregressive decoding in {args.dtype}: {different} of {total}")
    folder = Path(args.model).parent
    report = {"means": means, "orders": orders, "different": different, "texts": total, "repeated_8grams": repeats}
    (folder / "acceptance_grid.json").write_text(json.dumps(report, indent=1) + "\n")
    plot(means, folder / "acceptance_grid.png")


if __name__ == "__main__":
    main()
