# SPDX-License-Identifier: Apache-2.0
"""Reading a checkpoint: nothing is unpickled, what is not one is refused, and its settings are compared by meaning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_base

from mtp_lightning.errors import RunError
from mtp_lightning.sampler_heads import GRUSamplerHead
from mtp_lightning.saving.checkpoint import check_settings, read_checkpoint
from mtp_lightning.saving.trained_parts import head_settings

SETTINGS: dict[str, Any] = {
    "base_model": "owner/base",
    "revision": None,
    "base": {"hidden_size": 32, "vocab_size": 17},
    "num_masks": 4,
    "lora": {"rank": 4, "alpha": None, "dropout": 0.0, "target_modules": None, "gated": True},
    "sampler_head": None,
}


def test_a_pickle_that_runs_code_is_not_run(tmp_path: Path) -> None:
    path = tmp_path / "code.ckpt"
    path.write_bytes(b"cos\nsystem\n(S'touch %s'\ntR." % str(tmp_path / "ran").encode())
    with pytest.raises(RunError, match=r"code.ckpt' can't be read"):
        read_checkpoint(path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        (b"", "can't be read"),
        ({"state_dict": {}}, "mtp_settings"),
        ({"mtp_settings": SETTINGS}, "state_dict"),
        ({"mtp_settings": {"base_model": "owner/base"}, "state_dict": {}}, "revision"),
    ],
)
def test_what_is_not_a_checkpoint_is_refused(tmp_path: Path, content: Any, message: str) -> None:
    path = tmp_path / "last.ckpt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(RunError, match=f"last.ckpt' .*{message}"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"num_masks": 3}, "model.num_masks"),
        ({"base": {"hidden_size": 40}}, "model.base_model"),
        ({"lora": {**SETTINGS["lora"], "rank": 8}}, "model.lora.rank"),
        ({"lora": {**SETTINGS["lora"], "alpha": 3.0}}, "model.lora.alpha"),
        ({"lora": {**SETTINGS["lora"], "gated": False}}, "model.lora.gated"),
        ({"sampler_head": {"class_path": "GRU", "init_args": {}}}, "model.sampler_head"),
    ],
)
def test_other_settings_are_refused(changes: dict[str, Any], key: str) -> None:
    with pytest.raises(RunError, match=key):
        check_settings({"mtp_settings": SETTINGS}, {**SETTINGS, **changes})


def test_a_head_may_have_got_arguments_since() -> None:
    saved = {"class_path": "mtp_lightning.sampler_heads.GRUSamplerHead", "init_args": {"hidden_size": 8}}
    earlier = {"mtp_settings": {**SETTINGS, "sampler_head": saved}}
    for head in (GRUSamplerHead(8), GRUSamplerHead(8, normalize=False)):
        check_settings(earlier, {**SETTINGS, "sampler_head": head_settings(head)})
    check_settings(earlier, {**SETTINGS, "sampler_head": saved})
    with pytest.raises(RunError, match="model.sampler_head"):
        check_settings(earlier, {**SETTINGS, "sampler_head": head_settings(GRUSamplerHead(8, normalize=True))})


def test_target_modules_are_compared_by_the_layers_they_select() -> None:
    config = tiny_base("llama").config
    for modules in (["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], "all-linear"):
        expected = {**SETTINGS, "lora": {**SETTINGS["lora"], "target_modules": modules}}
        check_settings({"mtp_settings": SETTINGS}, expected, lambda: config)
    expected = {**SETTINGS, "lora": {**SETTINGS["lora"], "target_modules": r".*\.0\..*proj"}}
    with pytest.raises(RunError, match="model.lora.target_modules"):
        check_settings({"mtp_settings": SETTINGS}, expected, lambda: config)


@pytest.mark.filterwarnings("error")
def test_settings_that_do_not_matter_may_differ() -> None:
    lora = {**SETTINGS["lora"], "dropout": 0.1, "alpha": 8.0}  # null: twice the rank
    check_settings({"mtp_settings": SETTINGS}, {**SETTINGS, "lora": lora, "base": {"hidden_size": 32, "head_dim": 8}})
    check_settings({"mtp_settings": SETTINGS}, {**SETTINGS, "base_model": "/copies/base"})


def test_another_base_of_the_same_shape_is_a_warning() -> None:
    with pytest.warns(UserWarning, match="trained on base model 'owner/base', and 'owner/other' is used"):
        check_settings({"mtp_settings": SETTINGS}, {**SETTINGS, "base_model": "owner/other"})
