# SPDX-License-Identifier: Apache-2.0
"""Saving what is trained as a folder of safetensors and JSON. ``saved_folder.py`` reads it."""

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
from mtp_lightning.modeling.decoder import text_config
from mtp_lightning.modeling.network import MTPNetwork
from mtp_lightning.paths import PACKAGE, absolute_name, check_writable
from mtp_lightning.saving.base_identity import layer_shape
from mtp_lightning.saving.checkpoint import checkpoint_parts, read_checkpoint
from mtp_lightning.saving.export_options import ExportOptions
from mtp_lightning.saving.lineage import base_license, run_lineage
from mtp_lightning.saving.load import build_network
from mtp_lightning.saving.model_card import benchmark_figures, card, read_figures
from mtp_lightning.saving.saved_folder import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_FILE,
    CONFIG_FILE,
    FORMAT,
    HEADS_FILE,
    PEFT_PREFIX,
    VERSION,
    file_digest,
    read_config,
)
from mtp_lightning.saving.sglang import check_for_sglang
from mtp_lightning.saving.trained_parts import head_settings

CARD_FILE = "README.md"
_GENERATE = '''# SPDX-License-Identifier: Apache-2.0
"""For transformers: base.generate(**inputs, custom_generate=HERE, mtp_model=HERE, trust_remote_code=True)."""

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
    lineage: dict[str, Any] | None = None,
    weights: dict[str, Tensor] | None = None,
    hub_name: str = "",
    base_name: str | None = None,
) -> None:
    """Write a saved folder; see ``MTPModel.save_pretrained``.

    A saved folder is replaced, and files of others in it are kept. ``weights`` are saved instead of the model's trained
    ones; ``hub_name`` is the hub repository that the folder goes to; ``base_name`` is the hub id of a base that was loaded
    from somewhere else.
    """
    name = base_name or absolute_name(base_model or model.base_model)
    if not name:
        raise UsageError("the base model was not loaded from a folder or the hub: name it with base_model.")
    if model.is_sharded:
        raise UsageError("the model is sharded over processes. Save a checkpoint and use mtp export.")
    path = Path(folder)
    check_target(path)
    config: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "base_model": name,
        "revision": revision or (None if base_model or base_name else model.revision),
        "base": {"shape": layer_shape(text_config(model.base))},
        "num_masks": model.num_masks,
        "mask_tokens": model.mask_tokens,
        # For other engines: the random tokens at m_1..m_k, and where the LoRA acts if PEFT alone loads it.
        "noise_tokens": model.noise_tokens.tolist(),
        "peft_alone": "lora_off" if is_switched_off(model) else "lora_everywhere",
        "lora": asdict(model.lora),
        "sampler_head": head_settings(model.sampler_head),
        "acceptance": acceptance or model.acceptance,
        "lineage": lineage or model.lineage,
        "files": {},
    }
    trained = trained_weights(model) if weights is None else weights
    adapter = {
        PEFT_PREFIX + name.removeprefix("base.").replace(".default.weight", ".weight"): value
        for name, value in trained.items()
        if ".lora_" in name
    }
    heads = {name: value for name, value in trained.items() if ".lora_" not in name}
    with atomic_folder(path) as target:
        _write_json(_adapter_config(model, name, config["revision"]), target / ADAPTER_CONFIG_FILE)
        _write_tensors(adapter, target / ADAPTER_FILE)
        _write_tensors(heads, target / HEADS_FILE)
        if model.tokenizer is not None:
            model.tokenizer.save_pretrained(target)
        (target / "custom_generate").mkdir()
        (target / "custom_generate" / "generate.py").write_text(_GENERATE.format(name=hub_name))
        (target / "custom_generate" / "requirements.txt").write_text("mtp-lightning\n")
        files = sorted(file for file in target.rglob("*") if file.is_file())
        config["files"] = {file.relative_to(target).as_posix(): file_digest(file) for file in files}
        _write_json(config, target / CONFIG_FILE)
        (target / CARD_FILE).write_text(
            card(config, bool(getattr(model.tokenizer, "chat_template", None))), encoding="utf-8"
        )
        _keep_foreign_files(path, target)


def trained_weights(model: MTPNetwork) -> dict[str, Tensor]:
    """Trained weights by their names in ``MTPNetwork``, and the sampler head's buffers."""
    weights = {name: p.detach() for name, p in model.named_parameters() if ".lora_" in name}
    if model.mask_embeddings is not None:
        weights["mask_embeddings"] = model.mask_embeddings.detach()
    if model.sampler_head is not None:
        weights |= {f"sampler_head.{name}": value for name, value in model.sampler_head.state_dict().items()}
    return weights


def check_target(path: Path) -> None:
    """Refuse to write over anything but a saved folder or an empty one."""
    if path.is_dir():
        if any(path.iterdir()):
            try:
                read_config(path)
            except RunError as error:
                raise RunError(f"{path} exists and was not written by mtp export. Choose another folder.") from error
    else:
        check_writable(path)


def _keep_foreign_files(path: Path, target: Path) -> None:
    """Copy what others have put into the saved folder that is replaced."""
    ours = {*(read_config(path)["files"] if (path / CONFIG_FILE).is_file() else ()), CONFIG_FILE, CARD_FILE}
    for file in path.rglob("*"):
        name = file.relative_to(path)
        if file.is_file() and name.as_posix() not in ours and not (target / name).exists():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(file, target / name)


def is_switched_off(model: MTPNetwork) -> bool:
    """True if PEFT alone must not apply the adapter: it is gated, and not the plain LoRA of noise tokens."""
    return model.lora.gated and model.mask_tokens == "learned"


def _adapter_config(model: MTPNetwork, base_model: str, revision: str | None) -> dict[str, Any]:
    """Content of PEFT's ``adapter_config.json``."""
    settings = model.adapter_config.to_dict()
    settings |= {"base_model_name_or_path": base_model, "revision": revision, "inference_mode": True}
    if is_switched_off(model):
        # Two safeguards, because nothing but this package knows the gate: everything else must give the base model.
        # PEFT's "activated LoRA" acts behind a sequence that calls it, which no text contains. A reader without it (PEFT
        # before 0.18, vLLM) scales the update by alpha / r = 0. Our own alpha is in mtp_config.json.
        settings["alora_invocation_tokens"] = [int(model.unembed.vocab_size) - 1] * 16
        settings["lora_alpha"] = 0
    settings = LoraConfig(**settings).to_dict()
    return {key: sorted(value) if isinstance(value, set) else value for key, value in settings.items()}


def _write_tensors(tensors: dict[str, Tensor], file: Path) -> None:
    # copy: safetensors refuses tensors that share memory, as a GRU's flattened weights do.
    copies = {name: value.detach().to("cpu", copy=True).contiguous() for name, value in tensors.items()}
    # Not save_file, whose files only their owner may read.
    file.write_bytes(save(copies, metadata={"format": "pt"}))


def _write_json(data: dict[str, Any], file: Path) -> None:
    file.write_text(json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def export_checkpoint(
    checkpoint: str | Path, folder: str | Path, options: ExportOptions, dtype: str | torch.dtype | None = None
) -> str:
    """Save a checkpoint as a folder, and upload it if asked for; RunError if a file can't be used or the folder is taken.

    Weights are saved in ``dtype``; None: the one they were trained in. Returns the name of the base in the folder.
    """
    path = Path(checkpoint)
    check_target(Path(folder))
    content = read_checkpoint(path)
    run = path.absolute().parent.parent
    figures: dict[str, Any] | None
    if options.benchmark is not None:
        figures = benchmark_figures(Path(options.benchmark))
    else:
        figures = read_figures(Path(options.acceptance or run / "acceptance.json"), content.get("global_step"))
    parts = checkpoint_parts(content, path)
    if options.format == "sglang":
        check_for_sglang(parts)
    weights = parts.weights
    if dtype is not None:
        weights = {name: value.to(dtype) if value.is_floating_point() else value for name, value in weights.items()}
    named = options.base_name or absolute_name(options.base_model or parts.base_model)
    if options.push is not None:
        check_public(named)
    model = build_network(MTPNetwork, parts, base_model=options.base_model, revision=options.revision)
    lineage = run_lineage(content, run / "config.yaml")
    lineage["license"] = options.license or base_license(model.base_model, model.revision)
    base = {"base_model": model.base_model, "revision": options.revision if options.base_name else model.revision}
    save_model(
        model,
        folder,
        **base,
        base_name=options.base_name,
        acceptance=figures,
        lineage=lineage,
        weights=weights,
        hub_name=options.push or "",
    )
    if options.push is not None:
        upload(Path(folder), options.push, options.private or None)
    return named


def check_public(base: str) -> None:
    """Refuse to publish a folder whose base only this machine has."""
    if Path(base).is_absolute() or base.startswith(PACKAGE):
        raise UsageError(f"the base model is {base}, only on this machine: give its hub id (--base_name, base_model).")


def push_model(
    model: MTPNetwork,
    name: str,
    private: bool | None = None,
    token: str | None = None,
    commit_message: str = "Upload with mtp-lightning",
    **options: Any,
) -> str:
    """Upload a saved folder to the hub; see ``MTPModel.push_to_hub``."""
    check_public(absolute_name(options.get("base_model") or model.base_model))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "saved"
        save_model(model, folder, hub_name=name, **options)
        return upload(folder, name, private, token, commit_message)


def upload(
    folder: Path, name: str, private: bool | None, token: str | None = None, message: str = "Upload with mtp-lightning"
) -> str:
    """Upload a saved folder; returns the address of the commit. RunError if the hub refuses or can't be reached."""
    api = HfApi(token=token)
    try:
        api.create_repo(name, private=private, exist_ok=True)
        return str(api.upload_folder(repo_id=name, folder_path=folder, commit_message=message))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise RunError(f"{name} can't be uploaded: {one_line(error)}. Check the name and the token.") from error
