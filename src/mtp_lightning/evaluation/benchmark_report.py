# SPDX-License-Identifier: Apache-2.0
"""What ``mtp benchmark`` measured, as Markdown and as a plot. Text and drawing alone; nothing is decoded here."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mtp_lightning.evaluation.benchmark import Setting
from mtp_lightning.files import atomic_file
from mtp_lightning.metrics.functional import REPETITION_THRESHOLD

ALL, MEAN = "all prompts", "mean of domains"


def families(report: dict[str, Any]) -> dict[str, dict[str, dict[str, Any]]]:
    """The settings by family and number of masks."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for each in report["settings"]:
        setting = Setting(each["decoding"], each["sampler_head"], each["num_masks"])
        found.setdefault(setting.family, {})[str(setting.num_masks)] = each
    return found


def markdown(report: dict[str, Any]) -> str:
    """The report as text.

    Args:
        report: what the command writes as JSON.

    Returns:
        Markdown.
    """
    return "\n".join(_lines(report)) + "\n"


def _lines(report: dict[str, Any]) -> Iterator[str]:
    options, texts = report["options"], report["texts"]
    sampled = f"temperature {options['temperature']}" if options["temperature"] else "greedy"
    yield f"# Benchmark of {report['model']}"
    yield ""
    yield (
        f"Base model {report['base_model']}, {report['dtype']} on {report['device']};"
        f" {_count(texts['overall']['num_prompts'])} of {report['prompts']}, at most {options['max_new_tokens']} tokens"
        + ("" if options["max_steps"] is None else f" and {options['max_steps']} steps")
        + f" each, {sampled}, batch {options['batch_size']}. Torch {report['torch']}, {report['threads']} threads."
    )
    yield ""
    yield "## Acceptance length"
    yield ""
    yield "Tokens generated over forward passes of the base, by masks in a block."
    for family, by_masks in families(report).items():
        yield ""
        yield f"**{family}**"
        yield ""
        yield from _table(by_masks)
    yield ""
    yield "## The texts"
    yield ""
    yield from _texts(report)
    yield ""
    yield from _lossless(report)
    if report["order"]:
        yield ""
        yield "Share of prompts where what should be ahead is behind:"
        yield ""
        for name, shares in report["order"].items():
            yield f"- {name}: {', '.join(f'{share:.2f}' for share in shares)}"
    if report["speed"] is not None:
        yield ""
        yield from _speed(report["speed"], options)


def lengths(figures: dict[str, Any], domain: str) -> float | None:
    """Acceptance length of a setting in a domain, of all prompts, or the mean over the domains as the paper averages."""
    if domain == ALL:
        value: float | None = figures["overall"]["acceptance_length"]
        return value
    if domain == MEAN:
        values = [each["acceptance_length"] for each in figures["domains"].values()]
        return sum(values) / len(values)
    value = figures["domains"][domain]["acceptance_length"]
    return value


def rows_of(report: dict[str, Any]) -> list[str]:
    """The domains, and what stands below them."""
    domains = list(report["texts"]["domains"])
    return [*domains, *([MEAN] if len(domains) > 1 else []), ALL]


def _table(by_masks: dict[str, dict[str, Any]]) -> Iterator[str]:
    first = next(iter(by_masks.values()))
    domains = list(first["domains"])
    yield "| domain | " + " | ".join(by_masks) + " |"
    yield "|---|" + "---|" * len(by_masks)
    for domain in [*domains, *([MEAN] if len(domains) > 1 else []), ALL]:
        yield f"| {domain} | " + " | ".join(_text(lengths(figures, domain)) for figures in by_masks.values()) + " |"
    steady = [figures["overall"]["non_repeating"] for figures in by_masks.values()]
    yield (
        "| not repeating (texts) | "
        + " | ".join(f"{_text(each['acceptance_length'])} ({each['num_prompts']})" for each in steady)
        + " |"
    )


def _texts(report: dict[str, Any]) -> Iterator[str]:
    yield (
        "Autoregressive decoding by the same model. A loop flatters the acceptance length; *not repeating* counts texts with"
        f" under {REPETITION_THRESHOLD:.0%} repeated 8-grams."
    )
    yield ""
    yield "| domain | prompts | tokens | repeated 8-grams | not repeating |"
    yield "|---|---|---|---|---|"
    for name, figures in [*report["texts"]["domains"].items(), (ALL, report["texts"]["overall"])]:
        repeated = "-" if figures["repeated_8grams"] is None else f"{figures['repeated_8grams']:.0%}"
        steady = figures["non_repeating"]["num_prompts"]
        yield f"| {name} | {figures['num_prompts']} | {figures['num_tokens']} | {repeated} | {steady} |"


def _lossless(report: dict[str, Any]) -> Iterator[str]:
    counts = [each["overall"]["lossless"] for each in report["settings"]]
    equal, checked = sum(each["equal"] for each in counts), sum(each["checked"] for each in counts)
    if not checked:
        yield "Texts were not compared: with the rejection rule only their distribution is that of autoregressive decoding."
        return
    yield f"Equal to autoregressive decoding: {equal} of {checked} texts."
    gaps = [gap for each in counts for difference in each["differences"] if (gap := difference["gap"]) is not None]
    if gaps:
        yield (
            f"Where a text first differs, the two largest scores that the token is chosen from"
            f" {'(noise included) ' * bool(report['options']['temperature'])}are at most {max(gaps):.2g} apart: in"
            f" {report['dtype']} kernels round differently for different shapes, and near ties flip."
        )


