# SPDX-License-Identifier: Apache-2.0
"""What ``mtp benchmark`` recommends, its tables and its plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from prompt_results import result
from rich.console import Console

from mtp_lightning.evaluation.acceptance import summarise
from mtp_lightning.evaluation.benchmark_report import advice, markdown, print_report, save_benchmark_plot, tables


def figures(
    num_accepted: int, speed_up: float | None, domains: tuple[str, ...] = ("code", "maths", "code")
) -> dict[str, Any]:
    texts = enumerate(domains)
    return summarise([result(i, domain, (0, num_accepted, i % 2), lossless=True, speed_up=speed_up) for i, domain in texts])


def setting(masks: int | str, speed_up: float, **options: Any) -> dict[str, Any]:
    shown = {"decoding": "quadratic", "sampler_head": True, "num_masks": masks, "has_head": True, **options}
    return {"name": str(masks), **shown, **figures(1 if masks == "auto" else int(masks), speed_up)}


def report(*settings: dict[str, Any]) -> dict[str, Any]:
    return {
        "model": "a model",
        "prompts": "prompts.jsonl",
        "options": {"max_new_tokens": 20, "max_steps": None, "temperature": 0.0, "batch_size": 1},
        "dtype": "float64",
        "device": "a device",
        "endpoints": None,
        "settings": list(settings),
        "plain": summarise([result(i, d, (0, 0, 0)) for i, d in enumerate(("code", "maths", "code"))]),
        "order": {"more masks are lower: quadratic, sampler head": [0.5]},
    }


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ([setting(2, 1.5), setting(4, 1.6), setting("auto", 1.2)], "--num_masks 4"),
        ([setting(2, 1.5), setting("auto", 1.49)], "--num_masks auto"),  # no clear difference
        ([setting(2, 0.5), setting("auto", 0.9)], "--decoding autoregressive"),
        ([setting(2, 1.5, decoding="linear", sampler_head=False)], "--decoding linear --num_masks 2 --sampler_head false"),
        ([setting(2, 1.5, sampler_head=False, has_head=False)], "--num_masks 2"),
    ],
)
def test_advice(settings: list[dict[str, Any]], expected: str) -> None:
    said = advice(report(*settings))
    assert expected in said and ("3 of 3" in said) == ("autoregressive" not in expected)
    assert "sampler_head" in expected or "sampler_head" not in said


def test_tables() -> None:
    whole = report(setting(1, 0.5), setting(2, 2.0), setting("auto", 1.5), setting(2, 1.0, decoding="linear"))
    overall, lengths, ratios, linear, _ = tables(whole)
    assert [row[0] for row in overall.rows] == ["plain", "1", "2", "auto", "2"]
    # Each text has 3 steps: 3 + 1 + 0 or 1 tokens with one mask, one more with two.
    assert overall.rows[2] == ["2", "1.78", "5.3", "2.00x", "-", "3/3"]  # quartiles need four pairs
    assert overall.rows[0][3:] == ["-", "-", "-"]
    assert lengths.header == ratios.header == ("domain", "1", "2", "auto") and linear.header == ("domain", "2")
    assert lengths.rows == [
        ["code", "1.33", "1.67", "1.33"],
        ["maths", "1.67", "2.00", "1.67"],
        ["all prompts", "1.44", "1.78", "1.44"],
        ["not repeating (3)", "1.44", "1.78", "1.44"],
    ]
    assert ratios.rows == [[name, "0.50x", "2.00x", "1.50x"] for name in ("code", "maths", "all prompts")]
    assert markdown(whole).count("| all prompts |") == 4


def test_terminal_of_80_columns() -> None:
    whole = report(*(setting(masks, 1.5, decoding=d) for d in ("quadratic", "linear") for masks in (*range(1, 9), "auto")))
    for figures in whole["settings"]:
        figures["name"] = f"{figures['decoding']}, sampler head, {figures['num_masks']} masks"
    console = Console(width=80, record=True, file=open("/dev/null", "w"))
    print_report(whole, console)
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= 80 and len(lines[-1]) > 20 and not any("…" in line for line in lines)


def test_plot_and_report_without_domains_or_a_comparison(tmp_path: Path) -> None:
    alone = {"name": "server", "decoding": None, "sampler_head": None, "num_masks": None, "has_head": True}
    whole = report({**alone, **figures(1, None, ("", ""))}) | {"plain": None, "order": {}, "endpoints": {"server": {}}}
    assert len(list(tables(whole))) == 1 and "tokens/s" in advice(whole)
    compared = whole | {"settings": [{**alone, **figures(1, 1.5, ("", ""))}], "plain": figures(0, None, ("", ""))}
    assert "1.50x" in advice(compared)
    save_benchmark_plot(whole, tmp_path / "new" / "benchmark.png")
    save_benchmark_plot(report(setting(2, 1.0), setting("auto", 1.5)), tmp_path / "new" / "other.png")
    assert (tmp_path / "new" / "benchmark.png").read_bytes().startswith(b"\x89PNG")
