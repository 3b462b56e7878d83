# SPDX-License-Identifier: Apache-2.0
"""Saving what is trained as a folder of safetensors and JSON, whole or not at all. ``saved_folder.py`` opens it."""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from peft import LoraConfig
from safetensors.torch import save
from torch import Tensor

from mtp_lightning.errors import RunError, UsageError, one_line
from mtp_lightning.files import atomic_folder
from mtp_lightning.modeling.label_counts import LABEL_COUNTS
from mtp_lightning.modeling.network import MTPNetwork
from mtp_lightning.paths import PACKAGE, absolute_name, why_unwritable
from mtp_lightning.saving.base_identity import describe
from mtp_lightning.saving.checkpoint import class_path, init_args, load_model, read_checkpoint
from mtp_lightning.saving.model_card import card, read_figures
from mtp_lightning.saving.saved_folder import (
    ADAPTER,
    ADAPTER_CONFIG,
    CONFIG,
    FORMAT,
    HEADS,
    PEFT_PREFIX,
    VERSION,
    file_digest,
    read_config,
)

CARD = "README.md"
_GENERATE = '''# SPDX-License-Identifier: Apache-2.0
"""transformers' door: base.generate(**inputs, custom_generate=HERE, mtp_model=HERE, trust_remote_code=True)."""

from mtp_lightning.custom_generate import generate_from

HERE = {name!r}


def generate(model, mtp_model=HERE, **arguments):
    return generate_from(model, mtp_model, **arguments)
'''


def save_model(
    model: MTPNetwork,
    folder: str | Path,
    base_model: str | None = None,
    revision: str | None = None,
    acceptance: dict[str, Any] | None = None,
    weights: dict[str, Tensor] | None = None,
    hub_name: str = "",
) -> None:
    """Write a saved folder: to the side first, then renamed.

    Args:
        model: the model.
        folder: where to; one that was saved before is replaced, with files of others in it kept.
        base_model: what to call the base; None: what it was loaded from.
        revision: its hub commit; None: the one that was loaded.
        acceptance: figures for the card, of ``model_card.card_figures``; None: those that the model came with.
        weights: trained weights by name; None: the model's own.
        hub_name: the hub repository that the folder goes to.

    Raises:
        RunError: the folder is something else, or can't be written.
        UsageError: nothing says what the base is called.
    """
    name = absolute_name(base_model or model.base_model)
    if not name:
        raise UsageError("the base model was not loaded from anywhere: say what it is called with base_model.")
    if model.is_sharded:
        raise UsageError("the model is sharded over processes. Save a checkpoint and use mtp export.")
    path = Path(folder)
    check_target(path)
    revision = revision or (None if base_model else model.revision)
    head = model.sampler_head
    config: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "base_model": name,
        "revision": revision,
        "base": describe(model.base, model.tokenizer),
        "num_masks": model.num_masks,
        "lora": asdict(model.lora),
        "sampler_head": None if head is None else {"class_path": class_path(head), "init_args": init_args(head)},
        "acceptance": acceptance or model.acceptance,
        "files": {},
    }
    trained = trained_weights(model) if weights is None else weights
    with atomic_folder(path) as target:
        _write_adapter(model, trained, target, name, revision)
        heads = {k: v for k, v in trained.items() if ".lora_" not in k}
        if model.label_counts is not None:
            heads[LABEL_COUNTS] = model.label_counts.counts
        _write_tensors(heads, target / HEADS)
        if model.tokenizer is not None:
            model.tokenizer.save_pretrained(target)
        (target / "custom_generate").mkdir()
        (target / "custom_generate" / "generate.py").write_text(_GENERATE.format(name=hub_name))
        (target / "custom_generate" / "requirements.txt").write_text("mtp-lightning\n")
        files = sorted(file for file in target.rglob("*") if file.is_file())
        config["files"] = {file.relative_to(target).as_posix(): file_digest(file) for file in files}
        _write_json(config, target / CONFIG)
        (target / CARD).write_text(card(config), encoding="utf-8")
        if path.exists():
            _keep_others(path, target)


def trained_weights(model: MTPNetwork) -> dict[str, Tensor]:
    """Trained weights by their names in ``MTPModel``, and what else the sampler head keeps."""
    weights = {name: p.detach() for name, p in model.named_parameters() if ".lora_" in name}
    weights["mask_embeddings"] = model.mask_embeddings.detach()
    if model.sampler_head is not None:
        weights |= {f"sampler_head.{name}": value for name, value in model.sampler_head.state_dict().items()}
    return weights


def check_target(path: Path) -> None:
    """Refuse to write over what is no saved folder.

    Args:
        path: the folder to be.

    Raises:
        RunError: something else is there.
    """
    if not path.exists():
        if (reason := why_unwritable(path)) is not None:
            raise RunError(f"{path} can't be written: {reason}. Choose another folder.")
        return
    if path.is_dir():
        if not any(path.iterdir()):
            return
        try:
            read_config(path)
            return
        except RunError as error:
            raise RunError(
                f"{path} is there and was not written by mtp export: {str(error).split('. ')[0]}. Choose another folder."
            ) from error
    raise RunError(f"{path} is a file. Choose a folder for the saved model.")


