# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a run: trained weights only, and the settings they belong to. Plain types, read with ``weights_only``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mtp_lightning.errors import RunError, os_reason
from mtp_lightning.modeling.gated_lora import LoRA, adapted_layers
from mtp_lightning.paths import absolute_name, is_on_disk
from mtp_lightning.sampler_heads import GRUSamplerHead
from mtp_lightning.saving.base_identity import hub_commit, layer_shape, warn_if_other_base
from mtp_lightning.saving.checkpoint_files import SETTINGS
from mtp_lightning.saving.trained_parts import TrainedParts, build_head, head_settings, shape_mismatch

LORA_WEIGHT_SETTINGS = ("rank", "alpha", "target_modules", "gated")
"""Settings of a LoRA that its weights depend on; the dropout may change between runs."""

_MODEL = "model."
"""Prefix of the network's weights in the state dict of an ``MTPModule``."""


def trained_state(state: dict[str, Any]) -> dict[str, Any]:
    """An ``MTPModule``'s state dict without the frozen base: LoRA, mask embeddings, sampler head, loss terms' weights."""
    return {name: value for name, value in state.items() if not name.startswith("model.base.") or ".lora_" in name}


def checkpoint_settings(module: Any) -> dict[str, Any]:
    """What the trained weights of an ``MTPModule`` belong to: base, its shape, masks, LoRA and sampler head; plain types."""
    return {
        "base_model": module.base_model,
        "base_folder": absolute_name(module.base_model),
        # The commit, where the base comes from the hub: a branch moves on.
        "revision": hub_commit(module.base_model, module.revision) or module.revision,
        "base": layer_shape(module.base_config),
        **part_settings(module),
    }


def part_settings(module: Any) -> dict[str, Any]:
    """The settings of the trained parts of an ``MTPModule``: masks, LoRA and sampler head; plain types."""
    return {
        "num_masks": module.num_masks,
        "mask_tokens": module.mask_tokens,
        "lora": asdict(module.lora),
        "sampler_head": head_settings(module.sampler_head),
    }


def named_base(settings: dict[str, Any]) -> str:
    """The base of a checkpoint: the folder or file that was trained on, if it is still there, else its name as given.

    By now a relative name may lead to another folder.
    """
    name: str = settings["base_model"]
    folder: str = settings.get("base_folder", name)
    return folder if absolute_name(name) != folder and (is_on_disk(folder) or not is_on_disk(name)) else name


def check_settings(
    checkpoint: dict[str, Any], expected: dict[str, Any], base_config: Callable[[], Any] | None = None
) -> None:
    """Refuse a checkpoint that does not fit a model's ``checkpoint_settings``; warn if its base has another name.

    ``base_config`` returns the base's configuration, to compare ``target_modules`` that are written differently by the
    layers they select. None: they differ.
    """
    settings = checkpoint.get(SETTINGS)
    if settings is None:
        raise RunError(f"the checkpoint was not written by mtp fit: it has no entry {SETTINGS!r}.")
    compare_settings("the checkpoint", settings, expected, base_config)


def compare_settings(
    source: str, settings: dict[str, Any], expected: dict[str, Any], base_config: Callable[[], Any] | None = None
) -> None:
    """Refuse trained parts whose settings are not those of a configuration; see ``check_settings``."""
    base, expected_base = settings["base"], expected["base"]
    lora, expected_lora = settings["lora"], expected["lora"]
    pairs = [
        *((f"base {k}", base[k], expected_base[k], "model.base_model") for k in base if k in expected_base),
        ("num_masks", settings["num_masks"], expected["num_masks"], "model.num_masks"),
        ("mask_tokens", *(s.get("mask_tokens", "learned") for s in (settings, expected)), "model.mask_tokens"),
        *(
            (f"LoRA {k}", lora[k], expected_lora[k], f"model.lora.{k}")
            for k in LORA_WEIGHT_SETTINGS
            if not _same_lora(k, lora, expected_lora, base_config)
        ),
        *_head_pairs(settings["sampler_head"], expected["sampler_head"], base.get("hidden_size")),
    ]
    for name, value, expected_value, key in pairs:
        if value != expected_value:
            raise RunError(f"{source}: {name} is {value}, the configuration's {expected_value} ({key}).")
    if "base_model" in expected:
        warn_if_other_base(settings["base_model"], settings["revision"], expected["base_model"], expected["revision"])


