# SPDX-License-Identifier: Apache-2.0
"""Step time by positions for random models of large shapes, and the projected speed-up with the paper's acceptance.

``python benchmarks/large_shapes.py --shape qwen3-0.6b`` prints the measured curve and two projections for each
benchmark of the paper's Table 1: quadratic decoding with k masks, whose step feeds (k + 1)^2 positions, and budgeted
drafting. The chance that the first j drafts are accepted is what the j-th mask added to the acceptance length there;
drafts are simulated with these chances and planned by the planner of decoding. Nothing is decoded: a random model has
no text. The acceptance that ``--draft_candidates`` may lose is ignored.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from shapes import NAMED, random_base

from mtp_lightning.decoding.execution.calibration import measure_step_costs
from mtp_lightning.decoding.execution.decode_cache import decode_cache
from mtp_lightning.decoding.execution.decoding_mode import DecodingMode
from mtp_lightning.decoding.executor import token_choice
from mtp_lightning.decoding.options import DecodingOptions
from mtp_lightning.decoding.planning.budget import Budget
from mtp_lightning.decoding.planning.draft_plan import plan_positions
from mtp_lightning.decoding.planning.draft_stats import DraftStats, RowOutcome
from mtp_lightning.decoding.planning.step_costs import StepCosts
from mtp_lightning.model import MTPModel
from mtp_lightning.modeling.gated_lora import LoRA
from mtp_lightning.sampler_heads import GRUSamplerHead

PAPER = {
    "MMLU": [1.54, 1.87, 2.06, 2.18, 2.26, 2.32, 2.36, 2.38],
    "PopQA": [1.48, 1.69, 1.80, 1.85, 1.88, 1.90, 1.91, 1.91],
    "TruthfulQA": [1.55, 1.84, 2.00, 2.08, 2.13, 2.16, 2.18, 2.19],
    "GSM8k": [1.84, 2.58, 3.21, 3.75, 4.20, 4.60, 4.95, 5.22],
    "HumanEval": [1.86, 2.63, 3.30, 3.87, 4.40, 4.79, 5.14, 5.35],
    "AlpacaEval": [1.61, 1.97, 2.18, 2.31, 2.40, 2.45, 2.49, 2.52],
    "IFEval": [1.55, 1.86, 2.05, 2.16, 2.24, 2.30, 2.36, 2.39],
    "XSTest": [1.70, 2.11, 2.38, 2.52, 2.67, 2.73, 2.76, 2.79],
    "HarmBench": [1.78, 2.35, 2.76, 2.99, 3.28, 3.39, 3.45, 3.51],
    "average": [1.67, 2.14, 2.48, 2.69, 2.88, 2.99, 3.10, 3.17],
}
"""Acceptance length for 1..8 masks (Samragh et al. 2025, Table 1)."""


def random_model(shape: str, dtype: str, device: str, rank: int) -> MTPModel:
    """A model of 8 masks with a GRU head on a random base."""
    base = random_base(shape, getattr(torch, dtype), device, tie_word_embeddings=False)
    return MTPModel(base.eval(), 8, LoRA(rank=rank), GRUSamplerHead()).eval()


def chances(lengths: list[float]) -> np.ndarray:
    """Chance that draft j is accepted given that the ones before are, [8]."""
    reached = np.diff([0.0, 1.0, *lengths])[1:]
    return np.clip(reached / np.concatenate([[1.0], reached[:-1]]), 0.0, 1.0)


def fixed(costs: StepCosts, lengths: list[float], masks: int) -> float:
    """Projected speed-up of quadratic decoding."""
    curve = costs.curve((masks + 1) ** 2)
    step = curve[(masks + 1) ** 2] + masks * (costs.per_verified + costs.per_draft) + costs.draft_start
    return float(lengths[masks - 1] * curve[1] / step)


def budgeted(costs: StepCosts, lengths: list[float], steps: int = 1500, seed: int = 0) -> tuple[float, float]:
    """Projected speed-up and acceptance length of budgeted drafting. The head's probabilities are these chances."""
    generator, chance = np.random.default_rng(seed), chances(lengths)
    budget = Budget(costs, DraftStats(8), 8, 1, True, True, timed=False)
    tokens, seconds, waiting = 0, 0.0, 0
    for number in range(steps):
        plan = budget.choose(8, [waiting])
        kept, drafted = 0, min(plan.num_drafts, waiting)
        while kept < drafted and generator.uniform() < chance[kept]:
            kept += 1
        waiting = dict(plan.blocks(drafted)).get(kept, 0)
        budget.learn([RowOutcome(kept, drafted, waiting, chance.tolist())])
        if number >= steps // 5:  # once the planner knows the text
            tokens += kept + 1
            seconds += budget.costs.plan(plan, plan.masks)
    return tokens / seconds * float(costs.curve(1)[1]), tokens / (steps - steps // 5)


def shape_arguments(parser: argparse.ArgumentParser, shape: str, device: str) -> None:
    """Add the arguments that choose the random model, with these defaults."""
    parser.add_argument("--shape", choices=NAMED, default=shape)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default=device)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--rank", type=int, default=128)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    shape_arguments(parser, "qwen3-0.6b", "cpu")
    parser.add_argument("--draft_candidates", type=int, default=64, help="candidates for a draft token; 0: all tokens")
    parser.add_argument("--repeats", type=int, default=5, help="measurements; the curve is their minimum")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    model = random_model(args.shape, args.dtype, args.device, args.rank)
    options = DecodingOptions(draft_candidates=args.draft_candidates or "all")
    measured = []
    decode_cache(model).prepare(model)
    choice = token_choice(model, options, [0])
    with torch.inference_mode(), DecodingMode(model).active():
        for _ in range(args.repeats):
            measured.append(measure_step_costs(model, choice, plan_positions(8)))
    positions = max((costs.positions for costs in measured), key=len)
    fastest = [min(each.seconds[each.positions.index(n)] for each in measured if n in each.positions) for n in positions]
    parts = [min(getattr(each, name) for each in measured) for name in ("per_verified", "per_draft", "draft_start")]
    costs = StepCosts(positions, tuple(fastest), *parts)
    print(f"{args.shape}, {args.dtype}, {args.device}, {torch.get_num_threads()} threads, rank {args.rank}\n")
    print("| positions | ms | over 1 position |\n|---|---|---|")
    for n, seconds in zip(costs.positions, costs.seconds, strict=True):
        print(f"| {n} | {1e3 * seconds:.1f} | {seconds / costs.seconds[0]:.2f} |")
    candidates = choice.num_candidates or model.unembed.vocab_size
    print(
        f"\none draft token, of {candidates:,}: {1e3 * costs.per_draft:.2f} ms;"
        f" one more verified: {1e3 * costs.per_verified:.2f} ms; start of a draft: {1e3 * costs.draft_start:.2f} ms\n"
    )
    print("| benchmark | " + " | ".join(f"{k}" for k in range(1, 9)) + " | auto (acceptance length) |\n|---|" + "---|" * 9)
    for name, lengths in PAPER.items():
        speed, length = budgeted(costs, lengths)
        cells = " | ".join(f"{fixed(costs, lengths, k):.2f}" for k in range(1, 9))
        print(f"| {name} | {cells} | {speed:.2f} ({length:.2f}) |")


if __name__ == "__main__":
    main()
