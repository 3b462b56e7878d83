# SPDX-License-Identifier: Apache-2.0
"""Opening a saved folder: which files make one, and the checks before a model is made of it. Never unpickles.

``adapter_config.json`` and ``adapter_model.safetensors`` are PEFT's, ``mtp_config.json`` and ``mtp_heads.safetensors`` ours.
Written by ``export.py``.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.constants import HF_HUB_OFFLINE
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel

from mtp_lightning.errors import RunError, UsageError, one_line, os_reason
from mtp_lightning.modeling.base import load_base, load_config, load_tokenizer
from mtp_lightning.modeling.gated_lora import LoRA
from mtp_lightning.modeling.label_counts import LABEL_COUNTS, parse_label_counts
from mtp_lightning.saving.base_identity import check_revision, check_shape, check_vocabulary, check_weights, hub_commit
from mtp_lightning.saving.checkpoint import Network, build_head, check_placement, finish, fit_weights

ADAPTER_CONFIG, ADAPTER = "adapter_config.json", "adapter_model.safetensors"
CONFIG, HEADS = "mtp_config.json", "mtp_heads.safetensors"
FORMAT, VERSION = "mtp-lightning", 1
KEYS = {
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
BASE_KEYS = {"shape": dict, "vocabulary": str | None, "dtype": str, "weights": dict}
LORA_KEYS = {
    "rank": int,
    "alpha": float | int | None,
    "dropout": float | int,
    "target_modules": list | str | None,
    "gated": bool,
}
HEAD_KEYS = {"class_path": str, "init_args": dict}
PEFT_PREFIX = "base_model.model."


class SavedFolder(NamedTuple):
    """A saved folder that was read and found whole.

    Attributes:
        path: where it lies.
        config: ``mtp_config.json``.
        weights: trained weights by their names in ``MTPModel``.
        label_counts: how often each token was a label in training, as it was read; None: not counted.
    """

    path: Path
    config: dict[str, Any]
    weights: dict[str, Tensor]
    label_counts: Tensor | None


def find_folder(name: str) -> Path:
    """The folder of a name; a hub id is downloaded, or found in the cache.

    Args:
        name: a folder, or a hub id, which may end in ``@`` and a revision.

    Returns:
        The folder.

    Raises:
        RunError: it is neither.
    """
    if Path(name).is_dir():
        return Path(name)
    repository, _, revision = name.partition("@")
    patterns = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model", "README.md", "custom_generate/*"]
    try:
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise RunError(
            f"{name!r} is no file or folder here, and no hub id that this machine can reach: {_hub_reason(error)}."
            " Give a .ckpt file, a folder that mtp export wrote, or a hub id."
        ) from error


def _hub_reason(error: Exception) -> str:
    """Why the hub gave no folder, without the client's advice to programmers."""
    if isinstance(error, HFValidationError):
        return "a hub id is owner/name, of letters, digits, -, _ and dots"
    if isinstance(error, RepositoryNotFoundError):
        return "the hub has no such repository, or it is private"
    if isinstance(error, LocalEntryNotFoundError):
        offline = "HF_HUB_OFFLINE is set" if HF_HUB_OFFLINE else "the hub can't be reached"
        return f"it is not in the cache, and {offline}"
    return one_line(error)


def read_folder(path: Path) -> SavedFolder:
    """Read a saved folder and check that it is whole.

    Args:
        path: the folder.

    Returns:
        Its configuration and weights.

    Raises:
        RunError: a file is missing, damaged, changed or of another format; it says which.
    """
    config = read_config(path)
    for name, digest in config["files"].items():
        file = path / name
        if not file.is_file():
            raise RunError(f"{path}: {name} is missing: it was renamed, deleted or not copied. Save or copy it again.")
        try:
            found = file_digest(file)
        except OSError as error:
            raise RunError(f"{file} can't be read: {os_reason(error)}. Change its permissions.") from error
        if found != digest:
            raise RunError(
                f"{path}: {name} is not as it was saved: cut short, damaged or changed. Save or copy the folder again."
            )
    adapter = _tensors(path, ADAPTER)
    weights = {
        "base." + key.removeprefix(PEFT_PREFIX).replace(".weight", ".default.weight"): tensor
        for key, tensor in adapter.items()
    }
    weights |= _tensors(path, HEADS)
    counts = weights.pop(LABEL_COUNTS, None)
    return SavedFolder(path, config, weights, counts)


