# SPDX-License-Identifier: Apache-2.0
"""What all reports share: lines on the terminal, numbers as text, Markdown tables, plots, JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mtp_lightning.files import atomic_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

QUARTILE_PAIRS = 4
"""The fewest pairs whose quartiles are shown."""
DARK, LIGHT, GREY = "#1f4e79", "#9dc3e6", "#7f7f7f"


def note(text: str) -> None:
    """Print a line on standard error at once."""
    print(text, file=sys.stderr, flush=True)


def decimals(value: float | None) -> str:
    """Two decimals, or a dash for a missing value."""
    return "-" if value is None else f"{value:.2f}"


def rounding_note(gap: float | None, dtype: str | None) -> str | None:
    """Why texts differ, by the largest gap between the two best tokens where they do; None: it is not known."""
    if gap is None:
        return None
    return (
        f"Where a text first differs, the two best tokens are at most {gap:.2g} apart: {dtype or 'floating point'} rounds"
        " differently for different shapes (--exact removes this)."
    )


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """The lines of a Markdown table."""
    yield f"| {' | '.join(header)} |"
    yield f"|{'---|' * len(header)}"
    for row in rows:
        yield f"| {' | '.join(row)} |"


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, in inches. Not by pyplot, which keeps global state and may look for a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, path: Path, dpi: int) -> None:
    """Write a PNG file atomically."""
    with atomic_file(path) as file:
        figure.savefig(file, dpi=dpi, format="png")


def save_json(data: Any, path: Path) -> None:
    """Write JSON atomically; NaN is refused."""
    text = json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    with atomic_file(path) as file:
        file.write(text.encode())
