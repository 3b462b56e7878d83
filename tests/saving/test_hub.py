# SPDX-License-Identifier: Apache-2.0
"""Saved folders on the hub: read from its cache at the right commits, and uploaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from saved import FILES, files_of

from mtp_lightning import MTPModel
from mtp_lightning.errors import RunError, UsageError
from mtp_lightning.saving import export as exporting


@pytest.fixture
def hub(kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache with the base at two commits and the saved folder, as downloads leave it; there is no network."""
    cache = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    for name, commits in (("base", ("a" * 40, "b" * 40)), ("mtp", ("c" * 40,))):
        for commit in commits:
            folder = cache / f"models--owner--{name}" / "snapshots" / commit
            for file, content in files_of(kept / "base").items() if name == "base" else ():
                (folder / file).parent.mkdir(parents=True, exist_ok=True)
                (folder / file).write_bytes(content)
        (cache / f"models--owner--{name}" / "refs").mkdir(parents=True)
        (cache / f"models--owner--{name}" / "refs" / "main").write_text(commits[0])
    model = MTPModel.from_pretrained(kept / "saved", base_model="owner/base")
    assert model.revision == "a" * 40
    model.save_pretrained(cache / "models--owner--mtp" / "snapshots" / ("c" * 40))
    return cache


def test_a_hub_id_and_the_revision_of_its_base(hub: Path) -> None:
    config = json.loads((hub / "models--owner--mtp/snapshots" / ("c" * 40) / "mtp_config.json").read_text())
    assert (config["base_model"], config["revision"]) == ("owner/base", "a" * 40)
    for name in ("owner/mtp", "owner/mtp@main", f"owner/mtp@{'c' * 40}"):
        model = MTPModel.from_pretrained(name)
        assert (model.base_model, model.revision) == ("owner/base", "a" * 40)
    (hub / "models--owner--base" / "refs" / "main").write_text("b" * 40)
    assert MTPModel.from_pretrained("owner/mtp").revision == "a" * 40  # the base moved on, the folder's commit is loaded
    with pytest.warns(UserWarning, match=f"revision {'a' * 40} of 'owner/base', and revision {'b' * 40} is used"):
        assert MTPModel.from_pretrained("owner/mtp", revision="main").revision == "b" * 40
    with pytest.raises(RunError, match="nor a hub id"):
        MTPModel.from_pretrained(f"owner/mtp@{'d' * 40}")


def test_push_to_hub(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    class Api:
        def __init__(self, token: str | None) -> None:
            calls.append(token)

        def create_repo(self, name: str, private: bool | None, exist_ok: bool) -> None:
            calls.append((name, private, exist_ok))

        def upload_folder(self, repo_id: str, folder_path: Path, commit_message: str) -> str:
            calls.append((repo_id, commit_message, files_of(folder_path)))
            return "https://hub/commit"

    monkeypatch.setattr(exporting, "HfApi", Api)
    model = MTPModel.from_pretrained(kept / "saved")
    with pytest.raises(UsageError, match="the base model is /.*base, only on this machine"):
        model.push_to_hub("owner/mtp")
    assert calls == []
    options = {"base_model": "owner/base", "revision": "a" * 40, "private": True, "token": "t"}
    assert model.push_to_hub("owner/mtp", **options) == "https://hub/commit"
    token, made, (name, message, files) = calls
    assert (token, made, name, message) == ("t", ("owner/mtp", True, True), "owner/mtp", "Upload with mtp-lightning")
    assert set(files) == FILES
    card = files["README.md"].decode()
    assert "\nbase_model: owner/base\n" in card and f"at revision `{'a' * 40}`" in card and str(kept) not in card
    assert "HERE = 'owner/mtp'" in files["custom_generate/generate.py"].decode()

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("no such token")

    monkeypatch.setattr(Api, "create_repo", refuse)
    with pytest.raises(RunError, match="owner/mtp can't be uploaded: no such token"):
        model.push_to_hub("owner/mtp", **options)