def read_config(path: Path) -> dict[str, Any]:
    """Read ``mtp_config.json``.

    Args:
        path: the folder.

    Returns:
        What is in it, with all of ``KEYS``.

    Raises:
        RunError: there is none, or it is not ours.
    """
    file = path / CONFIG
    if not file.is_file():
        raise RunError(
            f"{path} is no folder that mtp export wrote: it has no {CONFIG}. Give such a folder, a .ckpt file or a hub id."
        )
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise RunError(f"{file} can't be read: {os_reason(error)}. Change its permissions.") from error
    except (ValueError, RecursionError) as error:
        raise RunError(f"{file} is no JSON: {one_line(error, 100)}. Save or copy the folder again.") from error
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise RunError(f"{file} is of another program: expected format {FORMAT!r}. Give a folder that mtp export wrote.")
    if config.get("version") != VERSION:
        raise RunError(
            f"{file} has version {config.get('version')} of the format, this mtp-lightning reads version {VERSION}."
            " Update mtp-lightning, or save the model again."
        )
    _check_kinds(file, config, KEYS)
    _check_kinds(file, config["base"], BASE_KEYS, "base.")
    _check_kinds(file, config["lora"], {key: LORA_KEYS[key] for key in LORA_KEYS if key in config["lora"]}, "lora.")
    if config["sampler_head"] is not None:
        _check_kinds(file, config["sampler_head"], HEAD_KEYS, "sampler_head.")
    if config["num_masks"] < 1:
        raise RunError(f"{file}: num_masks is {config['num_masks']}, which is below 1. Save or copy the folder again.")
    for name in (ADAPTER_CONFIG, ADAPTER, HEADS):
        if name not in config["files"]:
            raise RunError(f"{file}: files does not name {name}. Save or copy the folder again.")
    return config


def _check_kinds(file: Path, values: dict[str, Any], kinds: dict[str, Any], group: str = "") -> None:
    for key, kind in kinds.items():
        right = key in values and isinstance(values[key], kind) and isinstance(values[key], bool) == (kind is bool)
        if not right:
            found = f"got {values[key]!r}" if key in values else "it is missing"
            raise RunError(f"{file}: {group}{key} is not as mtp export writes it: {found}. Save or copy the folder again.")