def _speed(speed: dict[str, Any], options: dict[str, Any]) -> Iterator[str]:
    compared = {other for each in speed["contenders"].values() for other in each["speed_up"]}
    baselines = [name for name in speed["contenders"] if name in compared]
    yield "## Speed"
    yield ""
    yield (
        f"{speed['num_rounds']} interleaved rounds of {_count(options['batch_size'])} of one domain: in each, every"
        " contender decodes the same. Speed-up: median of the ratios within a round, with quartiles. Equal: texts that are"
        " those of autoregressive decoding."
    )
    yield ""
    yield "| contender | acceptance length | equal | tokens/s | " + " | ".join(f"over {name}" for name in baselines) + " |"
    yield "|---|---|---|---|" + "---|" * len(baselines)
    for name, each in speed["contenders"].items():
        cells = [_ratio(each["speed_up"].get(other)) for other in baselines]
        rate = "-" if each["tokens_per_second"] is None else f"{each['tokens_per_second']:.1f}"
        equal, count = each["equal_texts"]
        yield f"| {name} | {_text(each['acceptance_length'])} | {equal}/{count} | {rate} | " + " | ".join(cells) + " |"
    domains = list(next(iter(speed["contenders"].values()))["domains"])
    if domains and baselines:
        yield ""
        yield f"Over {baselines[0]}, by domain:"
        yield ""
        yield "| contender | " + " | ".join(domains) + " |"
        yield "|---|" + "---|" * len(domains)
        for name, each in speed["contenders"].items():
            if baselines[0] in each["speed_up"]:
                yield f"| {name} | " + " | ".join(_ratio(each["domains"][d][baselines[0]]) for d in domains) + " |"


def _count(prompts: int) -> str:
    return "1 prompt" if prompts == 1 else f"{prompts} prompts"


def _text(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _ratio(value: dict[str, Any] | None) -> str:
    if value is None:
        return "-"
    low, high = value["quartiles"]
    return f"{value['median']:.2f} [{low:.2f}, {high:.2f}]"


def save_benchmark_plot(report: dict[str, Any], path: Path) -> None:
    """Draw acceptance length against masks, one panel a domain, and the speed-ups.

    Args:
        report: what the command writes as JSON.
        path: a ``.png`` file; it is whole at any time.
    """
    # Not pyplot: it keeps global state and may look for a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = rows_of(report)
    panels = [ALL, *[name for name in panels if name not in (ALL, MEAN)]]
    columns = min(4, len(panels))
    height = -(-len(panels) // columns)
    timed = report["speed"] is not None
    figure = Figure(figsize=(3.4 * max(columns, 2), 3.2 * (height + timed)), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(height + timed, columns)
    shared: Any = None
    for index, domain in enumerate(panels):
        axes = figure.add_subplot(grid[index // columns, index % columns], sharey=shared)
        shared = shared or axes
        for family, by_masks in families(report).items():
            values = [value for each in by_masks.values() if (value := lengths(each, domain)) is not None]
            style = "--" if family.startswith("linear") else "-"
            axes.plot(list(by_masks), values, style, marker="o", markersize=3, label=family)
        axes.set_title(domain, fontsize=10)
        axes.set_xlabel("masks in a block")
        axes.grid(alpha=0.3)
        if index % columns == 0:
            axes.set_ylabel("acceptance length (tokens a step)")
    shared.set_ylim(bottom=0.95)  # last, with all curves drawn: a limit set ends the fitting to what is drawn
    figure.legend(*shared.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    if timed:
        _draw_speed(figure.add_subplot(grid[height, :]), report["speed"])
    figure.suptitle(f"{report['model']}: {_count(report['texts']['overall']['num_prompts'])}", fontsize=11)
    with atomic_file(path) as file:
        figure.savefig(file, dpi=130, format="png")


def _draw_speed(axes: Any, speed: dict[str, Any]) -> None:
    baseline = next(iter(speed["contenders"]))
    shown = {
        name: value for name, each in speed["contenders"].items() if (value := each["speed_up"].get(baseline)) is not None
    }
    medians = [value["median"] for value in shown.values()]
    low = [value["median"] - value["quartiles"][0] for value in shown.values()]
    high = [value["quartiles"][1] - value["median"] for value in shown.values()]
    places = range(len(shown))
    axes.bar(places, medians, yerr=[low, high], color="#9dc3e6", ecolor="#1f4e79", capsize=3)
    axes.axhline(1, color="#7f7f7f", linewidth=1, linestyle="--")
    axes.set_xticks(places, [name.replace(", ", ",\n").replace("s ", "s\n", 1) for name in shown], fontsize=7)
    axes.set_ylabel(f"speed-up over\n{baseline}")
    axes.set_title(f"median and quartiles of {speed['num_rounds']} interleaved rounds", fontsize=9)
