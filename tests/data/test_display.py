# SPDX-License-Identifier: Apache-2.0
"""``mtp data``: roles against a row written by hand, counts, colour in a terminal and none elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from command_line import error_of, mtp, save_base, write_rows
from tiny import token_row
from toy_tokenizers import word_tokenizer

from mtp_lightning.data.display import row_pieces, row_text
from mtp_lightning.modeling.masking import build_masked_input
from mtp_lightning.types import MaskedInput, TokenRow


def batch_of(ids: list[int], loss: list[int]) -> MaskedInput:
    labels = torch.full((len(ids),), -100)
    labels[loss] = torch.tensor(ids)[loss]
    row = TokenRow(torch.tensor(ids), labels, torch.zeros(len(ids), dtype=torch.int64), 0)
    return build_masked_input([row, token_row([12], row_id=1)], 2)


def test_roles_by_hand() -> None:
    # one two | three four five: the last token of the question starts a block, the last but one of the answer has no label
    batch = batch_of([9, 10, 11, 12, 13], [2, 3, 4])
    assert [piece[1:] for piece in row_pieces(batch, 0)] == [
        (False, False, [9]),
        (False, True, [10]),
        (True, True, [11]),
        (True, False, [12, 13]),
    ]
    assert row_text(batch, 0, word_tokenizer()).plain == "no loss onetwo▮\nloss    three▮four five"
    assert row_text(batch_of([9, 5, 9], []), 0, word_tokenizer()).plain == "no loss one ⏎ one"


@pytest.fixture
def config(tmp_path: Path) -> Path:
    save_base(tmp_path / "base", "llama", word_tokenizer(), torch.float32)
    write_rows(
        tmp_path / "a.jsonl",
        [{"messages": [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two three four"}]}] * 10,
    )
    settings = {
        "model": {"base_model": str(tmp_path / "base"), "num_masks": 2},
        "data": {"train": str(tmp_path / "a.jsonl"), "max_length": 32, "batch_size": 2, "validation_fraction": 0.2},
        "trainer": {"accelerator": "cpu", "devices": 4, "accumulate_grad_batches": 3, "logger": False},
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(settings))
    return tmp_path / "c.yaml"


def test_command(config: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    assert mtp("data", "--config", config, "--rows", 1) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out and "data.train: 8 rows read; 8 documents" in out
    assert "14 tokens in 1 document, 4 (29 %) carry loss, 3 (21 %) start a block" in out
    lines = ["".join(line.split()) for line in out.splitlines()]  # this toy tokenizer puts spaces as it likes
    begin = lines.index("noloss<|im_start|>user⏎one<|im_end|>⏎<|im_start|>assistant⏎▮")
    assert lines[begin + 1 : begin + 3] == ["losstwo▮three▮four<|im_end|>", "noloss⏎"]
    assert out.count("carry loss, ") == 2  # one row, and the shares of all
    # 8 rows for training: one global batch of 4 devices with 2 rows each, an epoch of one step
    assert "a step on 4 devices: 8 rows, 112 tokens, 24 blocks, 384 positions (masks and padding included); 1 steps" in out
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    assert mtp("data", "--config", config, "--split", "validation") == 0
    out = capsys.readouterr().out
    assert "a step on 4 devices: " in out and "\x1b[32m" in out


def test_wrong_options(config: Path, capsys) -> None:
    for words, named in ((("--rows", 0), "rows"), (("--split", "test"), "data.test"), (("--split", "training"), "split")):
        assert named in error_of(capsys, 2, "data", "--config", config, *words)
