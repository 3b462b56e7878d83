# SPDX-License-Identifier: Apache-2.0
"""Where trained weights come from: the run's data, losses and steps, and the licence of the base."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from mtp_lightning.paths import PACKAGE, resolve
from mtp_lightning.saving.base_identity import cached_hub_file


def public_name(name: str) -> str:
    """The name of a file, folder, hub id or ``package://...`` without the folders of this machine around it.

    ``/home/ada/chats.jsonl -> chats.jsonl``; a hub id and a relative name stay as they are.
    """
    outside = name.startswith(("~", "..")) or Path(name).is_absolute()
    return Path(name).name if outside and not name.startswith(PACKAGE) else name


def run_lineage(checkpoint: dict[str, Any], config_file: Path) -> dict[str, Any]:
    """What a card says of the training, from a checkpoint and the run's ``config.yaml``, which may be missing."""
    config: Any = None
    with suppress(OSError, ValueError, yaml.YAMLError):  # a card without it is better than no card
        config = yaml.safe_load(config_file.read_text(encoding="utf-8"))
    config = config if isinstance(config, dict) else {}
    model, data = (config.get(part) if isinstance(config.get(part), dict) else {} for part in ("model", "data"))
    losses = model.get("losses") or {}
    return {
        "steps": checkpoint.get("global_step"),
        "data": [public_name(name) for name in _sources(data.get("train"))],
        "losses": {
            name: str(term["class_path"]).rpartition(".")[2] for name, term in losses.items() if "class_path" in term
        },
    }


def _sources(train: Any) -> list[str]:
    """The names in ``data.train``: one, several, or a mix with weights."""
    if isinstance(train, str):
        return [train]
    if isinstance(train, dict):
        return [str(name) for name in train]
    return [name for part in train for name in _sources(part)] if isinstance(train, list) else []


def base_license(name: str, revision: str | None) -> str | None:
    """The licence that the base's model card names, on disk or in the hub's cache; None: not known."""
    local = Path(resolve(name)) / "README.md"
    file = local if local.is_file() else cached_hub_file(name, "README.md", revision)
    if file is None:
        return None
    header = re.match(r"---\n(.*?)\n---", file.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    named = re.search(r"^license: *(\S+)", header[1], re.MULTILINE) if header else None
    return named[1].strip("'\"") if named else None
