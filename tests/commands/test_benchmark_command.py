# SPDX-License-Identifier: Apache-2.0
"""``mtp benchmark`` on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_line import error_of, mtp
from tiny_run import LAST

from mtp_lightning.evaluation.benchmark_report import markdown
from mtp_lightning.evaluation.benchmark_speed import AUTOREGRESSIVE, LOOKUP, TRANSFORMERS


def test_the_command(run: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["benchmark", LAST, "--prompts", "prompts.jsonl", "--max_new_tokens", 8, "--dtype", "float64"]
    assert mtp(*words, "--speed_rounds", 2) == 0
    out, err = capsys.readouterr()
    report = json.loads(Path("benchmark/benchmark.json").read_text())
    assert {path.name for path in Path("benchmark").iterdir()} == {"benchmark.json", "benchmark.md", "benchmark.png"}
    assert out == Path("benchmark/benchmark.md").read_text() == markdown(report)
    assert "quadratic, sampler head, 2 masks: 2 of 2 prompts" in err and "speed: 2 of 2 rounds" in err
    settings = {(e["decoding"], e["sampler_head"], e["num_masks"]): e["overall"] for e in report["settings"]}
    assert list(settings) == [
        (decoding, head, masks) for decoding in ("quadratic", "linear") for head in (True, False) for masks in (1, 2, 3)
    ]
    assert all(overall["lossless"] == {"equal": 2, "checked": 2, "differences": []} for overall in settings.values())
    masks = ("1 mask", "2 masks", "3 masks", "auto", "auto without prompt lookup")
    ours = [f"quadratic, sampler head, {count}" for count in masks]
    assert list(report["speed"]["contenders"]) == [AUTOREGRESSIVE, TRANSFORMERS, LOOKUP, *ours]
    assert all(figures["equal_texts"] == [2, 2] for figures in report["speed"]["contenders"].values())
    # Options restrict it.
    options = ["--decoding", "linear", "--sampler_head", "false", "--num_masks", 2, "--batch_size", 2, "--output", "other"]
    assert mtp(*words, *options, "--speed_rounds", 1, "--json", "--num_prompts", 2) == 0
    (setting,) = (small := json.loads(capsys.readouterr().out))["settings"]
    assert (setting["decoding"], setting["sampler_head"], setting["num_masks"]) == ("linear", False, 2)
    assert list(small["speed"]["contenders"]) == [AUTOREGRESSIVE, TRANSFORMERS, "linear, base head, 2 masks"]
    assert setting["overall"]["num_steps"] == settings["linear", False, 2]["num_steps"]


@pytest.mark.parametrize(
    ("options", "code", "named"),
    [
        ("", 2, ["prompts"]),
        ("--prompts prompts.jsonl --batch_size 0", 2, ["batch_size", "got 0"]),
        ("--prompts prompts.jsonl --decoding autoregressive", 2, ["autoregressive"]),
        ("--prompts long.txt", 1, ["long.txt, line 2", "100 tokens", "96"]),
        ("--prompts prompts.jsonl --output config.yaml", 1, ["config.yaml", "not a folder"]),
    ],
)
def test_wrong_command_lines(run: Path, here: Path, capsys, options: str, code: int, named: list[str]) -> None:
    Path("long.txt").write_text("one\n" + "one " * 99 + "\n")
    message = error_of(capsys, code, "benchmark", LAST, *options.split())
    assert all(name in message for name in named), message
    assert not Path("benchmark").exists()