def file_digest(file: Path) -> str:
    """SHA-256 of a file."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(opened)


def _digest(opened: Any) -> str:
    """The same for Python 3.10."""
    digest = hashlib.sha256()
    while block := opened.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def _tensors(path: Path, name: str) -> dict[str, Tensor]:
    try:
        with safe_open(path / name, framework="pt") as opened:
            return {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 - it is no dict
    except (SafetensorError, OSError) as error:
        raise RunError(f"{path}: {name} can't be read: {one_line(error, 100)}. Save or copy the folder again.") from error


def load_folder(
    network_class: type[Network],
    name: str,
    base_model: str | None = None,
    revision: str | None = None,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    device_map: Any = None,
    attention: str | None = None,
    quantization: str | None = None,
    base: PreTrainedModel | None = None,
    trust_remote_code: bool = False,
) -> Network:
    """Build a model from a saved folder, for use without Lightning.

    Args:
        network_class: the class to build.
        name: a folder or a hub id; see ``find_folder``.
        base_model: where the base lies now, if it moved.
        revision: hub revision of the base; None: the one that the folder names.
        dtype: dtype of the base; trained weights follow it.
        device: where to put the model.
        device_map: transformers' placement of the base on several devices, ``auto`` or a dict, instead of ``device``.
        attention: ``sdpa``, ``eager``, or None for the architecture's own choice.
        quantization: ``4bit``, ``8bit``, or None.
        base: the base model, loaded already; it gets the adapters in place.
        trust_remote_code: import a sampler head of another package than this one; see ``build_head``.

    Returns:
        The model in evaluation mode.

    Raises:
        RunError: the folder can't be used, or the base is another one.
        UsageError: arguments that exclude each other, or a device that is not there.
    """
    check_placement(device, device_map, base)
    folder = find_folder(name)
    saved = read_folder(folder)
    config = saved.config
    lora, head = _settings(saved, trust_remote_code, local=Path(name).is_dir())
    if base is None:
        there = base_model or config["base_model"]
        commit = revision or (config["revision"] if base_model is None else None)
        described = load_config(there, commit)
        check_shape(config["base"], described.get_text_config(decoder=True), there)
        check_revision(config["revision"], hub_commit(there, commit), there)
        own = load_tokenizer_or_none(there, commit)
        if own is not None:
            check_vocabulary(config["base"], own, there)
        base = load_base(there, commit, dtype, attention, quantization, device if device_map is None else device_map)
        revision = hub_commit(there, commit) or revision
    else:
        there = base_model or base.name_or_path or config["base_model"]
        check_shape(config["base"], base.config.get_text_config(decoder=True), there)
    check_weights(config["base"], base, there)
    tokenizer = None
    if config["base"]["vocabulary"] is not None:
        tokenizer = load_tokenizer(str(folder))
        check_vocabulary(config["base"], tokenizer, str(folder))
    model = network_class(base, config["num_masks"], lora, head, tokenizer)
    complaint = f"{folder}: the weights do not fit {CONFIG}"
    fit_weights(model, saved.weights, complaint)
    model.label_counts = parse_label_counts(saved.label_counts, model.unembed.vocab_size, complaint)
    model.base_model, model.acceptance = there, config["acceptance"]
    model.revision = config["revision"] if there == config["base_model"] else revision
    return finish(model)


def _settings(saved: SavedFolder, trust_remote_code: bool, local: bool) -> tuple[LoRA, Any]:
    """LoRA and sampler head of a folder."""
    path, config = saved.path, saved.config
    adapter = json.loads((path / ADAPTER_CONFIG).read_text(encoding="utf-8"))  # its bytes are those that were saved
    try:
        lora = LoRA(**config["lora"])
    except (TypeError, UsageError) as error:
        raise RunError(f"{path / CONFIG}: lora is not as mtp export writes it: {one_line(error, 100)}.") from error
    if (adapter["r"], adapter["lora_alpha"]) != (lora.rank, lora.effective_alpha):
        raise RunError(
            f"{path}: {CONFIG} names a LoRA of rank {lora.rank} and alpha {lora.effective_alpha}, {ADAPTER_CONFIG} one of"
            f" rank {adapter['r']} and alpha {adapter['lora_alpha']}. Save or copy the folder again."
        )
    check_head(config["sampler_head"], trust_remote_code, path if local else None)
    try:
        head = build_head(config["sampler_head"])
    except (TypeError, UsageError) as error:
        raise RunError(f"{path / CONFIG}: sampler_head can't be made: {one_line(error, 100)}.") from error
    return lora, head


def load_tokenizer_or_none(base_model: str, revision: str | None) -> Any:
    """The base's tokenizer, or None where none lies beside it; the folder has its own."""
    try:
        return load_tokenizer(base_model, revision)
    except RunError:
        return None


def check_head(settings: dict[str, Any] | None, trust_remote_code: bool, folder: Path | None) -> None:
    """Refuse to import a module because a folder names it: importing runs code that its sender may have chosen.

    Allowed are this package's own heads, a module that this process has imported already, and, where the folder lies on
    this machine, a module in the current folder that is no part of the saved one.

    Args:
        settings: ``class_path`` and ``init_args``, or None.
        trust_remote_code: allow any.
        folder: the saved folder, or None if it came from the hub.

    Raises:
        UsageError: another module.
    """
    if settings is None or trust_remote_code:
        return
    module = settings["class_path"].rpartition(".")[0]
    top = module.partition(".")[0]
    if top == "mtp_lightning" or module in sys.modules:
        return
    here = Path.cwd()
    own = any(path.is_file() for path in (here / f"{top}.py", here / top / "__init__.py"))
    if folder is not None and own and not here.is_relative_to(folder.resolve()):
        return
    raise UsageError(
        f"the folder's sampler head is {settings['class_path']}, and opening a folder imports no other package: that would"
        " run its code. Import the module first, run where it lies in the current folder, or give trust_remote_code."
    )
