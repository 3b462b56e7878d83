# SPDX-License-Identifier: Apache-2.0
"""The files of the top-level ``callbacks/`` folder: each adds one callback and drops none."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning import Callback

FOLDER = Path(__file__).parents[2] / "callbacks"
FILES = sorted(FOLDER.rglob("*.yaml"))


def test_there_are_fragments_and_the_table_lists_them() -> None:
    assert len(FILES) >= 3
    table = (FOLDER / "README.md").read_text()
    assert all(f"| `{path.name}` |" in table for path in FILES)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_fragment_appends_one_callback_that_can_be_made(path: Path) -> None:
    text = path.read_text()
    content: dict[str, Any] = yaml.safe_load(text)
    assert list(content) == ["trainer"] and list(content["trainer"]) == ["callbacks+"]
    (entry,) = content["trainer"]["callbacks+"]
    package, _, name = entry["class_path"].rpartition(".")
    made = getattr(import_module(package), name)(**entry["init_args"])
    assert isinstance(made, Callback)
    assert text.startswith("# ") and "# Cost: " in text
    assert f"`{entry['class_path']}`" in (FOLDER / "README.md").read_text()
