# SPDX-License-Identifier: Apache-2.0
"""``mtp compare``: runs side by side."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from mtp_lightning.errors import UsageError
from mtp_lightning.evaluation.reporting import note
from mtp_lightning.evaluation.run_comparison import (
    differing_settings,
    final_figures,
    mean_and_deviation,
    read_runs,
    save_curves,
    seed_groups,
)
from mtp_lightning.paths import check_writable

MAX_KEY, MIN_COLUMN = 28, 13
"""Characters of the longest line of a key, and those that a run's column has at least."""


def run_compare(config: Any) -> None:
    """``mtp compare RUN RUN ...``."""
    if len(config.runs) < 2:
        raise UsageError("give two runs or more.")
    plot = Path(config.output)
    if plot.suffix != ".png":
        raise UsageError(f"--output must be a .png file, got {config.output}.")
    check_writable(plot.parent, plot)
    runs = read_runs(config.runs)
    settings, figures = differing_settings(runs), [final_figures(run) for run in runs]
    names = [run.name for run in runs]
    seeds = [
        ([names[index] for index in group], mean_and_deviation([figures[index] for index in group]))
        for group in seed_groups(runs)
    ]
    if config.json:
        found = {
            "settings": {"runs": names, **settings},
            "figures": dict(zip(names, map(_stripped, figures), strict=True)),
            "seeds": [{"runs": group, "mean and deviation": _stripped(spread)} for group, spread in seeds],
        }
        print(json.dumps(found, ensure_ascii=False, default=str))
    else:
        console = Console()
        print_table(console, "Settings that differ", names, settings or {"(none)": ["" for _ in runs]})
        print_table(console, "Figures", names, _rows(figures, _number))
        if seeds:
            heads = [f"{len(group)} runs: {', '.join(group)}" for group, _ in seeds]
            title = "Runs that differ in the seed alone: mean ± standard deviation"
            print_table(console, title, heads, _rows([spread for _, spread in seeds], lambda v: f"{v[0]:.3f} ± {v[1]:.3f}"))
    save_curves(runs, plot)
    note(f"written to {plot}")


def _stripped(figures: dict[str, Any]) -> dict[str, Any]:
    """Figures whose names are not indented."""
    return {name.strip(): value for name, value in figures.items()}


def _rows(figures: Sequence[dict[str, Any]], as_text: Callable[[Any], str]) -> dict[str, list[Any]]:
    """The rows of a table with a column for each of some figures; those that none has are left out."""
    names = dict.fromkeys(name for each in figures for name in each)
    values = {name: [each.get(name) for each in figures] for name in names}
    return {name: [v if v is None else as_text(v) for v in row] for name, row in values.items() if set(row) != {None}}


def print_table(console: Console, title: str, names: Sequence[str], rows: dict[str, list[Any]]) -> None:
    """Print a column for each run, in several tables if the terminal is narrow."""
    console.print(f"\n{title}", style="bold", highlight=False)
    first = min(MAX_KEY, max(map(len, rows)))
    at_once = max(2, (console.width - first) // MIN_COLUMN)
    for start in range(0, len(names), at_once):
        shown = slice(start, start + at_once)
        width = max(1, (console.width - first) // len(names[shown]) - 3)
        table = Table(box=SIMPLE_HEAD, pad_edge=False)
        table.add_column("", overflow="fold")
        for name in names[shown]:
            table.add_column(wrapped(name, width), overflow="fold", justify="right")
        for key, values in rows.items():
            table.add_row(wrapped(key, first, "./"), *(wrapped("-" if v is None else str(v), width) for v in values[shown]))
        console.print(table, markup=False)


def wrapped(text: str, width: int, marks: str = "./_-") -> str:
    """A name or value over several lines, broken between its words: after the marks and before capitals."""
    if len(text) <= width:
        return text
    marked = re.sub(rf"(?<=[{marks}])(?=\w)|(?<=[a-z])(?=[A-Z])", "\v", text)
    return textwrap.fill(marked, width, replace_whitespace=False).replace("\v", "")


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.3f}"
