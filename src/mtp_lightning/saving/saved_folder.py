# SPDX-License-Identifier: Apache-2.0
"""The files of a saved folder, and the checks when one is read. Nothing is unpickled.

``adapter_config.json`` and ``adapter_model.safetensors`` are PEFT's, ``mtp_config.json`` and ``mtp_heads.safetensors`` ours.
Written by ``export.py``.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.constants import HF_HUB_OFFLINE
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mtp_lightning.errors import RunError, UsageError, one_line, os_reason
from mtp_lightning.paths import check_exists
from mtp_lightning.saving.trained_parts import TrainedParts

ADAPTER_CONFIG_FILE, ADAPTER_FILE = "adapter_config.json", "adapter_model.safetensors"
CONFIG_FILE, HEADS_FILE = "mtp_config.json", "mtp_heads.safetensors"
FORMAT, VERSION = "mtp-lightning", 1
CONFIG_TYPES = {
    "base_model": str,
    "revision": str | None,
    "base": dict,
    "num_masks": int,
    "lora": dict,
    "sampler_head": dict | None,
    "acceptance": dict | None,
    "files": dict,
}
"""Keys of ``mtp_config.json`` and their types; ``files`` holds the SHA-256 of every other file but the model card."""
PEFT_PREFIX = "base_model.model."


def find_folder(name: str) -> Path:
    """The folder of a name; a hub id, which may end in ``@`` and a revision, is downloaded or found in the cache."""
    if Path(name).is_dir():
        return Path(name)
    check_exists(name)
    repository, _, revision = name.partition("@")
    patterns = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model", "README.md", "custom_generate/*"]
    try:
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise RunError(f"{name!r} is neither a file or folder nor a hub id: {_hub_reason(error)}.") from error


def _hub_reason(error: Exception) -> str:
    """Why the hub returned nothing, without the client's advice to programmers."""
    if isinstance(error, HFValidationError):
        return "a hub id is owner/name, of letters, digits, -, _ and dots"
    if isinstance(error, RepositoryNotFoundError):
        return "the hub has no such repository, or it is private"
    if isinstance(error, LocalEntryNotFoundError):
        offline = "HF_HUB_OFFLINE is set" if HF_HUB_OFFLINE else "the hub can't be reached"
        return f"it is not in the cache, and {offline}"
    return one_line(error)


def read_folder(path: Path) -> TrainedParts:
    """Read a saved folder and check every file's digest; RunError if one is missing, damaged or changed."""
    config = read_config(path)
    for name, digest in config["files"].items():
        try:
            intact = file_digest(path / name) == digest
        except FileNotFoundError as error:
            raise RunError(f"{path}: {name} is missing. Save or copy the folder again.") from error
        except OSError as error:
            raise RunError(f"{path / name} can't be read: {os_reason(error)}.") from error
        if not intact:
            raise RunError(f"{path}: {name} was truncated, damaged or changed. Save or copy the folder again.")
    weights = {
        "base." + name.removeprefix(PEFT_PREFIX).replace(".weight", ".default.weight"): value
        for name, value in _read_tensors(path / ADAPTER_FILE).items()
    }
    weights |= _read_tensors(path / HEADS_FILE)
    weights.pop("mtp_label_counts", None)  # in folders of version 0.1; unused since
    return TrainedParts(
        source=str(path),
        base_model=config["base_model"],
        revision=config["revision"],
        base_shape=config["base"].get("shape", {}),
        num_masks=config["num_masks"],
        mask_tokens=config.get("mask_tokens", "learned"),
        lora=config["lora"],
        sampler_head=config["sampler_head"],
        weights=weights,
        acceptance=config["acceptance"],
        lineage=config.get("lineage"),  # not in folders of version 0.1
        folder=path,
    )


def read_config(path: Path) -> dict[str, Any]:
    """Read ``mtp_config.json``, with all keys of ``CONFIG_TYPES``; RunError if ``mtp export`` did not write it."""
    file = path / CONFIG_FILE
    if not file.is_file():
        if (path / "config.json").is_file():
            raise RunError(f"{path} is a base model: train an adapter for it (mtp init, mtp fit), or name a trained model.")
        raise RunError(f"{path} is not a folder that mtp export wrote: it has no {CONFIG_FILE}.")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise RunError(f"{file} can't be read: {os_reason(error)}.") from error
    except (ValueError, RecursionError) as error:
        raise RunError(f"{file} is not valid JSON: {one_line(error, 100)}. Save or copy the folder again.") from error
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise RunError(f"{file} was not written by mtp export: its format is not {FORMAT!r}.")
    if config.get("version") != VERSION:
        raise RunError(f"{file} has version {config.get('version')} of the format, not {VERSION}: update mtp-lightning.")
    for key, expected in CONFIG_TYPES.items():
        if key not in config or not isinstance(config[key], expected):
            raise RunError(f"{file} is damaged: {key} is {config.get(key, 'missing')!r}. Save or copy the folder again.")
    return config


def file_digest(file: Path) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while block := opened.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _read_tensors(file: Path) -> dict[str, Tensor]:
    try:
        with safe_open(file, framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError) as error:
        raise RunError(f"{file} can't be read: {one_line(error, 100)}. Save or copy the folder again.") from error


def check_head_source(settings: dict[str, Any] | None, local_folder: Path | None) -> None:
    """Refuse to import a module because a folder names it: importing runs code that the sender may have chosen.

    Allowed are this package's own heads, a module that this process has imported already, and, for a folder on this
    machine (``local_folder``; None: from the hub), a module in the current directory that is not part of the folder.
    """
    if settings is None:
        return
    path = str(settings.get("class_path"))
    module = path.rpartition(".")[0]
    top = module.partition(".")[0]
    if top == "mtp_lightning" or module in sys.modules:
        return
    here = Path.cwd()
    in_current_directory = (here / f"{top}.py").is_file() or (here / top / "__init__.py").is_file()
    if local_folder is not None and in_current_directory and not here.is_relative_to(local_folder.resolve()):
        return
    raise UsageError(
        f"importing the sampler head {path} would run its code: start in the folder of {top}.py, import it first, or give"
        " trust_remote_code."
    )
