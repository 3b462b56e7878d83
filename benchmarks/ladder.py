# SPDX-License-Identifier: Apache-2.0
"""The ladder of recipes: from the paper's upwards, one ingredient at a time, on the demo's base and data.

    python benchmarks/ladder.py --rungs screen --steps 200
    python benchmarks/ladder.py --rungs "today" "winner" --cpu_seconds 600 --seeds 0 1 2 --prompts 24

Each rung is a list of options of ``mtp fit --config configs/demo.yaml`` that a user could type. Rows go to ``--rows``, a
JSON line a run; a run that has its row is not repeated. With ``--cpu_seconds`` each rung trains for as many steps as it
takes on this machine in that time, measured over its first steps. Prints a table and draws a plot.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from recipe_runs import Run, decoded, mean_and_spread, run_all, train

PROMPTS = "package://demo/prompts.jsonl"
LOSSES = "mtp_lightning.losses."
LCM = f"lcm: {{class_path: {LOSSES}LatentConsistency}}"


def losses(base: str, sampler: str, lcm: str = LCM) -> str:
    """The option that sets the terms."""
    return f"--model.losses={{base: {base}, sampler: {sampler}, {lcm}}}"


def anchors(head: str, weight: float = 1.0, target: str = "distribution") -> str:
    """The term AnchorDistillation."""
    options = f"{{head: {head}, weight: {weight}, target: {target}}}"
    return f"{{class_path: {LOSSES}AnchorDistillation, init_args: {options}}}"


def cross_entropy(head: str) -> str:
    """The cross-entropy to the text."""
    return f"{{class_path: {LOSSES}{head.title()}CrossEntropy}}"


def gru(width: int, read_hidden: bool) -> str:
    """The GRU head."""
    options = f"{{hidden_size: {width}, read_hidden: {str(read_hidden).lower()}}}"
    return f"--model.sampler_head={{class_path: mtp_lightning.sampler_heads.GRUSamplerHead, init_args: {options}}}"


def adamw(lr: float = 0.003, betas: str = "[0.9, 0.98]", decay: float = 0.01) -> str:
    """The optimizer."""
    return f"--model.optimizer={{class_path: torch.optim.AdamW, init_args: {{lr: {lr}, betas: {betas}, weight_decay: {decay}}}}}"


def cosine(warmup: int = 30, floor: float = 0.02) -> str:
    """The schedule."""
    options = f"{{warmup_steps: {warmup}, floor: {floor}}}"
    return f"--model.lr_scheduler={{class_path: mtp_lightning.schedules.WarmupCosine, init_args: {options}}}"


def batches(rows: int, blocks: int) -> tuple[str, str]:
    """Rows of a batch and blocks of a row."""
    return f"--data.batch_size={rows}", f"--data.max_blocks_per_row={blocks}"


MLP = "--model.sampler_head=mtp_lightning.sampler_heads.MLPSamplerHead"
TO_TEXT = losses(cross_entropy("base"), cross_entropy("sampler"))
TO_ANCHORS = losses(anchors("base"), anchors("sampler"))
TRAINING = (adamw(), cosine(), *batches(4, 16), "--model.lora.rank=32", "--model.lora.alpha=null")
TODAY = (*TRAINING, gru(512, True), TO_ANCHORS)

LADDER: dict[str, tuple[str, ...]] = {
    "paper": (*TRAINING, MLP, TO_TEXT),
    "paper + GRU head": (*TRAINING, gru(256, False), TO_TEXT),
    "+ anchor distribution": (*TRAINING, gru(256, False), TO_ANCHORS),
    "today (+ head of 512 reads z)": TODAY,
}
SCREEN: dict[str, tuple[str, ...]] = {
    "bf16-mixed": (*TODAY, "--trainer.precision=bf16-mixed"),
    "lr 6e-3": (*TODAY, adamw(0.006)),
    "sampler loss alone": (*TODAY, losses(anchors("base", 0.0), anchors("sampler"), "")),
    "base loss 0.2, LCM 0.2": (
        *TODAY,
        losses(
            anchors("base", 0.2),
            anchors("sampler"),
            f"lcm: {{class_path: {LOSSES}LatentConsistency, init_args: {{weight: 0.2}}}}",
        ),
    ),
    "head of 1024": (*TODAY, gru(1024, True)),
    "2 rows of 32 blocks": (*TODAY, *batches(2, 32)),
    "2 rows of 16 blocks": (*TODAY, *batches(2, 16)),
    "rank 128": (*TODAY, "--model.lora.rank=128"),
    "alpha / r of 8": (*TODAY, "--model.lora.alpha=256"),
    "lr 1.5e-3": (*TODAY, adamw(0.0015)),
    "betas 0.9, 0.95": (*TODAY, adamw(betas="[0.9, 0.95]")),
    "weight decay 0.1": (*TODAY, adamw(decay=0.1)),
    "no LCM": (*TODAY, losses(anchors("base"), anchors("sampler"), "")),
    "targets: anchor's argmax": (*TODAY, losses(anchors("base", target="argmax"), anchors("sampler", target="argmax"))),
    "LoRA on attention alone": (*TODAY, "--model.lora.target_modules=[q_proj, k_proj, v_proj, o_proj]"),
    "rank 8": (*TODAY, "--model.lora.rank=8"),
}
RUNGS = LADDER | SCREEN


def measure(config: str, run: Run, prompts: int) -> dict[str, Any]:
    """The row of a run."""
    module, row = train(config, run)
    if prompts:
        # Sampled text repeats itself less than greedy text, and with coupled verification it is the same text for all recipes.
        row["greedy"] = decoded(module, PROMPTS, prompts, max_new_tokens=64)
        row["sampled"] = decoded(module, PROMPTS, prompts, max_new_tokens=64, temperature=1.0, seed=0)
    return row


def steps_in(config: str, name: str, options: tuple[str, ...], seconds: float) -> int:
    """Optimizer steps of a rung in CPU seconds, by its cost over 30 steps."""
    _, row = train(config, Run(name, 0, 30, (*options, "--data.eval_max_rows=16")))
    return round(seconds / (row["cpu_seconds"] / 30))


def figures(row: dict[str, Any]) -> dict[str, float]:
    """What the table shows of a run."""
    found = {"share": row["history"][-1]["share_of_reference"], "forced": row["history"][-1]["forced_acceptance_length"]}
    for name in ("greedy", "sampled"):
        if name in row:
            found[name] = row[name]["acceptance_length"]
    return found | {"cpu_seconds": row["cpu_seconds"], "mtp_positions": row["mtp_positions"], "steps": row["steps"]}


def table(rows: list[dict[str, Any]]) -> list[tuple[str, int, dict[str, tuple[float, float]]]]:
    """Rung, number of seeds, and mean and spread of each figure."""
    names = list(dict.fromkeys(row["name"] for row in rows))
    lines = []
    for name in names:
        found = [figures(row) for row in rows if row["name"] == name]
        shared = [key for key in found[0] if all(key in each for each in found)]
        lines.append((name, len(found), {key: mean_and_spread([each[key] for each in found]) for key in shared}))
    return lines


def print_table(lines: list[tuple[str, int, dict[str, tuple[float, float]]]]) -> None:
    """Markdown."""
    print(
        "| rung | seeds | steps | MTP positions | CPU s | share of reference | forced | greedy | sampled |\n|" + "---|" * 9
    )
    for name, seeds, means in lines:
        cells = [f"{means[key][0]:,.0f}" for key in ("steps", "mtp_positions", "cpu_seconds")]
        for key, digits in (("share", 3), ("forced", 2), ("greedy", 2), ("sampled", 2)):
            cells.append(f"{means[key][0]:.{digits}f} ± {means[key][1]:.{digits}f}" if key in means else "-")
        print(f"| {name} | {seeds} | " + " | ".join(cells) + " |")


def draw(lines: list[tuple[str, int, dict[str, tuple[float, float]]]], path: Path) -> None:
    """Share of reference of each rung, with the spread over seeds, and CPU seconds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1.2 + 0.3 * len(lines)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 1))
    places = range(len(lines), 0, -1)
    shares = [means["share"] for _, _, means in lines]
    left.errorbar([m for m, _ in shares], places, xerr=[s for _, s in shares], fmt="o", capsize=3)
    left.set(xlabel="share of reference (mean and standard deviation over seeds)")
    left.set_yticks(list(places), [f"{name} ({seeds})" for name, seeds, _ in lines])
    left.grid(axis="x", alpha=0.3)
    right.barh(list(places), [means["cpu_seconds"][0] for _, _, means in lines], color="0.7")
    right.set(xlabel="CPU seconds")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Run what is missing, and print and draw what is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/demo.yaml")
    parser.add_argument("--rungs", nargs="+", default=["all"], help=f"ladder, screen, all, or of {', '.join(RUNGS)}")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--cpu_seconds", type=float, help="equal time instead of equal steps")
    parser.add_argument("--prompts", type=int, default=0, help="held-out prompts to decode after each run")
    parser.add_argument("--eval_rows", type=int, default=150, help="held-out rows of text sampled from the base")
    parser.add_argument("--rows", type=Path, default=Path("benchmarks/results/ladder.jsonl"))
    parser.add_argument("--plot", type=Path, default=Path("runs/ladder.png"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    groups = {"ladder": list(LADDER), "screen": list(SCREEN), "all": list(RUNGS)}
    names = [name for word in args.rungs for name in groups.get(word, [word])]
    runs = []
    for name in names:
        options = (*RUNGS[name], f"--data.eval_max_rows={args.eval_rows}")
        steps = steps_in(args.config, name, options, args.cpu_seconds) if args.cpu_seconds else args.steps
        runs += [Run(name, seed, steps, options) for seed in args.seeds]
    lines = table(run_all(args.rows, runs, lambda run: measure(args.config, run, args.prompts)))
    print_table(lines)
    draw(lines, args.plot)
    print(f"plot: {args.plot}")


if __name__ == "__main__":
    main()
