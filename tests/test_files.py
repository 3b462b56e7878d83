# SPDX-License-Identifier: Apache-2.0
"""Atomic writes: the new content or the old one, and nothing left behind."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from mtp_lightning.errors import RunError
from mtp_lightning.files import atomic_file, atomic_folder, shared_file

NO_SPACE = OSError(28, "No space left on device")


@pytest.mark.parametrize("error", [NO_SPACE, KeyboardInterrupt(), ValueError("wrong")])
def test_a_file_that_fails_leaves_the_previous_one(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "new" / "last.ckpt"
    with atomic_file(path) as file:
        file.write(b"before")
    with pytest.raises(RunError if error is NO_SPACE else type(error)), atomic_file(path) as file:
        file.write(b"half")
        raise error
    assert path.read_bytes() == b"before" and os.listdir(path.parent) == ["last.ckpt"]
    with atomic_file(path) as file:
        file.write(b"after")
    assert path.read_bytes() == b"after" and os.listdir(path.parent) == ["last.ckpt"]


def test_several_processes_may_write_a_shared_file(tmp_path: Path) -> None:
    path = tmp_path / "cached"
    with shared_file(path) as first, shared_file(path) as second:
        first.write(b"one")
        second.write(b"two")
        second.flush()
        first.flush()
    assert path.read_bytes() == b"one" and os.listdir(tmp_path) == ["cached"]  # the second was complete before
    (tmp_path / "plain").touch()
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode  # other users may read what they may read elsewhere


def test_the_system_error_behind_torch_saves_own_is_reported(tmp_path: Path) -> None:
    with (
        pytest.raises(RunError, match="could not be written: No space left"),
        atomic_file(tmp_path / "last.ckpt"),
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("torch.serialization._save", _fail)
            torch.save({"weight": torch.zeros(3)}, tmp_path / "last.ckpt.part")


def _fail(*_: object) -> None:
    raise NO_SPACE


@pytest.mark.parametrize("replaced", [True, False])
@pytest.mark.parametrize("place", ["body", "rename"])
def test_a_folder_that_fails_leaves_the_previous_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, replaced: bool
) -> None:
    path = tmp_path / "saved"
    if replaced:
        path.mkdir()
        (path / "file").write_text("before")
    if place == "rename":
        rename = Path.replace
        monkeypatch.setattr(Path, "replace", lambda self, to: _fail() if "new" in self.name else rename(self, to))
    with pytest.raises(RunError, match="No space left on device"), atomic_folder(path) as folder:
        (folder / "file").write_text("half")
        if place == "body":
            _fail()
    assert os.listdir(tmp_path) == (["saved"] if replaced else [])
    assert not replaced or (path / "file").read_text() == "before"
    monkeypatch.undo()
    with atomic_folder(path) as folder:
        (folder / "file").write_text("after")
    assert (path / "file").read_text() == "after" and os.listdir(tmp_path) == ["saved"]
