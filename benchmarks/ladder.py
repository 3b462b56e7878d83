# SPDX-License-Identifier: Apache-2.0
"""The ladder of recipes: from the paper's upwards, one ingredient at a time, on the demo's base and data.

    python benchmarks/ladder.py --rungs screen --steps 200
    python benchmarks/ladder.py --rungs bf16-mixed "8 rows of 8 blocks" --cpu_seconds 600 --seeds 0 1 2 --prompts 24

Each rung is a list of options of ``mtp fit --config configs/demo.yaml`` that a user could type. Rows go to ``--rows``, a
JSON line a run; a run that has its row is not repeated. All rungs train for equal ``--steps``, or with ``--cpu_seconds`` for
equal time: each for as many steps as fit in it at the pace of its first 30. Prints a table and draws a plot; ``--show`` does
that for all rows there are.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from recipe_runs import Run, decoded, mean_and_spread, read_rows, run_all, train

PROMPTS = "package://demo/prompts.jsonl"
LOSSES = "mtp_lightning.losses."


def lcm(weight: float = 1.0) -> str:
    """The term LatentConsistency, with its name."""
    return f"lcm: {{class_path: {LOSSES}LatentConsistency, init_args: {{weight: {weight}}}}}"


def losses(base: str, sampler: str, others: str = lcm()) -> str:
    """The option that sets the terms."""
    return f"--model.losses={{base: {base}, sampler: {sampler}, {others}}}"


def anchors(head: str, weight: float = 1.0, target: str = "distribution", decay: float | str = "null") -> str:
    """The term AnchorDistillation."""
    options = f"{{head: {head}, weight: {weight}, target: {target}, position_weights: {decay}}}"
    return f"{{class_path: {LOSSES}AnchorDistillation, init_args: {options}}}"


def acceptance(name: str, weight: float = 1.0) -> str:
    """A term that aims at the acceptance of the sampler head."""
    return f"{{class_path: {LOSSES}{name}, init_args: {{head: sampler, weight: {weight}}}}}"


def cross_entropy(head: str) -> str:
    """The cross-entropy to the text."""
    return f"{{class_path: {LOSSES}{head.title()}CrossEntropy}}"


def gru(width: int, read_hidden: bool = True, normalize: bool = True) -> str:
    """The GRU head."""
    options = f"{{hidden_size: {width}, read_hidden: {str(read_hidden).lower()}, normalize: {str(normalize).lower()}}}"
    return f"--model.sampler_head={{class_path: mtp_lightning.sampler_heads.GRUSamplerHead, init_args: {options}}}"


def adamw(lr: float = 0.003, betas: str = "[0.9, 0.98]", decay: float = 0.01) -> str:
    """The optimizer."""
    options = f"{{lr: {lr}, betas: {betas}, weight_decay: {decay}}}"
    return f"--model.optimizer={{class_path: torch.optim.AdamW, init_args: {options}}}"


def muon(lr: float = 0.003, muon_lr: float = 0.01, betas: str = "[0.9, 0.98]") -> str:
    """Muon for the head's matrices, AdamW for all else."""
    options = f"{{lr: {lr}, muon_lr: {muon_lr}, betas: {betas}}}"
    return f"--model.optimizer={{class_path: mtp_lightning.training.MuonAdamW, init_args: {options}}}"


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
TODAY = (*TRAINING, gru(512), TO_ANCHORS)

LADDER: dict[str, tuple[str, ...]] = {
    "paper": (*TRAINING, MLP, TO_TEXT),
    "paper + GRU head": (*TRAINING, gru(256, False), TO_TEXT),
    "+ anchor distribution": (*TRAINING, gru(256, False), TO_ANCHORS),
    "+ head of 512 that reads z": TODAY,
}
FAST = (*TODAY, "--trainer.precision=bf16-mixed")
"""Today's recipe with products in bfloat16: a third less time a step on a CPU that has instructions for it."""
NOISE = "--model.mask_tokens=noise"
MUON = (*FAST, gru(256), muon())
"""``configs/demo.yaml``."""

