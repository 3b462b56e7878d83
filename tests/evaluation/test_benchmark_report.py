# SPDX-License-Identifier: Apache-2.0
"""The Markdown and the plot of ``mtp benchmark``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from prompt_results import result

from mtp_lightning.evaluation.acceptance import summarise
from mtp_lightning.evaluation.benchmark_report import markdown, save_benchmark_plot
from mtp_lightning.evaluation.benchmark_speed import AUTOREGRESSIVE, TRANSFORMERS


def figures(num_accepted: int) -> dict[str, Any]:
    texts = [(0, "code"), (1, "maths"), (2, "code")]
    return summarise([result(i, domain, (0, num_accepted, i % 2), lossless=True) for i, domain in texts])


def speed_up(median: float) -> dict[str, Any]:
    return {"median": median, "quartiles": [median - 0.25, median + 0.25], "num_pairs": 2}


@pytest.fixture
def report() -> dict[str, Any]:
    def system(baselines: dict[str, Any]) -> dict[str, Any]:
        domains = {"code": baselines, "maths": baselines}
        shared = {"equal_texts": [2, 2], "tokens_per_second": 12.345, "acceptance_length": None}
        return {**shared, "speed_up": baselines, "domains": domains}

    return {
        "model": "a model",
        "base_model": "a base",
        "prompts": "prompts.jsonl",
        "options": {"max_new_tokens": 20, "max_steps": None, "temperature": 0.0, "batch_size": 1},
        "dtype": "float64",
        "device": "a device",
        "torch": "0",
        "threads": 1,
        "settings": [
            {"decoding": decoding, "sampler_head": head, "num_masks": masks, **figures(masks)}
            for decoding in ("quadratic", "linear")
            for head in (True, False)
            for masks in (1, 2)
        ],
        "texts": figures(0),
        "order": {"one mask more is lower: quadratic, sampler head": [0.5]},
        "speed": {
            "num_rounds": 2,
            "contenders": {
                AUTOREGRESSIVE: system({TRANSFORMERS: speed_up(0.5)}),
                TRANSFORMERS: system({AUTOREGRESSIVE: speed_up(2)}),
                "quadratic, sampler head, 1 mask": system({AUTOREGRESSIVE: speed_up(2), TRANSFORMERS: speed_up(1)}),
            },
        },
    }


def tables(text: str) -> list[list[list[str]]]:
    """The cells of each Markdown table, without the line below the header."""
    blocks = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    return [[[cell.strip() for cell in line.strip("|").split("|")] for line in [lines[0], *lines[2:]]] for lines in blocks]


def test_markdown(report: dict[str, Any]) -> None:
    text = markdown(report)
    lengths, *_, by_system, by_domain = tables(text)
    assert len(tables(text)) == 4 + 1 + 2
    # Each text has 3 steps: 3 + 1 + 0 or 1 tokens with one mask, one more with two.
    assert lengths == [
        ["domain", "1", "2"],
        ["code", "1.33", "1.67"],
        ["maths", "1.67", "2.00"],
        ["mean of domains", "1.50", "1.83"],
        ["all prompts", "1.44", "1.78"],
        ["not repeating (texts)", "1.44 (3)", "1.78 (3)"],
    ]
    assert "24 of 24 texts" in text
    assert by_system[0][4:] == [f"over {AUTOREGRESSIVE}", f"over {TRANSFORMERS}"]
    assert by_system[1] == [AUTOREGRESSIVE, "-", "2/2", "12.3", "-", "0.50 [0.25, 0.75]"]
    assert by_domain[0] == ["system", "code", "maths"]
    assert by_domain[-1] == ["quadratic, sampler head, 1 mask", *["2.00 [1.75, 2.25]"] * 2]


def test_without_domains_and_speed(report: dict[str, Any], tmp_path: Path) -> None:
    for group in (report["texts"], *report["settings"]):
        group["domains"] = {}
    for setting in report["settings"]:
        setting["num_masks"] = "auto" if setting["num_masks"] == 2 else setting["num_masks"]
    report["speed"] = None
    save_benchmark_plot(report, tmp_path / "new" / "benchmark.png")
    assert (tmp_path / "new" / "benchmark.png").read_bytes().startswith(b"\x89PNG")
    first = tables(markdown(report))[0]
    assert first[0] == ["domain", "1", "auto"]
    assert [row[0] for row in first[1:]] == ["all prompts", "not repeating (texts)"]
