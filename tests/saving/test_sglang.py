# SPDX-License-Identifier: Apache-2.0
"""Folders for SGLang's UNO drafter: rows of one token and noise give our drafts, and what it has no place for is refused."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from saved import PROMPT, model_on_disk
from torch import Tensor
from transformers import AutoModelForCausalLM

from mtp_lightning.decoding.proposer import HeadProposer
from mtp_lightning.errors import UsageError
from mtp_lightning.saving.saved_folder import read_folder
from mtp_lightning.saving.sglang import check_for_sglang, start_line


def drafts_of_layout(stock: PeftModel, text: Tensor, noise: Tensor) -> list[int]:
    """The greedy drafts of SGLang's row [token, noise x (F - 1)]: LoRA off at the token, on at the noise."""
    with stock.disable_adapter():
        cache = stock(text[None], use_cache=True).past_key_values
    return stock(noise[None], past_key_values=cache).logits[0].argmax(-1).tolist()


def test_drafts_are_those_of_our_linear_decoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_on_disk(tmp_path, mask_tokens="noise")
    model.save_pretrained(tmp_path / "saved")
    parts = read_folder(tmp_path / "saved")
    check_for_sglang(parts)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float64)
    stock = PeftModel.from_pretrained(base, tmp_path / "saved")
    made: list[tuple[int, list[int]]] = []
    propose = HeadProposer.propose

    def record(self: HeadProposer, state: Any, plan: Any, result: Any) -> None:
        propose(self, state, plan, result)
        made.extend((row.length, row.block_drafts) for row in state.rows)

    monkeypatch.setattr(HeadProposer, "propose", record)
    text = model.generate(PROMPT, max_new_tokens=24, decoding="linear", num_masks=parts.num_masks).sequences[0]
    made = [(length, drafts) for length, drafts in made if len(drafts) == parts.num_masks]
    assert len(made) > 3 and len({tuple(drafts) for _, drafts in made}) > 1
    for length, drafts in made:  # the token of the row is the last but one: the last was not fed yet
        assert drafts == drafts_of_layout(stock, text[: length - 1], model.noise_tokens)


def test_what_it_has_no_place_for(tmp_path: Path) -> None:
    model_on_disk(tmp_path, mask_tokens="noise").save_pretrained(tmp_path / "saved")
    parts = read_folder(tmp_path / "saved")
    wrong = {
        "mask_tokens": parts._replace(mask_tokens="learned"),
        "sampler_head": parts._replace(sampler_head={"class_path": "a.Head", "init_args": {}}),
        "gated": parts._replace(lora={**parts.lora, "gated": False}),
        "in_proj": parts._replace(weights={"base.model.layers.0.in_proj.lora_A.default.weight": torch.zeros(1, 1)}),
    }
    for word, changed in wrong.items():
        with pytest.raises(UsageError, match=word):
            check_for_sglang(changed)


def test_start_line() -> None:
    words = shlex.split(start_line("owner/base", "main", "a folder", 4))
    options = dict(zip(words[3::2], words[4::2], strict=True))
    assert options["--uno-lora-path"] == "a folder" and options["--revision"] == "main"
    assert options["--speculative-num-draft-tokens"] == "5"
