# SPDX-License-Identifier: Apache-2.0
"""What ``acceptance.summarise`` gives, for people and programs: a table, a plot and a JSON file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from mtp_lightning.files import atomic_file
from mtp_lightning.metrics.functional import REPETITION_THRESHOLD

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DARK, LIGHT, GREY = "#1f4e79", "#9dc3e6", "#7f7f7f"


def print_table(summary: dict[str, Any], console: Console, title: str = "Acceptance by real decoding, greedy") -> None:
    """Print one row a domain and one over all, and the notes below them.

    Args:
        summary: what ``acceptance.summarise`` gives.
        console: where to print.
        title: stands above the table.
    """
    caption = f"not repeating: over the (n) texts with under {REPETITION_THRESHOLD:.0%} repeated 8-grams"
    table = Table(title=title, caption=caption, box=SIMPLE_HEAD, title_style="bold", collapse_padding=True, pad_edge=False)
    table.add_column("domain", overflow="fold", vertical="bottom")
    # Headers and cells are short enough for a terminal of 80 columns.
    for name in ("prompts", "acceptance\nlength", "not\nrepeating", "repeated\n8-grams", "lossless", "speed-up"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, figures in summary["domains"].items():
        table.add_row(name, *_cells(figures))
    if summary["domains"]:
        table.add_section()
    table.add_row("overall", *_cells(summary["overall"]), style="bold")
    console.print(table)
    print_notes(summary, console)


def print_notes(summary: dict[str, Any], console: Console) -> None:
    """Print what stands below the table: forced figures, spread of the speed-up, and where texts first differ.

    Args:
        summary: what ``acceptance.summarise`` gives.
        console: where to print.
    """
    for line in _notes(summary):
        console.print(line, highlight=False, soft_wrap=True)


def _notes(summary: dict[str, Any]) -> Iterator[str]:
    forced, speed_up = summary["forced"], summary["overall"]["speed_up"]
    if forced is not None:
        yield (
            f"Forced, on given text: acceptance length {_text(forced['acceptance_length'])},"
            f" reference {_text(forced['reference'])}, share of reference {_text(forced['share_of_reference'])}."
        )
    if speed_up is not None:
        low, high = speed_up["quartiles"]
        pairs = "1 pair" if speed_up["num_pairs"] == 1 else f"{speed_up['num_pairs']} pairs"
        yield (
            f"Speed-up over autoregressive decoding: median {speed_up['median']:.2f}x of {pairs},"
            f" quartiles {low:.2f}x and {high:.2f}x."
        )
    for difference in summary["overall"]["lossless"]["differences"]:
        gap = difference["gap"]
        near = "" if gap is None else f" (the base's two largest logits there are {gap:.2g} apart)"
        place = f"prompt {difference['prompt']}, token {difference['position']}"
        yield f"Not what autoregressive decoding gives: {place} and on{near}."


def _cells(figures: dict[str, Any]) -> list[str]:
    steady, lossless, speed_up = figures["non_repeating"], figures["lossless"], figures["speed_up"]
    repeated = figures["repeated_8grams"]
    return [
        str(figures["num_prompts"]),
        _text(figures["acceptance_length"]),
        f"{_text(steady['acceptance_length'])} ({steady['num_prompts']})",
        "-" if repeated is None else f"{repeated:.0%}",
        f"{lossless['equal']}/{lossless['checked']}" if lossless["checked"] else "-",
        f"{speed_up['median']:.2f}x" if speed_up else "-",
    ]


def _text(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def save_plot(summary: dict[str, Any], path: Path, title: str = "Tokens gained per step") -> None:
    """Draw acceptance length by domain, and how much of a draft is kept; the file is whole at any time.

    Args:
        summary: what ``acceptance.summarise`` gives.
        path: a ``.png`` file.
        title: stands above both panels.
    """
    # Not pyplot: it keeps global state and may look for a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    groups = {**summary["domains"], "overall": summary["overall"]}
    figure = Figure(figsize=(11, max(4.2, 1.9 + 0.55 * len(groups))), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.05))
    _draw_lengths(left, groups)
    _draw_kept(right, groups)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower left", ncols=2, frameon=False, fontsize=9)
    figure.suptitle(title, fontsize=14, fontweight="bold")
    with atomic_file(path) as file:
        figure.savefig(file, dpi=150, format="png")


def _draw_lengths(axes: Axes, groups: dict[str, dict[str, Any]]) -> None:
    names, height = list(groups), 0.38
    longest = 1.0
    series = (
        (-height / 2, DARK, "all prompts", lambda figures: (figures["acceptance_length"], figures["num_prompts"])),
        (
            height / 2,
            LIGHT,
            f"texts with under {REPETITION_THRESHOLD:.0%} repeated 8-grams",
            lambda figures: (figures["non_repeating"]["acceptance_length"], figures["non_repeating"]["num_prompts"]),
        ),
    )
    for shift, colour, label, read in series:
        values = [read(groups[name]) for name in names]
        lengths = [value or 0.0 for value, _ in values]
        longest = max(longest, *lengths)
        places = [index + shift for index in range(len(names))]
        axes.barh(places, lengths, height, color=colour, label=label)
        for place, (value, count) in zip(places, values, strict=True):
            noun = "text" if count == 1 else "texts"
            note = "none" if value is None else f"{value:.2f}  ({count} {noun})"
            axes.annotate(note, (value or 0.0, place), (4, 0), textcoords="offset points", va="center", fontsize=8.5)
    axes.axvline(1, color=GREY, linewidth=1, linestyle="--")
    above: dict[str, Any] = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points", "va": "top"}
    axes.annotate("one token a step:\nordinary decoding", (1, 1), (3, -4), **above, fontsize=8, color=GREY)
    axes.set_yticks(range(len(names)), names)
    spare = max(0.0, (3 - len(names)) / 2)  # few bars would be very thick
    axes.set_ylim(len(names) - 0.4 + spare, -1.05 - spare)
    axes.set_xlim(0, longest * 1.32)
    axes.set_xlabel("acceptance length (tokens generated per step)")
    axes.set_title("How many tokens a step gains", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_kept(axes: Axes, groups: dict[str, dict[str, Any]]) -> None:
    from matplotlib import colormaps
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    colours = colormaps["tab10" if len(groups) <= 10 else "tab20"]
    for index, (name, figures) in enumerate(groups.items()):
        kept = figures["kept_by_position"]
        style: dict[str, Any] = {"color": colours(index)}
        if name == "overall":
            style = {"color": "black", "linewidth": 2.2, "linestyle": "--"}
        axes.plot(range(1, len(kept) + 1), kept, marker="o", markersize=4, label=name, **style)
    axes.set_ylim(0, 1.02)
    axes.set_axisbelow(True)
    axes.grid(axis="y", color="#dddddd")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_xlabel("draft tokens")
    axes.set_ylabel("steps that keep at least so many")
    axes.set_title("How much of a draft is kept", fontsize=11)
    axes.legend(framealpha=0.9, edgecolor="none", fontsize=9, ncols=1 if len(groups) <= 8 else 2)
    axes.spines[["top", "right"]].set_visible(False)
