# SPDX-License-Identifier: Apache-2.0
"""``mtp compare``: runs side by side."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from mtp_lightning.errors import UsageError
from mtp_lightning.evaluation.reporting import note
from mtp_lightning.evaluation.run_comparison import differing_settings, final_figures, read_runs, save_curves
from mtp_lightning.paths import check_writable


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
    if config.json:
        by_run = {
            name: {key.strip(): value for key, value in each.items()} for name, each in zip(names, figures, strict=True)
        }
        print(json.dumps({"settings": {"runs": names, **settings}, "figures": by_run}, ensure_ascii=False, default=str))
    else:
        console = Console()
        print_table(console, "Settings that differ", names, settings or {"(none)": ["" for _ in runs]})
        keys = dict.fromkeys(key for each in figures for key in each)
        rows = {key: [_number(each.get(key)) for each in figures] for key in keys}
        print_table(console, "Figures", names, {key: row for key, row in rows.items() if set(row) != {"-"}})
    save_curves(runs, plot)
    note(f"written to {plot}")


def print_table(console: Console, title: str, names: Sequence[str], rows: dict[str, list[Any]]) -> None:
    """Print a column for each run."""
    console.print(f"\n{title}", style="bold", highlight=False)
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    first = min(36, max(map(len, rows)))  # names of settings are folded later than values
    table.add_column("", overflow="fold", max_width=first)
    for name in names:
        table.add_column(name, overflow="fold", justify="right", max_width=max(6, (console.width - first) // len(names) - 3))
    for key, values in rows.items():
        table.add_row(key, *("-" if value is None else str(value) for value in values))
    console.print(table, markup=False)


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return str(value) if isinstance(value, int) else f"{value:.3f}"
