# SPDX-License-Identifier: Apache-2.0
"""``mtp init``: what it writes is a configuration that fit understands, sized for base and data, and nothing is lost."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from command_line import ParseOnly, error_of, mtp, read_metrics, save_base, write_rows
from toy_tokenizers import CHATML, word_tokenizer

from mtp_lightning.commands.init import (
    EVALUATION_SHARE,
    EVALUATIONS,
    VALIDATION_ROWS,
    Facts,
    chosen,
    expectation,
    limit_steps,
    summary,
)
from mtp_lightning.commands.run_costs import Costs
from mtp_lightning.sampler_heads import GRUSamplerHead

WORDS = ("init", "--base_model", "base", "--data.train", "train.jsonl", "--hours", 0.0001)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    save_base(tmp_path / "base", "llama", word_tokenizer(), torch.bfloat16, max_position_embeddings=32)
    write_rows(tmp_path / "train.jsonl", [{"input_ids": [9 + (n + i) % 6 for i in range(12 + n % 8)]} for n in range(40)])
    return tmp_path


def test_a_configuration_is_written_and_understood(here: Path, capsys) -> None:
    assert mtp(*WORDS) == 0
    shown = capsys.readouterr()
    assert shown.out == "" and "mtp fit mtp.yaml" in shown.err
    settings = ParseOnly("--config", "mtp.yaml").settings
    assert settings.data.max_length == 32  # the context
    assert settings.data.validation_fraction == 0.1  # of fewer than 600 rows
    assert settings.trainer.max_steps == settings.trainer.val_check_interval == 1 and settings.trainer.max_epochs == 10
    assert "1 validation of" in shown.err and "this run has 1. It needs more rows" in shown.err
    assert settings.trainer.default_root_dir == "runs/base"
    written = Path("mtp.yaml").read_text()
    assert "mtp.yaml" in error_of(capsys, 2, *WORDS) and Path("mtp.yaml").read_text() == written
    assert mtp(*WORDS, "--overwrite", "--output", "mtp.yaml", "--revision", "main") == 0
    assert yaml.safe_load(Path("mtp.yaml").read_text())["model"]["revision"] == "main"


def test_the_run_is_validated_at_its_end(here: Path) -> None:
    assert mtp(*WORDS[:-1], 0.003) == 0
    settings = yaml.safe_load(Path("mtp.yaml").read_text())["trainer"]
    assert mtp("fit", "mtp.yaml") == 0
    validated = [int(line["step"]) + 1 for line in read_metrics(Path("runs/base")) if line.get("val/acceptance_length")]
    interval = settings["val_check_interval"]
    assert validated == list(range(interval, settings["max_steps"] + 1, interval)) and validated[-1] == settings["max_steps"]


def test_rows_are_held_out_of_the_largest_data() -> None:
    facts = Facts(10**9, 2048, 4096, True, rows=20_000_000, usual_length=500, cuda=True)
    assert round(facts.rows * chosen(facts, "base", None, "train")["data"]["validation_fraction"]) == VALIDATION_ROWS


@pytest.mark.parametrize(("width", "expected"), [(16, 256), (64, 256), (96, 256), (256, 256), (576, 576)])
def test_the_head_of_a_small_base_is_wide(width: int, expected: int) -> None:
    facts = Facts(10**7, width, 512, False, rows=1000, usual_length=100, cuda=False)
    head = chosen(facts, "base", None, "train")["model"]["sampler_head"]["init_args"]
    assert GRUSamplerHead(**head).state_size(width) == expected


@pytest.mark.parametrize("hours", [0.25, 0.5, 1, 4, 24, 1000])
def test_the_hours_hold_the_validations(hours: float) -> None:
    facts, costs = Facts(10**8, 512, 8192, True, rows=20_000, usual_length=300, cuda=False), Costs(8.5, 2.0, 0.5, 0.2)
    config = chosen(facts, "base", None, "train")
    evaluation = limit_steps(config, facts, costs, hours)
    trainer, decoding = config["trainer"], config["trainer"]["callbacks+"][-1]["init_args"]
    training, evaluating = trainer["max_steps"] * costs.step, evaluation.times * evaluation.seconds(costs)
    assert trainer["max_steps"] == evaluation.times * trainer["val_check_interval"]  # the last step is validated
    assert training + evaluating <= hours * 3600 and evaluating <= EVALUATION_SHARE * 1.05 * (training + evaluating)
    assert decoding["num_prompts"] == evaluation.prompts and config["data"]["eval_max_rows"] == evaluation.rows
    assert (evaluation == EVALUATIONS[0]) == (hours >= 24)
    (text,) = [line for line in summary(config, facts, costs, evaluation, hours, "mtp.yaml") if "take about" in line]
    assert ("limited by" in text) == (hours < 1000)


def test_a_run_that_is_too_short_says_what_helps() -> None:
    facts, costs = Facts(10**8, 512, 8192, True, rows=20_000, usual_length=300, cuda=False), Costs(8.5, 2.0, 0.5, 0.2)
    config = chosen(facts, "base", None, "train")
    seconds = limit_steps(config, facts, costs, 0.2).seconds(costs)
    text = expectation(config, facts, costs, seconds)
    limit_steps(config, facts, costs, float(text.partition("--hours ")[2].split()[0]))
    assert 200 <= config["trainer"]["max_steps"] < 250
    few = facts._replace(rows=20)
    config = chosen(few, "base", None, "train")
    limit_steps(config, few, costs, 10)
    text = expectation(config, few, costs, seconds)
    assert "more rows" in text and "--hours" not in text


def test_conversations_with_a_base_without_a_template(here: Path, capsys) -> None:
    tokenizer = word_tokenizer()
    tokenizer.chat_template = None
    save_base(here / "plain", "llama", tokenizer, torch.bfloat16, max_position_embeddings=32)
    turns = [{"role": "user", "content": "one two"}, {"role": "assistant", "content": "three four five six"}]
    write_rows(here / "chat.jsonl", [{"messages": turns}] * 40)
    words = ["init", "--base_model", "plain", "--data.train", "chat.jsonl", "--hours", 0.0001]
    shown = error_of(capsys, 2, *words)
    assert "data.chat_template" in shown and "chat.jsonl" in shown and "line 1" in shown
    (here / "chat.jinja").write_text(CHATML)
    assert mtp(*words, "--data.chat_template", "chat.jinja") == 0
    assert yaml.safe_load(Path("mtp.yaml").read_text())["data"]["chat_template"] == "chat.jinja"


def test_wrong_input(here: Path, capsys) -> None:
    assert "required: --base_model, --data.train" in error_of(capsys, 2, "init")
    assert "none.jsonl" in error_of(capsys, 1, "init", "--base_model", "base", "--data.train", "none.jsonl")
    assert "nothing" in error_of(capsys, 1, "init", "--base_model", "./nothing", "--data.train", "train.jsonl")
    assert "output" in error_of(capsys, 2, *WORDS, "--output", "mtp.txt")
    assert not Path("mtp.yaml").exists()
