# SPDX-License-Identifier: Apache-2.0
"""The report of ``mtp benchmark``: what to use here, tables for the terminal and Markdown, a plot."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from mtp_lightning.evaluation.acceptance import largest_gap
from mtp_lightning.evaluation.benchmark import PLAIN, Setting
from mtp_lightning.evaluation.reporting import (
    GREY,
    QUARTILE_PAIRS,
    decimals,
    markdown_table,
    new_figure,
    rounding_note,
    save_figure,
)
from mtp_lightning.metrics.functional import REPETITION_THRESHOLD

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ALL = "all prompts"
CLEARLY_FASTER = 1.02
"""By how much a fixed number of masks must beat ``auto`` to be recommended instead."""

Figures = dict[str, Any]
"""What ``acceptance.summarise`` returns, of a system with its name."""


class ReportTable(NamedTuple):
    """A table, for the terminal or Markdown."""

    title: str
    header: Sequence[str]  # of each column; the first one has names, the others numbers
    rows: Sequence[Sequence[str]]


# ---- what to use


def advice(report: dict[str, Any]) -> str:
    """One sentence: which way to decode is the fastest on this machine, by how much, and whether the text is the same."""
    if report["endpoints"]:
        overall = report["settings"][0]["overall"]
        if overall["speed_up"] is None:
            return f"The server generates {overall['tokens_per_second']:.1f} tokens/s; --baseline_endpoint compares it."
        return f"The server is {_spread(overall['speed_up'])} that of the plain base."
    timed = [figures for figures in report["settings"] if figures["num_masks"] and figures["overall"]["speed_up"]]
    best = max(timed, key=_median)
    # The default adapts to the text, so it is preferred among equals.
    automatic = [each for each in timed if each["num_masks"] == "auto" and _median(best) < CLEARLY_FASTER * _median(each)]
    best = max(automatic, key=_median, default=best)
    spread = best["overall"]["speed_up"]
    figures = f"{_spread(spread)} plain decoding"
    if round(spread["median"], 2) <= 1:
        return f"Nothing beats plain decoding here: use --decoding autoregressive. {_options(best)} is {figures}."
    use = f"Use the default here ({_options(best)})" if best["num_masks"] == "auto" else f"Use {_options(best)} here"
    equal, checked = best["overall"]["lossless"]["equal"], best["overall"]["lossless"]["checked"]
    return f"{use}: {figures}" + (f", the same text for {equal} of {_prompts(checked)}." if checked else ".")


def _median(figures: Figures) -> float:
    return float(figures["overall"]["speed_up"]["median"])


def _options(figures: Figures) -> str:
    """The options of ``mtp generate`` that give a setting; defaults are left out."""
    words = [] if figures["decoding"] == "quadratic" else [f"--decoding {figures['decoding']}"]
    words += [f"--num_masks {figures['num_masks']}"]
    others = [] if figures["sampler_head"] or not figures["has_head"] else ["--sampler_head false"]
    return " ".join(words + others)


def _spread(spread: dict[str, Any]) -> str:
    """A speed-up with its spread, in words."""
    (low, high), count = spread["quartiles"], spread["num_pairs"]
    pairs = "1 pair" if count == 1 else f"{count} pairs"
    pairs += f", quartiles {low:.2f} and {high:.2f}" if count >= QUARTILE_PAIRS else ""
    return f"{spread['median']:.2f}x ({pairs}) as fast as"


def _prompts(count: int) -> str:
    return "1 prompt" if count == 1 else f"{count} prompts"


# ---- text and tables


def heading(report: dict[str, Any]) -> str:
    """What was measured, in a few sentences."""
    options, overall = report["options"], report["settings"][0]["overall"]
    choice = f"temperature {options['temperature']}" if options["temperature"] else "greedy"
    steps = "" if options["max_steps"] is None else f" and {options['max_steps']} steps"
    where = ", ".join(filter(None, (report["dtype"], report["device"])))
    return (
        f"{_prompts(overall['num_prompts'])} of {report['prompts']}, at most {options['max_new_tokens']} tokens{steps}"
        f" each, {choice}, batch {options['batch_size']}; {where}."
    )


def tables(report: dict[str, Any]) -> Iterator[ReportTable]:
    """All systems over all prompts; then tokens per step and speed-up by domain, for each family of settings."""
    systems: list[Figures] = [*([{"name": PLAIN, **report["plain"]}] if report["plain"] else []), *report["settings"]]
    header = ("", "tokens per step", "tokens/s", "speed-up", "quartiles", "same text")
    yield ReportTable("All prompts", header, [_system_row(figures) for figures in systems])
    for family, by_masks in families(report).items():
        domains = list(next(iter(by_masks.values()))["domains"])
        if len(domains) < 2:
            continue
        columns = ("domain", *by_masks)
        lengths = [
            [name, *(decimals(_group(figures, name)["acceptance_length"]) for figures in by_masks.values())]
            for name in [*domains, ALL]
        ]
        groups = [figures["overall"]["non_repeating"] for figures in by_masks.values()]
        texts = f"not repeating ({groups[0]['num_prompts']})"
        lengths.append([texts, *(decimals(group["acceptance_length"]) for group in groups)])
        yield ReportTable(f"Tokens per step by domain: {family}", columns, lengths)
        if report["plain"]:
            ratios = [[d, *(_ratio(_group(f, d)["speed_up"]) for f in by_masks.values())] for d in [*domains, ALL]]
            yield ReportTable(f"Speed-up by domain: {family}", columns, ratios)


def families(report: dict[str, Any]) -> dict[str, dict[str, Figures]]:
    """Figures of the settings by family and number of masks; a system that is not a setting is a family of its own."""
    found: dict[str, dict[str, Figures]] = {}
    for figures in report["settings"]:
        if figures["num_masks"] is None:
            found.setdefault("servers" if report["endpoints"] else "others", {})[figures["name"]] = figures
        else:
            setting = Setting(figures["decoding"], figures["sampler_head"], figures["num_masks"])
            found.setdefault(setting.family, {})[str(setting.num_masks)] = figures
    return found


def _group(figures: Figures, domain: str) -> Figures:
    """The figures of a domain or of all prompts; a domain without prompts has none."""
    group: Figures = figures["overall"] if domain == ALL else figures["domains"][domain]
    return group


def _system_row(figures: Figures) -> list[str]:
    overall = figures["overall"]
    spread, lossless = overall["speed_up"], overall["lossless"]
    is_spread = spread is not None and spread["num_pairs"] >= QUARTILE_PAIRS
    quartiles = "{:.2f} to {:.2f}".format(*spread["quartiles"]) if is_spread else "-"
    same = f"{lossless['equal']}/{lossless['checked']}" if lossless["checked"] else "-"
    rate = f"{overall['tokens_per_second']:.1f}"
    return [figures["name"], decimals(overall["acceptance_length"]), rate, _ratio(spread), quartiles, same]


def _ratio(spread: dict[str, Any] | None) -> str:
    return "-" if spread is None else f"{spread['median']:.2f}x"


def notes(report: dict[str, Any]) -> Iterator[str]:
    """What the columns mean, how near the base was to other texts, where the expected order fails."""
    masks = [str(figures["num_masks"]) for figures in report["settings"] if isinstance(figures["num_masks"], int)]
    if "auto" in [figures["num_masks"] for figures in report["settings"]] and masks:
        yield (
            f"{max(masks, key=int)} masks is the paper's protocol: it shows what was trained, not what is fast. auto is the"
            " default of mtp generate; it also drafts what repeats in the text."
        )
    yield (
        "Speed-up: median of tokens/s over plain decoding of the same prompts right before or after; quartiles of the pairs."
    )
    yield (
        f"Not repeating: texts with under {REPETITION_THRESHOLD:.0%} repeated 8-grams, because repetition inflates the"
        " tokens per step."
    )
    gaps = [largest_gap(figures["overall"]) for figures in report["settings"]]
    if rounding := rounding_note(max((gap for gap in gaps if gap is not None), default=None), report["dtype"]):
        yield rounding
    for name, shares in report["order"].items():
        yield f"Share of prompts where {name}: {', '.join(decimals(share) for share in shares)}."


def print_report(report: dict[str, Any], console: Console) -> None:
    """Print the report in at most 80 columns; the advice comes last."""
    console.print(f"{report['model']}: {heading(report)}", highlight=False)
    for title, header, rows in tables(report):
        console.print(f"\n{title}", highlight=False, style="bold")  # a table's own title is wrapped at its width
        table = Table(box=SIMPLE_HEAD, pad_edge=False)
        table.add_column(header[0], overflow="fold", vertical="bottom")
        for name in header[1:]:
            table.add_column(name, justify="right", vertical="bottom", overflow="fold")
        for row in rows:
            table.add_row(*row, style="bold" if row[0] == ALL else "")
        console.print(table)
    for line in notes(report):
        console.print(line, highlight=False, style="dim")
    console.print(f"\n{advice(report)}", highlight=False, style="bold", markup=False)


def markdown(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    lines = [f"# Benchmark of {report['model']}", "", heading(report), "", f"**{advice(report)}**", ""]
    for title, header, rows in tables(report):
        lines += [f"## {title}", "", *markdown_table(header, rows), ""]
    return "\n".join([*lines, *(f"- {line}" for line in notes(report)), "", "![the same](benchmark.png)", ""])


# ---- plot


def save_benchmark_plot(report: dict[str, Any], path: Path) -> None:
    """Draw tokens per step and speed-up by number of masks, a row for each family; replaces the file atomically."""
    by_family = families(report)
    figure = new_figure(10, 0.6 + 3.4 * len(by_family))
    grid = figure.subplots(len(by_family), 2, squeeze=False)
    for (left, right), (family, by_masks) in zip(grid, by_family.items(), strict=True):
        _draw(left, by_masks, "acceptance_length")
        _draw(right, by_masks, "speed_up")
        left.set_title(f"Tokens per step: {family}", fontsize=10)
        right.set_title("Speed-up over plain decoding (bars: quartiles)", fontsize=10)
        left.legend(fontsize=8, framealpha=0.9, edgecolor="none")
    figure.suptitle(f"{report['model']}: {_prompts(report['settings'][0]['overall']['num_prompts'])}", fontsize=11)
    save_figure(figure, path, dpi=130)


def _draw(axes: Axes, by_masks: dict[str, Figures], key: str) -> None:
    """A line for each domain over fixed numbers of masks, and a marker for every other system."""
    names = list(by_masks)
    fixed = [place for place, name in enumerate(names) if name.isdigit()]
    domains = list(next(iter(by_masks.values()))["domains"])
    for domain in [*(domains if len(domains) > 1 else []), ALL]:
        groups = [_group(figures, domain)[key] for figures in by_masks.values()]
        values: list[Any] = [group["median"] if isinstance(group, dict) else group for group in groups]
        style: dict[str, Any] = {"color": "black", "linewidth": 2.2} if domain == ALL else {"linewidth": 1.2}
        (line,) = axes.plot(fixed, [values[place] for place in fixed], marker="o", markersize=4, label=domain, **style)
        others = [place for place in range(len(names)) if place not in fixed and values[place] is not None]
        axes.plot(others, [values[place] for place in others], marker="s", linestyle="none", color=line.get_color())
        if domain == ALL and key == "speed_up":
            known = [place for place, group in enumerate(groups) if group]
            below = [groups[place]["median"] - groups[place]["quartiles"][0] for place in known]
            above = [groups[place]["quartiles"][1] - groups[place]["median"] for place in known]
            heights = [groups[place]["median"] for place in known]
            axes.errorbar(known, heights, yerr=[below, above], color="black", linestyle="none", capsize=4)
    axes.axhline(1, color=GREY, linewidth=1, linestyle="--")
    axes.set_ylim(bottom=0)
    axes.set_xlim(-0.4, len(names) - 0.6)
    axes.set_xticks(range(len(names)), names, fontsize=9 if len(names) > 3 else 8)
    axes.set_xlabel("masks in a block" if fixed else "")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
