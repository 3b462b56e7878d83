# SPDX-License-Identifier: Apache-2.0
"""The paper's figure 8: acceptance length by rank of the LoRA, with and without sampler head, and memory.

    python benchmarks/reproduce/figure8.py --seeds 0 1 2 --ranks 1 4 16 64 256

The paper's head and losses on the demo's base and data. Memory: trained weights over the base's, at equal precision.
"""

from __future__ import annotations

from typing import Any

from common import MLP, OUTPUT, PROMPTS, arguments, by_name, losses, save
from matplotlib.figure import Figure
from recipe_runs import Run, decoded, mean_and_spread, run_all, train

HEADS = {"with sampler head": (MLP, losses()), "base head": ("--model.sampler_head=false", losses(sampler=False))}


def measure(config: str, run: Run, prompts: int) -> dict[str, Any]:
    """The row of a run."""
    module, row = train(config, run)
    row["quadratic"] = decoded(module, PROMPTS, prompts, max_new_tokens=64)
    row["memory"] = round(row["trained_parameters"] / sum(p.numel() for p in module.parameters() if not p.requires_grad), 5)
    return row


def main() -> None:
    """Run what is missing, print and draw."""
    args = arguments(__doc__, steps=400, prompts=24, ranks=[1, 2, 4, 8, 16, 32, 64, 128, 256, 512])
    runs = [
        Run(f"{name}, rank {rank}", seed, args.steps, (*options, f"--model.lora.rank={rank}", *args.options))
        for name, options in HEADS.items()
        for rank in args.ranks
        for seed in args.seeds
    ]
    groups = by_name(run_all(OUTPUT / "figure8.jsonl", runs, lambda run: measure(args.config, run, args.prompts)))
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    print("| | acceptance length | share of reference | memory | CPU s |\n|" + "---|" * 5)
    for name in HEADS:
        lengths, memory = [], []
        for rank in args.ranks:
            group = groups[f"{name}, rank {rank}"]
            lengths.append(mean_and_spread([row["quadratic"]["acceptance_length"] for row in group]))
            memory.append(100 * group[0]["memory"])
            share = mean_and_spread([row["history"][-1]["share_of_reference"] for row in group])
            seconds = mean_and_spread([row["cpu_seconds"] for row in group])
            print(
                f"| {name}, rank {rank} | {lengths[-1][0]:.2f} ± {lengths[-1][1]:.2f} | {share[0]:.3f} ± {share[1]:.3f}"
                f" | {memory[-1]:.1f} % | {seconds[0]:.0f} |"
            )
        left.errorbar(args.ranks, [m for m, _ in lengths], yerr=[s for _, s in lengths], marker="o", capsize=3, label=name)
        right.plot(args.ranks, memory, marker="o", label=name)
    left.set(xscale="log", xlabel="rank", ylabel="acceptance length, 8 masks")
    right.set(xscale="log", yscale="log", xlabel="rank", ylabel="trained weights, % of the base")
    left.legend()
    save(figure, "figure8.png")


if __name__ == "__main__":
    main()
