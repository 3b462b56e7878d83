# SPDX-License-Identifier: Apache-2.0
"""A tiny base on disk and a model on it that was saved. Helpers of the tests, no tests."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from command_line import save_base
from tiny import tiny_model
from toy_tokenizers import word_tokenizer
from transformers import PreTrainedTokenizerFast

from mtp_lightning.model import MTPModel
from mtp_lightning.modeling.base import load_base, load_tokenizer
from mtp_lightning.modeling.gated_lora import LoRA
from mtp_lightning.modeling.network import MaskTokens
from mtp_lightning.sampler_heads import GRUSamplerHead, SamplerHead

PROMPT = torch.tensor([[9, 10, 11]])
FILES = {
    "README.md",
    "adapter_config.json",
    "adapter_model.safetensors",
    "mtp_config.json",
    "mtp_heads.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "custom_generate/generate.py",
    "custom_generate/requirements.txt",
}


def model_on_disk(
    folder: Path,
    architecture: str = "llama",
    head: SamplerHead | None = None,
    lora: LoRA | None = None,
    tokenizer: PreTrainedTokenizerFast | None = None,
    dtype: torch.dtype = torch.float64,
    mask_tokens: MaskTokens = "learned",
    **options: Any,
) -> MTPModel:
    """A model with random trained parts, whose base lies in ``folder/base``."""
    tokenizer = tokenizer or word_tokenizer()
    save_base(folder / "base", architecture, tokenizer, dtype, **options)
    base = load_base(str(folder / "base"))
    if architecture.endswith("moe"):
        base.set_experts_implementation("eager")  # the default, grouped_mm, has no float64
    model = tiny_model(sampler_head=head, lora=lora, base=base, mask_tokens=mask_tokens)
    model.tokenizer = load_tokenizer(str(folder / "base"))
    return model


def saved_model(folder: Path, **options: Any) -> MTPModel:
    """The same with a GRU head, saved to ``folder/saved``."""
    model = model_on_disk(folder, **{"head": GRUSamplerHead(8), **options})
    model.save_pretrained(folder / "saved")
    return model


def files_of(folder: Path) -> dict[str, bytes]:
    """Path and content of all files of a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def hub_snapshot(cache: Path, name: str, folder: Path) -> Path:
    """A copy of a folder's files in a hub cache, as a download leaves it."""
    place = cache / f"models--{name.replace('/', '--')}"
    shutil.copytree(folder, place / "snapshots" / ("a" * 40))
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("a" * 40)
    return place / "snapshots" / ("a" * 40)


def trained_values(model: MTPModel) -> dict[str, torch.Tensor]:
    """Name and value of what is trained."""
    return {name: p.detach() for name, p in model.trained_parameters()}


def set_config(folder: Path, **values: Any) -> None:
    """Change ``mtp_config.json``."""
    config = json.loads((folder / "mtp_config.json").read_text())
    config.update(values)
    (folder / "mtp_config.json").write_text(json.dumps(config))