def _head_pairs(head: Any, expected: Any, width: int | None) -> Iterator[tuple[str, Any, Any, str]]:
    """What two sampler heads on a base of this width are compared by: name, value, expected value and key."""
    if not (head and expected and head["class_path"] == expected["class_path"]):
        yield "sampler head", head, expected, "model.sampler_head"
        return
    arguments = []
    for settings in (head, expected):
        built = build_head(settings)
        found = head_settings(built)  # with arguments that the class did not have then
        assert found is not None
        if isinstance(built, GRUSamplerHead) and width is not None:  # a share, or the number that it stands for
            found["init_args"]["hidden_size"] = built.state_size(width)
        arguments.append(found["init_args"])
    for name, value in arguments[0].items():
        yield f"the sampler head's {name}", value, arguments[1][name], f"model.sampler_head.init_args.{name}"


def _same_lora(key: str, a: dict[str, Any], b: dict[str, Any], base_config: Callable[[], Any] | None) -> bool:
    """True if a setting of two LoRAs means the same, though it may be written differently."""
    if a[key] == b[key] or a["rank"] != b["rank"]:  # other ranks: the rank is reported
        return a[key] == b[key]
    if key == "alpha":
        return LoRA(**a).effective_alpha == LoRA(**b).effective_alpha
    if key == "target_modules" and base_config is not None:
        config = base_config()
        return adapted_layers(config, LoRA(**a)) == adapted_layers(config, LoRA(**b))
    return False


def check_complete(checkpoint: dict[str, Any], state: dict[str, Any]) -> None:
    """Refuse a checkpoint that lacks a trained weight: the model would silently keep its initial value."""
    expected = {name: value for name, value in trained_state(state).items() if name.startswith(_MODEL)}
    weights = {name: value for name, value in checkpoint.get("state_dict", {}).items() if name.startswith(_MODEL)}
    if (mismatch := shape_mismatch(expected, weights)) is not None:
        raise RunError(f"the checkpoint is damaged: {mismatch}.")


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint file without unpickling code; RunError if it is not a complete one of ``mtp fit``."""
    name = f"checkpoint {str(path)!r}"
    if not Path(path).is_file():
        problem = "is a folder" if Path(path).is_dir() else "does not exist"
        raise RunError(f"{name} {problem}. Give the path of a .ckpt file that mtp fit wrote.")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError as error:
        raise RunError(f"{name} can't be read: {os_reason(error)}.") from error
    except Exception as error:  # a file that is not a checkpoint makes the unpickler raise anything
        raise RunError(f"{name} can't be read: it is truncated or not a checkpoint.") from error
    if not isinstance(checkpoint, dict) or SETTINGS not in checkpoint:
        raise RunError(f"{name} was not written by mtp fit: it has no entry {SETTINGS!r}.")
    settings = checkpoint[SETTINGS] if isinstance(checkpoint[SETTINGS], dict) else {}
    required = ("base_model", "revision", "base", "num_masks", "lora", "sampler_head")
    missing = [key for key in required if key not in settings]
    missing += [] if isinstance(checkpoint.get("state_dict"), dict) else ["state_dict"]
    if missing:
        raise RunError(f"{name} is damaged: it has no {missing[0]}.")
    return checkpoint


def checkpoint_parts(checkpoint: dict[str, Any], path: str | Path) -> TrainedParts:
    """The trained parts of a loaded checkpoint, to build a model without Lightning."""
    settings = checkpoint[SETTINGS]
    weights: dict[str, Tensor] = {
        name.removeprefix(_MODEL): value for name, value in checkpoint["state_dict"].items() if name.startswith(_MODEL)
    }
    return TrainedParts(
        source=f"checkpoint {str(path)!r}",
        base_model=named_base(settings),
        revision=settings["revision"],
        base_shape=settings["base"],
        num_masks=settings["num_masks"],
        mask_tokens=settings.get("mask_tokens", "learned"),
        lora=settings["lora"],
        sampler_head=settings["sampler_head"],
        weights=weights,
    )