SCREEN: dict[str, tuple[str, ...]] = {
    "bf16-mixed": FAST,
    "Muon for the head, of 256, normalized": MUON,
    "Muon, head of 512": (*MUON, gru(512)),
    "Muon, muon_lr 0.02": (*MUON, muon(muon_lr=0.02)),
    "Muon, muon_lr 0.005": (*MUON, muon(muon_lr=0.005)),
    "Muon, lr 6e-3": (*MUON, muon(lr=0.006)),
    "Muon, base loss 0.2, LCM 0.2": (*MUON, losses(anchors("base", 0.2), anchors("sampler"), lcm(0.2))),
    "Muon, masks 2 to 8": (*MUON, "--model.num_masks_schedule={start: 2, end: 8}"),
    "Muon, masks 4 to 8": (*MUON, "--model.num_masks_schedule={start: 4, end: 8}"),
    "Muon, head of 512, masks 2 to 8": (*MUON, gru(512), "--model.num_masks_schedule={start: 2, end: 8}"),
    "noise tokens": (*MUON, NOISE),
    "noise tokens, no head": (*FAST, NOISE, "--model.sampler_head=false", f"--model.losses={{base: {anchors('base')}}}"),
    "lr 6e-3": (*FAST, adamw(0.006)),
    "lr 1.5e-3": (*FAST, adamw(0.0015)),
    "sampler loss alone": (*FAST, losses(anchors("base", 0.0), anchors("sampler"), "")),
    "base loss 0.2, LCM 0.2": (*FAST, losses(anchors("base", 0.2), anchors("sampler"), lcm(0.2))),
    "base loss 0.2": (*FAST, losses(anchors("base", 0.2), anchors("sampler"))),
    "LCM 5": (*FAST, losses(anchors("base"), anchors("sampler"), lcm(5.0))),
    "no LCM": (*FAST, losses(anchors("base"), anchors("sampler"), "")),
    "KL + NLA": (*FAST, losses(anchors("base"), anchors("sampler"), f"{lcm()}, nla: {acceptance('NegativeLogAcceptance')}")),
    "KL + TV": (*FAST, losses(anchors("base"), anchors("sampler"), f"{lcm()}, tv: {acceptance('TotalVariation')}")),
    "hybrid": (*FAST, losses(anchors("base"), acceptance("HybridAcceptance"))),
    "weights 0.8^j": (*FAST, losses(anchors("base"), anchors("sampler", decay=0.8))),
    "weights by acceptance": (*FAST, losses(anchors("base"), anchors("sampler", decay="acceptance"))),
    "head of 1024": (*FAST, gru(1024)),
    "head of 256": (*FAST, gru(256)),
    "head not normalized": (*FAST, gru(512, normalize=False)),
    "Markov head": (*FAST, "--model.sampler_head=mtp_lightning.sampler_heads.MarkovSamplerHead"),
    "2 rows of 32 blocks": (*FAST, *batches(2, 32)),
    "2 rows of 16 blocks": (*FAST, *batches(2, 16)),
    "4 rows of 8 blocks": (*FAST, *batches(4, 8)),
    "8 rows of 8 blocks": (*FAST, *batches(8, 8)),
    "rank 128": (*FAST, "--model.lora.rank=128"),
    "rank 8": (*FAST, "--model.lora.rank=8"),
    "alpha / r of 8": (*FAST, "--model.lora.alpha=256"),
    "alpha / r of 0.5": (*FAST, "--model.lora.alpha=16"),
    "LoRA on attention alone": (*FAST, "--model.lora.target_modules=[q_proj, k_proj, v_proj, o_proj]"),
    "LoRA on MLPs alone": (*FAST, "--model.lora.target_modules=[gate_proj, up_proj, down_proj]"),
    "betas 0.9, 0.95": (*FAST, adamw(betas="[0.9, 0.95]")),
    "weight decay 0.1": (*FAST, adamw(decay=0.1)),
    "targets: anchor's argmax": (*FAST, losses(anchors("base", target="argmax"), anchors("sampler", target="argmax"))),
    "masks 2 to 8": (*FAST, "--model.num_masks_schedule={start: 2, end: 8}"),
    "base loss falls to 0.1": (*FAST, "--model.loss_schedules={base: {start: 1.0, end: 0.1}}"),
}
RUNGS = LADDER | SCREEN


def measure(args: argparse.Namespace, run: Run) -> dict[str, Any]:
    """The row of a run."""
    module, row = train(args.config, run)
    row["budget"], prompts = args.cpu_seconds, args.prompts
    if prompts:
        # Sampled text repeats itself less than greedy text, and with coupled verification all recipes get the same text.
        row["greedy"] = decoded(module, PROMPTS, prompts, max_new_tokens=64)
        row["sampled"] = decoded(module, PROMPTS, prompts, max_new_tokens=64, temperature=1.0, seed=0)
    return row


