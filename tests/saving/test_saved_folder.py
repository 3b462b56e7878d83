# SPDX-License-Identifier: Apache-2.0
"""Reading a saved folder: damage is refused, a base that moved is found, and code is imported only from allowed places."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from saved import PROMPT, model_on_disk, saved_model, set_config

from mtp_lightning import MTPModel
from mtp_lightning.errors import RunError, UsageError
from mtp_lightning.saving.saved_folder import file_digest


def edit_heads(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change tensors, and write the new digest."""
    file = folder / "mtp_heads.safetensors"
    heads = load_file(file)
    change(heads)
    save_file(heads, file, metadata={"format": "pt"})
    files = json.loads((folder / "mtp_config.json").read_text())["files"]
    set_config(folder, files={**files, "mtp_heads.safetensors": file_digest(file)})


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated": (lambda f: os.truncate(f / "adapter_model.safetensors", 1000), "adapter_model.safetensors was truncated"),
    "changed": (lambda f: (f / "tokenizer_config.json").write_text("{}"), "tokenizer_config.json was truncated"),
    "missing": (lambda f: (f / "mtp_heads.safetensors").unlink(), "mtp_heads.safetensors is missing"),
    "no JSON": (lambda f: os.truncate(f / "mtp_config.json", 100), "mtp_config.json is not valid JSON"),
    "another version": (lambda f: set_config(f, version=2), "mtp_config.json has version 2"),
    "another number": (lambda f: set_config(f, num_masks=4), "mask_embeddings should be (4, 32) and is (3, 32)"),
    "no such LoRA": (lambda f: set_config(f, lora={"rang": 4}), "its LoRA can't be built"),
    "no tensor": (
        lambda f: edit_heads(f, lambda h: h.pop("sampler_head.output.bias")),
        "sampler_head.output.bias should be",
    ),
    "no head": (
        lambda f: set_config(f, sampler_head={"class_path": "mtp_lightning.model.MTPModel", "init_args": {}}),
        "can't be built: it is not a SamplerHead",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_refused(saved_copy: Path, damage: str) -> None:
    apply, message = DAMAGES[damage]
    apply(saved_copy)
    with pytest.raises(RunError, match=re.escape(message)) as error:
        MTPModel.from_pretrained(saved_copy)
    assert str(saved_copy) in str(error.value) or damage == "no head"


def test_a_pickle_is_not_opened(saved_copy: Path) -> None:
    (saved_copy / "adapter_model.safetensors").unlink()
    torch.save({}, saved_copy / "adapter_model.bin")
    with pytest.raises(RunError, match=r"adapter_model\.safetensors is missing"):
        MTPModel.from_pretrained(saved_copy)


def test_no_folder_file_or_hub_id() -> None:
    with pytest.raises(RunError, match="no folder no/where/at all"):
        MTPModel.from_pretrained("no/where/at all")
    with pytest.raises(RunError, match="'owner/none' is neither a file or folder"):
        MTPModel.from_pretrained("owner/none")


def test_a_folder_that_moved(kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A base given by a relative path is named by an absolute one, and one that moved can be given."""
    model_on_disk(tmp_path)
    monkeypatch.chdir(tmp_path)
    model = MTPModel.from_pretrained(kept / "saved", base_model=str(kept / "base"))
    model.base_model = "base"
    model.save_pretrained("saved")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert MTPModel.from_pretrained("../saved").base_model == str(tmp_path / "base")
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(RunError, match="no folder"):
        MTPModel.from_pretrained("../saved")
    assert MTPModel.from_pretrained("../saved", base_model="../moved").base_model == "../moved"


HEAD = (
    "from torch import nn\nfrom mtp_lightning.sampler_heads import SamplerHead\n\n\n"
    "class Added(SamplerHead):\n"
    "    def build(self, width):\n"
    "        self.layer = nn.Linear(width, width)\n"
    "        self.register_buffer('scale', 2 * self.layer.weight.detach()[0, :1])\n\n"
    "    def forward(self, hidden, previous):\n"
    "        return hidden + self.scale * self.layer(previous)\n\n"
    "    def step(self, hidden, previous, state):\n"
    "        return self(hidden, previous), None\n"
)


def test_a_head_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_heads.py").write_text(HEAD)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    import my_heads

    model = saved_model(tmp_path, head=my_heads.Added())
    expected = model.generate(PROMPT, max_new_tokens=20, num_masks=2)
    # Imported by this process already, as a training script has.
    loaded = MTPModel.from_pretrained("saved")
    assert loaded.sampler_head.scale.equal(model.sampler_head.scale)
    assert loaded.generate(PROMPT, max_new_tokens=20, num_masks=2).accepted_per_step == expected.accepted_per_step
    # In the current folder.
    sys.modules.pop("my_heads")
    MTPModel.from_pretrained("saved")
    sys.modules.pop("my_heads")
    # Somewhere else on the path.
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    message = "importing the sampler head my_heads.Added would run its code"
    with pytest.raises(UsageError, match=message):
        MTPModel.from_pretrained("../saved")
    assert "my_heads" not in sys.modules
    MTPModel.from_pretrained("../saved", trust_remote_code=True)
    sys.modules.pop("my_heads")
    # Brought along by the saved folder.
    (tmp_path / "saved" / "my_heads.py").write_text(HEAD)
    monkeypatch.chdir(tmp_path / "saved")
    monkeypatch.syspath_prepend(tmp_path / "saved")
    with pytest.raises(UsageError, match=message):
        MTPModel.from_pretrained(".")
    assert "my_heads" not in sys.modules
