# SPDX-License-Identifier: Apache-2.0
"""What an earlier version wrote still opens: the run's configuration, its checkpoint, and the folder exported from it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from command_line import mtp, read_metrics

from mtp_lightning import MTPModel

FILES = Path(__file__).parent / "previous_release"
TEXT = [9, 10, 11, 14, 11, 2, 2, 2, 10, 3, 11, 2, 2, 2, 10, 6, 15, 11, 2, 2, 10, 2, 2, 2, 2, 2, 5]
"""What that version generated from the first three tokens, in 23 steps."""


@pytest.fixture
def previous(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The current folder: a copy of what was written."""
    shutil.copytree(FILES, tmp_path / "previous")
    monkeypatch.chdir(tmp_path / "previous")


@pytest.mark.parametrize("name", ["run/checkpoints/last.ckpt", "saved"])
def test_a_model_opens_and_writes_the_same_text(name: str, previous: None) -> None:
    model = MTPModel.from_pretrained(name, base_model="base", dtype="float64")
    out = model.generate(torch.tensor([TEXT[:3]]), max_new_tokens=24, num_masks=3, eos_token_id=[])
    assert out.sequences.tolist() == [TEXT] and out.num_steps.tolist() == [23]


def test_a_run_goes_on(previous: None) -> None:
    words = ["--config", "run/config.yaml", "--ckpt_path", "run/checkpoints/last.ckpt", "--trainer.max_steps", "5"]
    assert mtp("fit", *words) == 0
    assert [line["step"] for line in read_metrics(Path("run")) if line.get("train/loss")] == ["4"]