def steps_in(args: argparse.Namespace, name: str, options: tuple[str, ...]) -> int:
    """Optimizer steps of a rung in ``--cpu_seconds``: as in an earlier row of it, else by its cost over 30 steps."""
    for row in read_rows(args.rows):
        if row["name"] == name and row["options"] == list(options) and row.get("budget") == args.cpu_seconds:
            return int(row["steps"])
    _, row = train(args.config, Run(name, 0, 30, options))
    return round(args.cpu_seconds / (row["cpu_seconds"] / 30))


def runs(args: argparse.Namespace, names: list[str]) -> Iterator[Run]:
    """The runs of rungs."""
    for name in names:
        options = (*RUNGS[name], f"--data.eval_max_rows={args.eval_rows}")
        steps = steps_in(args, name, options) if args.cpu_seconds else args.steps
        yield from (Run(name, seed, steps, options) for seed in args.seeds)


def figures(row: dict[str, Any]) -> dict[str, float]:
    """What the table shows of a run."""
    found = {"share": row["history"][-1]["share_of_reference"], "forced": row["history"][-1]["forced_acceptance_length"]}
    for name in ("greedy", "sampled"):
        if name in row:
            found[name] = row[name]["acceptance_length"]
    return found | {"cpu_seconds": row["cpu_seconds"], "mtp_positions": row["mtp_positions"], "steps": row["steps"]}


def table(rows: list[dict[str, Any]]) -> list[tuple[str, int, dict[str, tuple[float, float]]]]:
    """Rung, number of seeds, and mean and spread of each figure, for each length of the runs."""
    groups: dict[tuple[str, int], list[dict[str, float]]] = {}
    for row in rows:
        groups.setdefault((row["name"], row["steps"]), []).append(figures(row))
    lines = []
    for (name, _), found in groups.items():
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
            if key not in means:
                cells.append("-")
                continue
            mean, spread = means[key]
            cells.append(f"{mean:.{digits}f}" + (f" ± {spread:.{digits}f}" if seeds > 1 else ""))
        print(f"| {name} | {seeds} | " + " | ".join(cells) + " |")


def draw(lines: list[tuple[str, int, dict[str, tuple[float, float]]]], path: Path) -> None:
    """Share of reference of each rung, the best first, with the spread over seeds, and CPU seconds."""
    from matplotlib.figure import Figure

    lines = sorted(lines, key=lambda line: -line[2]["share"][0])
    figure = Figure(figsize=(9, 1 + 0.22 * len(lines)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 1))
    places = range(len(lines), 0, -1)
    shares = [means["share"] for _, _, means in lines]
    left.errorbar([m for m, _ in shares], places, xerr=[s for _, s in shares], fmt="o", capsize=3)
    left.set(xlabel="share of reference", ylim=(0.5, len(lines) + 0.5))
    left.set_yticks(list(places), [f"{name}, {means['steps'][0]:.0f} steps ({seeds})" for name, seeds, means in lines])
    left.grid(axis="x", alpha=0.3)
    right.barh(list(places), [means["cpu_seconds"][0] for _, _, means in lines], color="0.7")
    right.set(xlabel="CPU seconds")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Run what is missing, and print and draw what is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/demo.yaml")
    parser.add_argument("--rungs", nargs="+", default=["all"], help=f"ladder, screen, all, or names: {'; '.join(RUNGS)}")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--cpu_seconds", type=float, help="equal time instead of equal steps")
    parser.add_argument("--prompts", type=int, default=0, help="held-out prompts to decode after each run")
    parser.add_argument("--eval_rows", type=int, default=150, help="held-out rows of text sampled from the base")
    parser.add_argument("--rows", type=Path, default=Path("benchmarks/results/ladder.jsonl"))
    parser.add_argument("--plot", type=Path, default=Path("runs/ladder.png"))
    parser.add_argument("--show", action="store_true", help="train nothing")
    args = parser.parse_args()
    torch.set_num_threads(1)
    groups = {"ladder": list(LADDER), "screen": list(SCREEN), "all": list(RUNGS)}
    names = [name for word in args.rungs for name in groups.get(word, [word])]
    if unknown := [name for name in names if name not in RUNGS]:
        parser.error(f"argument --rungs: no rung {unknown[0]!r}")
    if args.show:
        rows = read_rows(args.rows)
    else:
        rows = run_all(args.rows, runs(args, names), lambda run: measure(args, run))
    lines = table(rows)
    print_table(lines)
    draw(lines, args.plot)
    print(f"plot: {args.plot}")


if __name__ == "__main__":
    main()
