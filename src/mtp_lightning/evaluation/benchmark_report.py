# SPDX-License-Identifier: Apache-2.0
"""The report of ``mtp benchmark`` as Markdown and as a plot."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mtp_lightning.evaluation.benchmark import Setting
from mtp_lightning.evaluation.reporting import DARK, GREY, LIGHT, decimals, markdown_table, new_figure, save_figure
from mtp_lightning.metrics.functional import REPETITION_THRESHOLD

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ALL, MEAN = "all prompts", "mean of domains"


def markdown(report: dict[str, Any]) -> str:
    """The report, as the command writes it to JSON, as text."""
    return "\n".join(_lines(report)) + "\n"


def _lines(report: dict[str, Any]) -> Iterator[str]:
    options, texts = report["options"], report["texts"]
    choice = f"temperature {options['temperature']}" if options["temperature"] else "greedy"
    steps = "" if options["max_steps"] is None else f" and {options['max_steps']} steps"
    yield f"# Benchmark of {report['model']}"
    yield ""
    yield (
        f"Base model {report['base_model']}, {report['dtype']} on {report['device']};"
        f" {_count(texts['overall']['num_prompts'])} of {report['prompts']}, at most {options['max_new_tokens']} tokens"
        f"{steps} each, {choice}, batch {options['batch_size']}. Torch {report['torch']}, {report['threads']} threads."
    )
    yield from ("", "## Acceptance length", "")
    yield "Tokens generated over forward passes of the base, by masks in a block."
    for family, by_masks in _families(report).items():
        yield from ("", f"**{family}**", "")
        yield from markdown_table(["domain", *by_masks], _length_rows(report, by_masks))
    yield from ("", "## The texts", "")
    yield from _text_figures(texts)
    yield ""
    yield from _lossless(report)
    if report["order"]:
        yield from ("", "Share of prompts where the expected order fails:", "")
        for name, shares in report["order"].items():
            yield f"- {name}: {', '.join(decimals(share) for share in shares)}"
    if report["speed"] is not None:
        yield ""
        yield from _speed(report["speed"], options)


def _families(report: dict[str, Any]) -> dict[str, dict[str, dict[str, Any]]]:
    """Figures of the settings by family and number of masks."""
    families: dict[str, dict[str, dict[str, Any]]] = {}
    for figures in report["settings"]:
        setting = Setting(figures["decoding"], figures["sampler_head"], figures["num_masks"])
        families.setdefault(setting.family, {})[str(setting.num_masks)] = figures
    return families


def _length(figures: dict[str, Any], domain: str) -> float | None:
    """Acceptance length in a domain, of all prompts, or the mean over the domains as the paper averages."""
    if domain == MEAN:
        lengths = [group["acceptance_length"] for group in figures["domains"].values()]
        return sum(lengths) / len(lengths)
    length: float | None = (figures["overall"] if domain == ALL else figures["domains"][domain])["acceptance_length"]
    return length


def _length_rows(report: dict[str, Any], by_masks: dict[str, dict[str, Any]]) -> Iterator[list[str]]:
    domains = list(report["texts"]["domains"])
    for domain in [*domains, *([MEAN] if len(domains) > 1 else []), ALL]:
        yield [domain, *(decimals(_length(figures, domain)) for figures in by_masks.values())]
    groups = [figures["overall"]["non_repeating"] for figures in by_masks.values()]
    yield [
        "not repeating (texts)",
        *(f"{decimals(group['acceptance_length'])} ({group['num_prompts']})" for group in groups),
    ]


def _text_figures(texts: dict[str, Any]) -> Iterator[str]:
    yield (
        "Autoregressive decoding by the same model. Repetition inflates the acceptance length; *not repeating* counts texts"
        f" with under {REPETITION_THRESHOLD:.0%} repeated 8-grams."
    )
    yield ""
    rows = []
    for name, figures in [*texts["domains"].items(), (ALL, texts["overall"])]:
        repeated = "-" if figures["repeated_8grams"] is None else f"{figures['repeated_8grams']:.0%}"
        counts = [str(figures["num_prompts"]), str(figures["num_tokens"])]
        rows.append([name, *counts, repeated, str(figures["non_repeating"]["num_prompts"])])
    yield from markdown_table(["domain", "prompts", "tokens", "repeated 8-grams", "not repeating"], rows)


def _lossless(report: dict[str, Any]) -> Iterator[str]:
    counts = [figures["overall"]["lossless"] for figures in report["settings"]]
    equal, checked = sum(count["equal"] for count in counts), sum(count["checked"] for count in counts)
    if not checked:
        yield "Texts were not compared: the rejection rule preserves only the distribution of autoregressive decoding."
        return
    yield f"Equal to autoregressive decoding: {equal} of {checked} texts."
    gaps = [gap for count in counts for difference in count["differences"] if (gap := difference["gap"]) is not None]
    if gaps:
        noise = "(noise included) " if report["options"]["temperature"] else ""
        yield (
            f"Where a text first differs, the two largest scores that the token is chosen from {noise}are at most"
            f" {max(gaps):.2g} apart: {report['dtype']} kernels round differently for different shapes, so near ties flip."
        )


def _speed(speed: dict[str, Any], options: dict[str, Any]) -> Iterator[str]:
    systems = speed["contenders"]
    compared = {baseline for figures in systems.values() for baseline in figures["speed_up"]}
    baselines = [name for name in systems if name in compared]
    yield from ("## Speed", "")
    yield (
        f"{speed['num_rounds']} interleaved rounds of {_count(options['batch_size'])} of one domain; in each, every system"
        " decodes the same prompts. Speed-up: median and quartiles of the ratios within a round. Equal: texts that equal"
        " autoregressive decoding."
    )
    yield ""
    rows = []
    for name, figures in systems.items():
        equal, checked = figures["equal_texts"]
        speed_ups = [_ratio(figures["speed_up"].get(baseline)) for baseline in baselines]
        rate = f"{figures['tokens_per_second']:.1f}"
        rows.append([name, decimals(figures["acceptance_length"]), f"{equal}/{checked}", rate, *speed_ups])
    header = ["system", "acceptance length", "equal", "tokens/s", *(f"over {baseline}" for baseline in baselines)]
    yield from markdown_table(header, rows)
    first = next(iter(systems))  # autoregressive decoding
    domains = list(systems[first]["domains"])
    if domains and baselines:
        yield from ("", f"Over {first}, by domain:", "")
        others = {name: figures["domains"] for name, figures in systems.items() if name != first}
        rows = [[name, *(_ratio(by_domain[domain][first]) for domain in domains)] for name, by_domain in others.items()]
        yield from markdown_table(["system", *domains], rows)


def _count(prompts: int) -> str:
    return "1 prompt" if prompts == 1 else f"{prompts} prompts"


def _ratio(spread: dict[str, Any] | None) -> str:
    if spread is None:
        return "-"
    low, high = spread["quartiles"]
    return f"{spread['median']:.2f} [{low:.2f}, {high:.2f}]"


def save_benchmark_plot(report: dict[str, Any], path: Path) -> None:
    """Draw acceptance length against masks, one panel for each domain, and the speed-ups; replaces the file atomically."""
    domains = [ALL, *report["texts"]["domains"]]
    columns = min(4, len(domains))
    num_rows = -(-len(domains) // columns)
    has_speed = report["speed"] is not None
    figure = new_figure(3.4 * max(columns, 2), 3.2 * (num_rows + has_speed))
    grid = figure.add_gridspec(num_rows + has_speed, columns)
    shared: Any = None
    for index, domain in enumerate(domains):
        axes = figure.add_subplot(grid[index // columns, index % columns], sharey=shared)
        shared = shared or axes
        _draw_lengths(axes, _families(report), domain)
        if index % columns == 0:
            axes.set_ylabel("acceptance length (tokens per step)")
    shared.set_ylim(bottom=0.95)  # after all curves are drawn: a fixed limit ends autoscaling
    figure.legend(*shared.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    if has_speed:
        _draw_speed(figure.add_subplot(grid[num_rows, :]), report["speed"])
    figure.suptitle(f"{report['model']}: {_count(report['texts']['overall']['num_prompts'])}", fontsize=11)
    save_figure(figure, path, dpi=130)


def _draw_lengths(axes: Axes, families: dict[str, dict[str, dict[str, Any]]], domain: str) -> None:
    """One curve for each family, dashed for linear decoding."""
    for family, by_masks in families.items():
        lengths: list[Any] = [_length(figures, domain) for figures in by_masks.values()]
        style = "--" if family.startswith("linear") else "-"
        axes.plot(list(by_masks), lengths, style, marker="o", markersize=3, label=family)
    axes.set_title(domain, fontsize=10)
    axes.set_xlabel("masks in a block")
    axes.grid(alpha=0.3)


def _draw_speed(axes: Axes, speed: dict[str, Any]) -> None:
    """A bar for each system: its speed-up over autoregressive decoding, with quartiles."""
    baseline = next(iter(speed["contenders"]))
    spreads = {name: figures["speed_up"].get(baseline) for name, figures in speed["contenders"].items()}
    spreads = {name: spread for name, spread in spreads.items() if spread is not None}
    medians = [spread["median"] for spread in spreads.values()]
    below = [spread["median"] - spread["quartiles"][0] for spread in spreads.values()]
    above = [spread["quartiles"][1] - spread["median"] for spread in spreads.values()]
    places = range(len(spreads))
    axes.bar(places, medians, yerr=[below, above], color=LIGHT, ecolor=DARK, capsize=3)
    axes.axhline(1, color=GREY, linewidth=1, linestyle="--")
    axes.set_xticks(places, [name.replace(", ", ",\n").replace("s ", "s\n", 1) for name in spreads], fontsize=7)
    axes.set_ylabel(f"speed-up over\n{baseline}")
    axes.set_title(f"median and quartiles of {speed['num_rounds']} interleaved rounds", fontsize=9)
