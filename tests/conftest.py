# SPDX-License-Identifier: Apache-2.0
"""Settings that every test runs under. Tiny models are made by ``tiny.py``."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Before transformers and datasets are imported: no test may need the network or read what an earlier session cached.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
_CACHE = tempfile.TemporaryDirectory(prefix="mtp-tests-")
os.environ["HF_DATASETS_CACHE"] = os.environ["MTP_CACHE"] = _CACHE.name

import pytest  # noqa: E402
import torch  # noqa: E402

if TYPE_CHECKING:
    from injected_drafts import InjectedDrafts
    from zygote import Zygote

    from mtp_lightning.model import MTPModel

# Tiny tensors: a second thread costs more than it brings, and one makes the order of sums repeatable.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def restore_imports(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """``main`` appends the current folder to ``sys.path``; what is imported from there must not reach the next test."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield
    for name in ("my_losses", "my_heads"):
        sys.modules.pop(name, None)


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, list[Any] | str], str]:
    """Writes rows as JSON lines, or a text as it is, and gives the path as a string."""

    def write_file(name: str, content: list[Any] | str) -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        text = content if isinstance(content, str) else "".join(json.dumps(row) + "\n" for row in content)
        path.write_text(text, encoding="utf-8", newline="")
        return str(path)

    return write_file


@pytest.fixture(scope="session")
def zygote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[object]:
    """Starts processes that run the program; see ``zygote.py``."""
    from zygote import Zygote

    started = Zygote(tmp_path_factory.mktemp("cache"))
    yield started
    started.close()


@pytest.fixture(scope="session")
def whole(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny run that nothing interrupted; not to be changed."""
    from interrupted_runs import FIT
    from tiny_run import write_run

    folder = tmp_path_factory.mktemp("whole")
    write_run(folder)
    ended = zygote.run(folder, *FIT)
    assert ended.code == 0, ended.err
    return folder


@pytest.fixture(scope="session")
def accumulated(zygote: Zygote, whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Like ``whole``, with accumulated gradients."""
    from interrupted_runs import ACCUMULATED, FIT, fresh

    folder = fresh(whole, tmp_path_factory.mktemp("accumulated") / "run")
    ended = zygote.run(folder, *FIT, *ACCUMULATED)
    assert ended.code == 0, ended.err
    return folder


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, data, a configuration and what one run of ``fit`` wrote; not to be changed."""
    from trained_run import train

    folder = tmp_path_factory.mktemp("trained")
    train(folder)
    return folder


@pytest.fixture
def here(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder of a test: a copy of ``trained``."""
    folder = tmp_path / "here"
    shutil.copytree(trained, folder, ignore=lambda at, names: {"run"} & set(names))
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def run(trained: Path, here: Path) -> Path:
    """The run's folder in ``here``."""
    shutil.copytree(trained / "run", here / "run")
    return here / "run"


@pytest.fixture(scope="session")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``base`` and ``saved``; not to be changed."""
    from saved import saved_model

    folder = tmp_path_factory.mktemp("kept")
    saved_model(folder)
    return folder


@pytest.fixture
def saved_copy(kept: Path, tmp_path: Path) -> Path:
    """A copy of ``saved``, to be changed."""
    folder = tmp_path / "saved"
    shutil.copytree(kept / "saved", folder)
    return folder


@pytest.fixture
def inject(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., InjectedDrafts]]:
    """Replace the drafts of a model for one test; see ``injected_drafts.py``."""
    from injected_drafts import InjectedDrafts

    from mtp_lightning.decoding.execution import step as decoding_step

    models = []

    def start(model: MTPModel, *args: Any) -> InjectedDrafts:
        model._forward_pre_hooks.clear()
        monkeypatch.setattr(decoding_step, "draft_block", drafts := InjectedDrafts(model, *args))
        models.append(model)
        return drafts

    yield start
    for model in models:
        model._forward_pre_hooks.clear()