def _keep_others(path: Path, aside: Path) -> None:
    """Copy what a saved folder holds beside what was saved."""
    ours = {*(read_config(path)["files"] if (path / CONFIG).is_file() else ()), CONFIG, CARD}
    for file in path.rglob("*"):
        name = file.relative_to(path)
        if file.is_file() and name.as_posix() not in ours and not (aside / name).exists():
            (aside / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(file, aside / name)


def _write_adapter(model: MTPNetwork, trained: dict[str, Tensor], folder: Path, name: str, revision: str | None) -> None:
    """PEFT's two files."""
    settings = model.adapter_config.to_dict()
    settings |= {"base_model_name_or_path": name, "revision": revision, "inference_mode": True}
    if model.lora.gated:
        # PEFT's "activated LoRA" acts behind a token that calls it. This one does not exist, so that PEFT, which knows no
        # gate, gives the base model.
        settings["alora_invocation_tokens"] = [int(model.unembed.vocab_size)]
    settings = LoraConfig(**settings).to_dict()
    plain = {key: sorted(value) if isinstance(value, set) else value for key, value in settings.items()}
    _write_json(plain, folder / ADAPTER_CONFIG)
    adapter = {
        PEFT_PREFIX + key.removeprefix("base.").replace(".default.weight", ".weight"): value
        for key, value in trained.items()
        if ".lora_" in key
    }
    _write_tensors(adapter, folder / ADAPTER)


def _write_tensors(tensors: dict[str, Tensor], file: Path) -> None:
    # copy: safetensors refuses tensors that share memory, as a GRU's flattened weights do.
    copies = {name: value.detach().to("cpu", copy=True).contiguous() for name, value in tensors.items()}
    # Not save_file, whose files only their owner may read.
    file.write_bytes(save(copies, metadata={"format": "pt"}))


def _write_json(data: dict[str, Any], file: Path) -> None:
    file.write_text(json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def export_checkpoint(
    checkpoint: str | Path,
    folder: str | Path,
    base_model: str | None = None,
    revision: str | None = None,
    dtype: str | torch.dtype | None = None,
    acceptance: str | Path | None = None,
) -> None:
    """Make a saved folder of a checkpoint. Weights keep the dtype that they were trained in, unless another is named.

    Args:
        checkpoint: a ``.ckpt`` file.
        folder: where to.
        base_model: where the base lies now, if it moved; the folder names this.
        revision: its hub revision.
        dtype: dtype of the saved weights; None: the checkpoint's.
        acceptance: an ``acceptance.json``; None: the run's own, beside the checkpoint's folder, if there is one.

    Raises:
        RunError: a file can't be used, or the folder is something else.
    """
    path = Path(checkpoint)
    if acceptance is not None and not Path(acceptance).is_file():
        raise RunError(f"{acceptance}: expected an acceptance.json, nothing is there. Check the path.")
    check_target(Path(folder))
    state = read_checkpoint(path)
    source = Path(acceptance) if acceptance is not None else path.absolute().parents[1] / "acceptance.json"
    figures = read_figures(source, state.get("global_step"))
    model = load_model(MTPNetwork, path, base_model, revision)
    prefix = "model."
    weights = {k[len(prefix) :]: v for k, v in state["state_dict"].items() if k.startswith(prefix)}
    if dtype is not None:
        weights = {name: value.to(dtype) if value.is_floating_point() else value for name, value in weights.items()}
    save_model(model, folder, model.base_model, model.revision, figures, weights)


def push_model(
    model: MTPNetwork,
    name: str,
    private: bool | None = None,
    token: str | None = None,
    commit_message: str = "Upload with mtp-lightning",
    **options: Any,
) -> str:
    """Upload a saved folder to the hub.

    Args:
        model: the model.
        name: the repository's id; it is made if it is not there.
        private: whether a new repository is private.
        token: the hub's token; None: the one that is logged in.
        commit_message: message of the commit.
        **options: those of ``save_model``.

    Returns:
        Address of the commit.

    Raises:
        RunError: the hub refuses or can't be reached.
        UsageError: the base is a folder of this machine.
    """
    base = absolute_name(options.get("base_model") or model.base_model)
    if Path(base).is_absolute() or base.startswith(PACKAGE):
        raise UsageError(
            f"the base model is {base}, which nobody else has: name its hub id with base_model, its commit with revision."
        )
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "saved"
        save_model(model, folder, hub_name=name, **options)
        api = HfApi(token=token)
        try:
            api.create_repo(name, private=private, exist_ok=True)
            return str(api.upload_folder(repo_id=name, folder_path=folder, commit_message=commit_message))
        except (HfHubHTTPError, HFValidationError, OSError) as error:
            raise RunError(
                f"{name} can't be uploaded: {one_line(error)}. Check the name, the token and the network."
            ) from error
