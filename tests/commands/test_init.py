# SPDX-License-Identifier: Apache-2.0
"""``mtp init``: what it writes is a configuration that fit understands, sized for base and data, and nothing is lost."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from command_line import ParseOnly, error_of, mtp, save_base, write_rows
from toy_tokenizers import word_tokenizer

from mtp_lightning.commands.init import VALIDATION_ROWS, Facts, chosen

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
    assert settings.trainer.max_steps >= 5 * settings.trainer.val_check_interval > 0 and settings.trainer.max_epochs == 10
    assert settings.trainer.default_root_dir == "runs/base"
    written = Path("mtp.yaml").read_text()
    assert "mtp.yaml" in error_of(capsys, 2, *WORDS) and Path("mtp.yaml").read_text() == written
    assert mtp(*WORDS, "--overwrite", "--output", "mtp.yaml", "--revision", "main") == 0
    assert yaml.safe_load(Path("mtp.yaml").read_text())["model"]["revision"] == "main"


def test_rows_are_held_out_of_the_largest_data() -> None:
    facts = Facts(10**9, 4096, True, rows=20_000_000, usual_length=500, cuda=True)
    assert round(facts.rows * chosen(facts, "base", None, "train")["data"]["validation_fraction"]) == VALIDATION_ROWS


def test_wrong_input(here: Path, capsys) -> None:
    assert "none.jsonl" in error_of(capsys, 1, "init", "--base_model", "base", "--data.train", "none.jsonl")
    assert "nothing" in error_of(capsys, 1, "init", "--base_model", "./nothing", "--data.train", "train.jsonl")
    assert "output" in error_of(capsys, 2, *WORDS, "--output", "mtp.txt")
    assert not Path("mtp.yaml").exists()
