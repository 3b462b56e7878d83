# SPDX-License-Identifier: Apache-2.0
"""A saved folder that is not as it was saved is refused, one that moved is found, and code beside it is not run."""

from __future__ import annotations

import json
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
from mtp_lightning.saving import export as exporting


def cut(folder: Path, name: str) -> None:
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: len(content) // 2])


def retouch(folder: Path) -> None:
    """Change one number of one tensor, nothing else of the file."""
    heads = load_file(folder / "mtp_heads.safetensors")
    heads["mask_embeddings"][0, 0] += 1
    save_file(heads, folder / "mtp_heads.safetensors", metadata={"format": "pt"})


def drop_tensor(folder: Path) -> None:
    """Leave a tensor out, and write the new digest."""
    heads = load_file(folder / "mtp_heads.safetensors")
    del heads["sampler_head.output.bias"]
    save_heads(folder, heads)


def add_counts(folder: Path) -> None:
    """Add counts of a smaller vocabulary, and write the new digest."""
    heads = load_file(folder / "mtp_heads.safetensors")
    save_heads(folder, {**heads, "mtp_label_counts": torch.arange(16)})


def save_heads(folder: Path, heads: dict[str, torch.Tensor]) -> None:
    save_file(heads, folder / "mtp_heads.safetensors", metadata={"format": "pt"})
    files = json.loads((folder / "mtp_config.json").read_text())["files"]
    set_config(folder, files={**files, "mtp_heads.safetensors": exporting.file_digest(folder / "mtp_heads.safetensors")})


def make_foreign(folder: Path) -> None:
    (folder / "mtp_config.json").unlink()


AS_SAVED = "is not as it was saved: cut short, damaged or changed. Save or copy the folder again."
REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated adapter": (lambda f: cut(f, "adapter_model.safetensors"), f"{{f}}: adapter_model.safetensors {AS_SAVED}"),
    "truncated heads": (lambda f: cut(f, "mtp_heads.safetensors"), f"{{f}}: mtp_heads.safetensors {AS_SAVED}"),
    "truncated json": (lambda f: cut(f, "mtp_config.json"), "{f}/mtp_config.json is no JSON: .*"),
    "tampered tensor": (retouch, f"{{f}}: mtp_heads.safetensors {AS_SAVED}"),
    "tampered tokenizer": (
        lambda f: (f / "tokenizer_config.json").write_text("{}"),
        f"{{f}}: tokenizer_config.json {AS_SAVED}",
    ),
    "missing tensor": (
        drop_tensor,
        "{f}: the weights do not fit mtp_config.json: sampler_head.output.bias should be (32,) and is absent."
        " It is damaged.",
    ),
    "counts of another vocabulary": (
        add_counts,
        "{f}: the weights do not fit mtp_config.json: mtp_label_counts should be 17 int64 numbers from 0 on and is (16,)"
        " torch.int64. It is damaged.",
    ),
    "tampered count": (
        lambda f: set_config(f, num_masks=4),
        "{f}: the weights do not fit mtp_config.json: mask_embeddings should be (4, 32) and is (3, 32). It is damaged.",
    ),
    "tampered alpha": (
        lambda f: set_config(f, lora={"rank": 4, "alpha": 5.0}),
        "{f}: mtp_config.json names a LoRA of rank 4 and alpha 5.0, adapter_config.json one of rank 4 and alpha 8."
        " Save or copy the folder again.",
    ),
    "tampered lora": (
        lambda f: set_config(f, lora={"rang": 4}),
        "{f}/mtp_config.json: lora is not as mtp export writes it: .*rang.*",
    ),
    "tampered head": (
        lambda f: set_config(f, sampler_head={"class_path": "mtp_lightning.sampler_heads.GRUSamplerHead"}),
        "{f}/mtp_config.json: sampler_head.init_args is not as mtp export writes it: it is missing."
        " Save or copy the folder again.",
    ),
    "no head": (
        lambda f: set_config(f, sampler_head={"class_path": "mtp_lightning.model.MTPModel", "init_args": {}}),
        "the sampler head mtp_lightning.model.MTPModel is no SamplerHead.",
    ),
    "key of another type": (
        lambda f: set_config(f, num_masks="3"),
        "{f}/mtp_config.json: num_masks is not as mtp export writes it: got '3'. Save or copy the folder again.",
    ),
    "another version": (
        lambda f: set_config(f, version=2),
        "{f}/mtp_config.json has version 2 of the format, this mtp-lightning reads version 1."
        " Update mtp-lightning, or save the model again.",
    ),
    "another program": (
        lambda f: (f / "mtp_config.json").write_text("{}"),
        "{f}/mtp_config.json is of another program: expected format 'mtp-lightning'. Give a folder that mtp export wrote.",
    ),
    "foreign": (
        make_foreign,
        "{f} is no folder that mtp export wrote: it has no mtp_config.json. Give such a folder, a .ckpt file or a hub id.",
    ),
    "renamed": (
        lambda f: (f / "adapter_model.safetensors").rename(f / "weights.safetensors"),
        "{f}: adapter_model.safetensors is missing: it was renamed, deleted or not copied. Save or copy it again.",
    ),
    "missing": (
        lambda f: (f / "mtp_heads.safetensors").unlink(),
        "{f}: mtp_heads.safetensors is missing: it was renamed, deleted or not copied. Save or copy it again.",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_folder_that_is_not_as_it_was_saved(saved_copy: Path, case: str) -> None:
    change, message = REFUSED[case]
    change(saved_copy)
    with pytest.raises(RunError) as error:
        MTPModel.from_pretrained(saved_copy)
    found, expected = str(error.value), message.replace("{f}", str(saved_copy))
    assert "\n" not in found
    assert found == expected or re.fullmatch(expected, found), found


def test_a_pickle_is_not_opened(saved_copy: Path) -> None:
    (saved_copy / "adapter_model.safetensors").unlink()
    torch.save({}, saved_copy / "adapter_model.bin")
    with pytest.raises(RunError, match=r"adapter_model\.safetensors is missing"):
        MTPModel.from_pretrained(saved_copy)


def test_no_folder_file_or_hub_id() -> None:
    for name in ("no/where/at all", "owner/none"):
        with pytest.raises(RunError, match=f"'{name}' is no file or folder here, and no hub id that this machine can reach"):
            MTPModel.from_pretrained(name)


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
    with pytest.raises(RunError, match="could not be loaded"):
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
    message = "the folder's sampler head is my_heads.Added, and opening a folder imports no other package"
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
