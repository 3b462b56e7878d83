# SPDX-License-Identifier: Apache-2.0
"""Runs side by side: the settings that differ, the figures they ended with, their curves."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import yaml

from mtp_lightning.errors import RunError, one_line
from mtp_lightning.evaluation.reporting import new_figure, save_figure

PLACES = ("ckpt_path", "overwrite", "trainer.default_root_dir", "trainer.logger")
"""Settings that differ between any two runs and say nothing."""
SEEDS = ("seed_everything", "data.seed")
"""Settings in which repetitions of a run differ."""
CURVES = {
    "train/loss": "training loss",
    "val/loss": "validation loss",
    "val/forced_acceptance_length": "forced acceptance length",
    "val/acceptance_length": "acceptance length (protocol)",
}
PARTS = ("val/loss/", "val/accuracy/")
"""What the best validation is also shown by: each loss term, and the share of right drafts at each offset."""
LATEST_SHARE, LATEST_VALUES = 10, 10
"""The training loss is the mean over the last 1/10 of its logged values, at least 10 of them: one step is noise."""
BEST = "val/forced_acceptance_length"
"""What the best checkpoint is chosen by."""


class Run(NamedTuple):
    """What a run left in its folder."""

    name: str  # its folder as given
    settings: dict[str, Any]  # settings by their keys, and the versions of libraries
    metrics: list[dict[str, float]]  # the lines of metrics.csv
    acceptance: dict[str, Any] | None  # the latest entry of acceptance.json


def read_runs(names: Sequence[str]) -> list[Run]:
    """Read the folders of runs; RunError if one has no ``config.yaml`` or ``metrics.csv``, or a file is damaged."""
    if len(set(names)) < len(names):
        raise RunError(f"a run is given twice: {', '.join(names)}.")
    return [_read_run(Path(name), name) for name in names]


def _read_run(folder: Path, name: str) -> Run:
    if not (folder / "config.yaml").is_file():
        raise RunError(f"{folder} is not the folder of a run: it has no config.yaml.")
    if not (folder / "metrics.csv").is_file():
        raise RunError(f"{folder} has no metrics.csv: the run ended before it logged any (trainer.log_every_n_steps).")
    try:
        text = (folder / "config.yaml").read_text(encoding="utf-8")
        versions = {f"version of {name}": version for name, version in re.findall(r"^# (\w+)==(\S+)$", text, re.MULTILINE)}
        settings = versions | flat_settings(yaml.safe_load(text), PLACES)
        with (folder / "metrics.csv").open(newline="", encoding="utf-8") as file:
            lines = [{key: float(value) for key, value in line.items() if value} for line in csv.DictReader(file)]
        acceptance = folder / "acceptance.json"
        latest = json.loads(acceptance.read_text(encoding="utf-8"))["latest"] if acceptance.is_file() else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise RunError(f"{folder} can't be read as a run: {one_line(error, 100)}.") from error
    return Run(name, settings, lines, latest)


def flat_settings(value: Any, without: Collection[str] = (), key: str = "") -> dict[str, Any]:
    """Nested settings with one key each: ``model.lora.rank``, ``trainer.callbacks.SampleText.prompts``.

    An object's key has its class's name, and its arguments are below it; a list of objects has the names of all. Keys in
    ``without`` and all below them are left out.
    """
    if key in without:
        return {}
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        names = [_class_name(item) or str(number) for number, item in enumerate(value)]
        names = [name if name not in names[:at] else f"{name}_{at}" for at, name in enumerate(names)]
        settings = {key: ", ".join(names)}
        for name, item in zip(names, value, strict=True):
            settings |= flat_settings(item, without, f"{key}.{name}")
            settings.pop(f"{key}.{name}", None)  # the name itself
        return settings
    if not isinstance(value, dict) or not value:
        return {key: value}
    class_name = _class_name(value)
    settings, inner = ({}, value) if class_name is None else ({key: class_name}, value.get("init_args") or {})
    for part, item in inner.items():
        settings |= flat_settings(item, without, f"{key}.{part}" if key else part)
    return settings


def _class_name(value: Any) -> str | None:
    """The name of the class that a setting names: ``torch.optim.AdamW -> AdamW``; None: not an object."""
    path = value.get("class_path") if isinstance(value, dict) else None
    return path.rpartition(".")[2] if isinstance(path, str) else None


def differing_settings(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """The settings that are not the same in all runs, with their values; one that a run does not have is None.

    Arguments of a callback or another part of the trainer that a run does not have are left out.
    """
    keys = dict.fromkeys(key for run in runs for key in run.settings)
    for key in [key for key in keys if any(other.startswith(f"{key}.") for other in keys)]:
        if all(run.settings.get(key) in (None, {}) for run in runs):
            del keys[key]  # empty in one run, and has parts in another
    values = {key: [run.settings.get(key) for run in runs] for key in keys}
    different = {key: group for key, group in values.items() if any(value != group[0] for value in group)}

    def is_explained(key: str) -> bool:
        parts = key.split(".")
        above = {".".join(parts[:count]) for count in range(1, len(parts))}
        is_missing = key.startswith("trainer.") and any(key not in run.settings for run in runs)
        return is_missing and bool(above & different.keys())

    return {key: group for key, group in different.items() if not is_explained(key)}


def final_figures(run: Run) -> dict[str, float | None]:
    """The figures of the best validation, and of the latest evaluation; None: the run has none, or it is not finite."""
    steps = [int(line["step"]) + 1 for line in run.metrics if "step" in line]
    best = max((line for line in run.metrics if BEST in line), key=lambda line: line[BEST], default={})
    train = [line["train/loss"] for line in run.metrics if "train/loss" in line]
    latest = train[-max(LATEST_VALUES, len(train) // LATEST_SHARE) :]
    overall = run.acceptance["overall"] if run.acceptance else {}
    is_default = run.acceptance is not None and run.acceptance.get("speed_num_masks") == "auto"
    speed_up = overall.get("speed_up") if is_default else None
    figures = {
        "steps": max(steps, default=None),
        "training loss at the end": mean(latest) if latest else None,
        "best forced acceptance length": best.get(BEST),
        "  at step": int(best["step"]) + 1 if "step" in best else None,
        "  share of reference": best.get("val/share_of_reference"),
        "  validation loss": best.get("val/loss"),
        **{f"  {name.removeprefix('val/')}": best[name] for name in best if name.startswith(PARTS)},
        "  NTP loss": best.get("val/ntp_loss"),
        "acceptance length (protocol)": overall.get("acceptance_length"),
        "speed-up by default": speed_up["median"] if speed_up else None,
    }
    # NaN and infinity are not valid JSON.
    return {name: value if value is not None and math.isfinite(value) else None for name, value in figures.items()}


def seed_groups(runs: Sequence[Run]) -> list[list[int]]:
    """Indices of runs that differ in the seed alone and are equally long, of each group of two runs or more."""
    groups: dict[str, list[int]] = {}
    for index, run in enumerate(runs):
        same = {key: value for key, value in run.settings.items() if key not in SEEDS}
        groups.setdefault(repr((sorted(same.items(), key=repr), final_figures(run)["steps"])), []).append(index)
    return [group for group in groups.values() if len(group) > 1]


def mean_and_deviation(figures: Sequence[dict[str, float | None]]) -> dict[str, tuple[float, float]]:
    """The mean and the sample standard deviation of the figures that all runs have; two runs or more."""
    values = {name: [each.get(name) for each in figures] for name in figures[0]}
    complete = {name: [value for value in group if value is not None] for name, group in values.items()}
    return {name: (mean(group), stdev(group)) for name, group in complete.items() if len(group) == len(figures)}


def save_curves(runs: Sequence[Run], path: Path) -> None:
    """Draw the curves of all runs, a panel for each figure that one of them has; replaces the PNG file atomically."""
    shown = [name for name in CURVES if any(name in line for run in runs for line in run.metrics)]
    if not shown:
        raise RunError("these runs have logged nothing yet.")
    columns = min(2, len(shown))
    rows = -(-len(shown) // columns)
    figure = new_figure(5.5 * columns, 3.4 * rows + 0.4)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat[len(shown) :]:
        axes.set_visible(False)
    for axes, name in zip(grid.flat, shown, strict=False):
        for index, run in enumerate(runs):
            points = [(line["step"] + 1, line[name]) for line in run.metrics if name in line and "step" in line]
            steps, values = zip(*points, strict=True) if points else ((), ())
            axes.plot(steps, values, label=run.name, color=f"C{index}", marker="o" if len(points) < 30 else "", markersize=4)
        axes.set_title(CURVES[name], fontsize=11)
        axes.set_xlabel("optimizer steps")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = grid.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(runs)), frameon=False)
    save_figure(figure, path, dpi=130)
