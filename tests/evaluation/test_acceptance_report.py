# SPDX-License-Identifier: Apache-2.0
"""The acceptance table, its plot, and files that are replaced atomically."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prompt_results import result
from rich.console import Console

from mtp_lightning.decoding.options import DecodingOptions
from mtp_lightning.evaluation.acceptance import summarise
from mtp_lightning.evaluation.acceptance_report import print_table, save_plot
from mtp_lightning.evaluation.losslessness import Difference
from mtp_lightning.saving.model_card import acceptance_text, card_figures


def printed(summary: dict[str, Any]) -> str:
    console = Console(width=80, record=True, file=open("/dev/null", "w"))
    print_table(summary, console, "a title", "8 masks in every step", "bfloat16")
    return console.export_text()


def test_table() -> None:
    results = [
        result(0, "code", (0, 2, 1), lossless=True, speed_up=1.5),
        result(1, "a domain with a long name", (0, 0), lossless=False, difference=Difference(4, 8, 9, 0.00012)),
    ]
    text = printed(summarise(results, {"acceptance_length": 1.905, "reference": 2.81}))
    assert max(map(len, text.splitlines()[:8])) <= 80
    rows = {line.split()[0]: line.split() for line in text.splitlines() if line.strip()}
    assert rows["code"][1:] == ["1", "2.00", "2.00", "(1)", "0%", "1/1", "1.50x"]
    assert rows["overall"][1:] == ["2", "1.60", "1.60", "(2)", "0%", "1/2", "1.50x"]
    assert "8 masks in every step" in text and "--num_masks auto" in text
    assert "acceptance length 1.91, reference 2.81, share of reference 0.50" in text
    assert "prompt 1, token 4" in text and "0.00012" in text
    assert "at most 0.00012 apart: bfloat16 rounds differently" in text.replace("\n", " ") and "--exact" in text
    assert "Forced" not in printed(summarise(results)) and "rounds" not in printed(summarise(results[:1]))


def test_quartiles_need_pairs() -> None:
    results = [result(i, "", (0, 1), speed_up=1.0 + i) for i in range(4)]
    assert "quartiles" not in printed(summarise(results[:3])) and "median 2.50x of 4 pairs, quartiles" in printed(
        summarise(results)
    )


def test_the_card_says_why_texts_differ() -> None:
    differs = [result(0, "", (0, 1), lossless=False, difference=Difference(4, 8, 9, 0.00012))]
    latest = {"prompts": "p.jsonl", "options": vars(DecodingOptions()), "dtype": "float32"}
    assert "0.00012 apart: float32 rounds" in acceptance_text(card_figures({**latest, **summarise(differs)}))
    same = [result(0, "", (0, 1), lossless=True)]
    assert "rounds" not in acceptance_text(card_figures({**latest, **summarise(same)}))


def test_plot_of_many_domains(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "acceptance.png"
    save_plot(summarise([result(i, f"domain number {i}", (0, 2, 1)) for i in range(14)]), path)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert list(path.parent.iterdir()) == [path]
