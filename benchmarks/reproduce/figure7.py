# SPDX-License-Identifier: Apache-2.0
"""The paper's figure 7: linear decoding, + quadratic decoding, + sampler head, + latent consistency.

    python benchmarks/reproduce/figure7.py --seeds 0 1 2

The paper's head and losses on the demo's base and data; acceptance length with 8 masks, greedy, on held-out prompts.
"""

from __future__ import annotations

from typing import Any

from common import MLP, OUTPUT, PROMPTS, arguments, by_name, losses, save
from matplotlib.figure import Figure
from recipe_runs import Run, decoded, mean_and_spread, run_all, train

PLAIN, SAMPLER, LCM = "base head", "+ sampler head", "+ latent consistency"
RECIPES = {
    PLAIN: ("--model.sampler_head=false", losses(sampler=False, lcm=False)),
    SAMPLER: (MLP, losses(lcm=False)),
    LCM: (MLP, losses()),
}
BARS = {"linear": (PLAIN, "linear"), "+ quadratic": (PLAIN, "quadratic")}
BARS |= {SAMPLER: (SAMPLER, "quadratic"), LCM: (LCM, "quadratic")}
PAPER = dict(zip(BARS, (2.2, 2.75, 3.05, 3.35), strict=True))
"""Read off the paper's plot."""


def measure(config: str, run: Run, prompts: int) -> dict[str, Any]:
    """The row of a run."""
    module, row = train(config, run)
    for decoding in ("linear", "quadratic"):
        row[decoding] = decoded(module, PROMPTS, prompts, decoding=decoding, max_new_tokens=64)
    return row


def main() -> None:
    """Run what is missing, print and draw."""
    args = arguments(__doc__, steps=400, prompts=24)
    runs = [
        Run(name, seed, args.steps, (*options, *args.options)) for name, options in RECIPES.items() for seed in args.seeds
    ]
    groups = by_name(run_all(OUTPUT / "figure7.jsonl", runs, lambda run: measure(args.config, run, args.prompts)))
    bars = {}
    print("| | the paper | ours | not repeating | share of reference | CPU s |\n|" + "---|" * 6)
    for name, (recipe, decoding) in BARS.items():
        group = groups[recipe]
        bars[name] = mean_and_spread([row[decoding]["acceptance_length"] for row in group])
        lengths = [row[decoding]["not_repeating"]["acceptance_length"] for row in group]
        # With few prompts all texts of a seed may repeat themselves.
        steady = "-" if None in lengths else "{:.2f} ± {:.2f}".format(*mean_and_spread(lengths))
        share = mean_and_spread([row["history"][-1]["share_of_reference"] for row in group])
        seconds = mean_and_spread([row["cpu_seconds"] for row in group])
        print(
            f"| {name} | {PAPER[name]} | {bars[name][0]:.2f} ± {bars[name][1]:.2f} | {steady}"
            f" | {share[0]:.3f} ± {share[1]:.3f} | {seconds[0]:.0f} |"
        )
    figure = Figure(figsize=(5.5, 3.4), layout="constrained")
    axis = figure.subplots()
    axis.bar(list(bars), [m for m, _ in bars.values()], yerr=[s for _, s in bars.values()], capsize=4, color="C0")
    axis.plot(list(bars), list(PAPER.values()), "D", color="0.3", label="the paper, an 8B model (read off)")
    axis.set(ylabel="acceptance length, 8 masks", ylim=(1, None))
    axis.tick_params(axis="x", labelsize=8)
    axis.legend()
    save(figure, "figure7.png")


if __name__ == "__main__":
    main()
