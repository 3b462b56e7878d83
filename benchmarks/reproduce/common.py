# SPDX-License-Identifier: Apache-2.0
"""What the scripts for the paper's figures share: options, the paper's recipe, plots."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

sys.path.append(str(Path(__file__).parents[1]))  # recipe_runs.py

from recipe_runs import mean_and_spread  # noqa: E402 - it is found in the folder above

OUTPUT = Path(__file__).parents[1] / "results"
PROMPTS = "package://demo/prompts.jsonl"
PLOTS = Path("docs/images")
MLP = "--model.sampler_head=mtp_lightning.sampler_heads.MLPSamplerHead"


def losses(sampler: bool = True, lcm: bool = True) -> str:
    """The paper's losses, or some of them. The constant NTP part of the base's cross-entropy is left out."""
    terms = {"base": "BaseCrossEntropy"}
    terms |= {"sampler": "SamplerCrossEntropy"} if sampler else {}
    terms |= {"lcm": "LatentConsistency"} if lcm else {}
    inner = ", ".join(f"{name}: {{class_path: mtp_lightning.losses.{kind}}}" for name, kind in terms.items())
    return f"--model.losses={{{inner}}}"


def arguments(description: str | None, steps: int, **others: Any) -> argparse.Namespace:
    """The command line; ``others`` are further options with their defaults."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/demo.yaml", help="base, data and training; the script sets the recipe")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=steps, help="optimizer steps of a run")
    parser.add_argument("--eval_rows", type=int, default=60, help="held-out rows of validation")
    for name, default in others.items():
        is_list = isinstance(default, list)
        kind = type(default[0] if is_list else default)
        parser.add_argument(f"--{name}", type=kind, nargs="+" if is_list else None, default=default)
    args = parser.parse_args()
    args.options = (f"--data.eval_max_rows={args.eval_rows}",)
    torch.set_num_threads(1)
    return args


def by_name(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Rows of each name."""
    return {name: [row for row in rows if row["name"] == name] for name in dict.fromkeys(row["name"] for row in rows)}


def curves(rows: list[dict[str, Any]], panels: dict[str, str]) -> Figure:
    """Figures of the validations by training step, a panel each: mean over seeds, and a band of one standard deviation."""
    figure = Figure(figsize=(4.5 * len(panels), 3.4), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (key, title) in zip(axes, panels.items(), strict=True):
        for name, group in by_name(rows).items():
            steps = [each["step"] for each in group[0]["history"]]
            means = [mean_and_spread([row["history"][i][key] for row in group]) for i in range(len(steps))]
            axis.plot(steps, [m for m, _ in means], marker="o", label=f"{name} ({len(group)})")
            axis.fill_between(steps, [m - s for m, s in means], [m + s for m, s in means], alpha=0.2)
        axis.set(title=title, xlabel="training step")
        axis.legend()
    return figure


def save(figure: Figure, name: str) -> None:
    """Write a plot."""
    PLOTS.mkdir(parents=True, exist_ok=True)
    figure.savefig(PLOTS / name, dpi=110)
    print(f"plot: {PLOTS / name}")
