# SPDX-License-Identifier: Apache-2.0
"""The figures of ``acceptance.summarise`` as a table on the terminal and as a plot."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from mtp_lightning.evaluation.acceptance import largest_gap
from mtp_lightning.evaluation.reporting import (
    DARK,
    GREY,
    LIGHT,
    QUARTILE_PAIRS,
    decimals,
    new_figure,
    rounding_note,
    save_figure,
)
from mtp_lightning.metrics.functional import REPETITION_THRESHOLD

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def print_table(summary: dict[str, Any], console: Console, title: str, protocol: str, dtype: str) -> None:
    """Print what ``acceptance.summarise`` returns: a row for each domain and one for all prompts, then the notes.

    ``protocol`` says in words how the acceptance length was measured; the speed-up is that of the default plan. ``dtype``
    is the base's.
    """
    caption = f"not repeating: over the (n) texts with under {REPETITION_THRESHOLD:.0%} repeated 8-grams"
    table = Table(title=title, caption=caption, box=SIMPLE_HEAD, title_style="bold", collapse_padding=True, pad_edge=False)
    table.add_column("domain", overflow="fold", vertical="bottom")
    # Headers and cells are short enough for a terminal of 80 columns.
    for name in ("prompts", "acceptance\nlength", "not\nrepeating", "repeated\n8-grams", "lossless", "speed-up\nby default"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, figures in summary["domains"].items():
        table.add_row(name, *_cells(figures))
    if summary["domains"]:
        table.add_section()
    table.add_row("overall", *_cells(summary["overall"]), style="bold")
    console.print(table)
    console.print(f"Acceptance: {protocol}.", highlight=False, soft_wrap=True)
    print_notes(summary, console, dtype)


def print_notes(summary: dict[str, Any], console: Console, dtype: str) -> None:
    """Print what does not fit the table: forced figures, spread of the speed-up, where texts first differ and why."""
    for line in _notes(summary, dtype):
        console.print(line, highlight=False, soft_wrap=True)


def _notes(summary: dict[str, Any], dtype: str) -> Iterator[str]:
    forced, speed_up = summary["forced"], summary["overall"]["speed_up"]
    if forced is not None:
        yield (
            f"Teacher-forced: acceptance length {decimals(forced['acceptance_length'])},"
            f" reference {decimals(forced['reference'])}, share of reference {decimals(forced['share_of_reference'])}."
        )
    if speed_up is not None:
        low, high = speed_up["quartiles"]
        pairs = "1 pair" if speed_up["num_pairs"] == 1 else f"{speed_up['num_pairs']} pairs"
        quartiles = f" quartiles {low:.2f}x and {high:.2f}x," if speed_up["num_pairs"] >= QUARTILE_PAIRS else ""
        yield (
            f"Speed-up of mtp generate by default (--num_masks auto): median {speed_up['median']:.2f}x of {pairs},"
            f"{quartiles} drafts from repetitions in the text included."
        )
    for difference in summary["overall"]["lossless"]["differences"]:
        gap = difference["gap"]
        near = "" if gap is None else f" (the base's two largest logits there are {gap:.2g} apart)"
        place = f"prompt {difference['prompt']}, token {difference['position']}"
        yield f"Differs from autoregressive decoding: {place} onward{near}."
    if rounding := rounding_note(largest_gap(summary["overall"]), dtype):
        yield rounding


def _cells(figures: dict[str, Any]) -> list[str]:
    non_repeating, lossless, speed_up = figures["non_repeating"], figures["lossless"], figures["speed_up"]
    repeated = figures["repeated_8grams"]
    return [
        str(figures["num_prompts"]),
        decimals(figures["acceptance_length"]),
        f"{decimals(non_repeating['acceptance_length'])} ({non_repeating['num_prompts']})",
        "-" if repeated is None else f"{repeated:.0%}",
        f"{lossless['equal']}/{lossless['checked']}" if lossless["checked"] else "-",
        f"{speed_up['median']:.2f}x" if speed_up else "-",
    ]


def protocol_text(options: dict[str, Any]) -> str:
    """Options of decoding in words: ``quadratic decoding, 8 masks in every step, sampler head``."""
    if options["decoding"] == "autoregressive":
        return "autoregressive decoding"
    masks = "all masks" if options["num_masks"] == "auto" else f"{options['num_masks']} masks"
    head = "sampler head" if options["sampler_head"] else "base head"
    return f"{options['decoding']} decoding, {masks.replace('1 masks', '1 mask')} in every step, {head}"


def save_plot(summary: dict[str, Any], path: Path, title: str = "Tokens gained per step", protocol: str = "") -> None:
    """Draw acceptance lengths by domain and the share of drafts accepted by position; replaces the PNG file atomically.

    Above the panels are the speed-up of the default plan, and how acceptance was measured.
    """
    groups = {**summary["domains"], "overall": summary["overall"]}
    figure = new_figure(11, max(4.2, 1.9 + 0.55 * len(groups)))
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.05))
    _draw_lengths(left, groups)
    _draw_kept(right, groups)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower left", ncols=2, frameon=False, fontsize=9)
    left.set_title("\n".join(filter(None, ("Tokens gained per step", protocol))), fontsize=11)
    speed_up = summary["overall"]["speed_up"]
    speed = f"\nmtp generate by default (auto): {speed_up['median']:.2f}x as fast as plain decoding" if speed_up else ""
    figure.suptitle(title + speed, fontsize=13, fontweight="bold")
    save_figure(figure, path, dpi=150)


def _draw_lengths(axes: Axes, groups: dict[str, dict[str, Any]]) -> None:
    """Two bars for each group: over all texts, and over those that do not repeat."""
    all_texts = list(groups.values())
    non_repeating = [figures["non_repeating"] for figures in all_texts]
    height = 0.38
    _draw_bars(axes, all_texts, -height / 2, height, color=DARK, label="all prompts")
    label = f"texts with under {REPETITION_THRESHOLD:.0%} repeated 8-grams"
    _draw_bars(axes, non_repeating, height / 2, height, color=LIGHT, label=label)
    axes.axvline(1, color=GREY, linewidth=1, linestyle="--")
    note = "one token per step:\nordinary decoding"
    coordinates: dict[str, Any] = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points"}
    axes.annotate(note, (1, 1), (3, -4), va="top", fontsize=8, color=GREY, **coordinates)
    axes.set_yticks(range(len(groups)), list(groups))
    margin = max(0.0, (3 - len(groups)) / 2)  # keeps a few bars from becoming very thick
    axes.set_ylim(len(groups) - 0.4 + margin, -1.05 - margin)
    axes.set_xlim(0, 1.32 * max(1.0, *(figures["acceptance_length"] or 0.0 for figures in all_texts + non_repeating)))
    axes.set_xlabel("acceptance length (tokens generated per step)")
    axes.spines[["top", "right"]].set_visible(False)


def _draw_bars(axes: Axes, figures: list[dict[str, Any]], offset: float, height: float, **style: Any) -> None:
    """A bar for each group, with its acceptance length and number of texts next to it."""
    lengths = [each["acceptance_length"] for each in figures]
    places = [index + offset for index in range(len(figures))]
    axes.barh(places, [length or 0.0 for length in lengths], height, **style)
    for place, length, count in zip(places, lengths, [each["num_prompts"] for each in figures], strict=True):
        note = "none" if length is None else f"{length:.2f}  ({count} {'text' if count == 1 else 'texts'})"
        axes.annotate(note, (length or 0.0, place), (4, 0), textcoords="offset points", va="center", fontsize=8.5)


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
    axes.set_ylabel("steps that accept at least as many")
    axes.set_title("How much of a draft is accepted", fontsize=11)
    axes.legend(framealpha=0.9, edgecolor="none", fontsize=9, ncols=1 if len(groups) <= 8 else 2)
    axes.spines[["top", "right"]].set_visible(False)
