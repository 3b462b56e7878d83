# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a run: trained weights only, and the settings they belong to. Plain types, read with ``weights_only``."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mtp_lightning.errors import RunError, UsageError, one_line, os_reason
from mtp_lightning.modeling.base import load_base, load_config, load_tokenizer
from mtp_lightning.modeling.gated_lora import LoRA, adapted_layers
from mtp_lightning.modeling.label_counts import LABEL_COUNTS, parse_label_counts
from mtp_lightning.modeling.network import MTPNetwork
from mtp_lightning.modeling.peft_private import lora_layers
from mtp_lightning.paths import absolute_name, resolve
from mtp_lightning.sampler_heads import SamplerHead
from mtp_lightning.saving.base_identity import hub_commit

Network = TypeVar("Network", bound=MTPNetwork)
SETTINGS = "mtp_settings"
LORA_KEYS = ("rank", "alpha", "target_modules", "gated")


class TrainingSettings(Protocol):
    """What a checkpoint needs to know of the run that writes it; ``MTPModule`` has it."""

    base_model: str
    revision: str | None
    num_masks: int
    lora: LoRA

    @property
    def base_config(self) -> Any:
        """Configuration of the base's text decoder."""
        ...

    @property
    def sampler_head(self) -> SamplerHead | None:
        """The sampler head, or None."""
        ...


def trained_state(state: dict[str, Any]) -> dict[str, Any]:
    """The entries of an ``MTPModule``'s state dict that are not the frozen base.

    Args:
        state: the state dict.

    Returns:
        A smaller state dict: LoRA, mask embeddings, sampler head, and what loss terms own.
    """
    return {name: value for name, value in state.items() if not name.startswith("model.base.") or ".lora_" in name}


def checkpoint_settings(module: TrainingSettings) -> dict[str, Any]:
    """What the trained weights belong to: base, its shape, masks, LoRA and sampler head; plain types."""
    config = module.base_config
    return {
        "base_model": module.base_model,
        "base_folder": absolute_name(module.base_model),
        # The commit, where the base comes from the hub: a branch moves on.
        "revision": hub_commit(module.base_model, module.revision) or module.revision,
        "base": {
            "model_type": config.model_type,
            "hidden_size": int(config.hidden_size),
            "num_hidden_layers": int(config.num_hidden_layers),
            "vocab_size": int(config.vocab_size),
        },
        **part_settings(module),
    }


def named_base(settings: dict[str, Any]) -> str:
    """Where the base of a checkpoint lies: by the name that it was given, else where that name was a folder.

    Args:
        settings: the checkpoint's.

    Returns:
        A name to load it by.
    """
    name: str = settings["base_model"]
    return name if Path(resolve(name)).is_dir() else settings.get("base_folder", name)


def part_settings(module: TrainingSettings) -> dict[str, Any]:
    """The settings of the trained parts: masks, LoRA and sampler head; plain types."""
    head = module.sampler_head
    return {
        "num_masks": module.num_masks,
        "lora": asdict(module.lora),
        "sampler_head": None if head is None else {"class_path": class_path(head), "init_args": init_args(head)},
    }


def class_path(head: SamplerHead) -> str:
    """Import path of a sampler head's class."""
    return f"{type(head).__module__}.{type(head).__qualname__}"


def init_args(head: SamplerHead) -> dict[str, Any]:
    """The arguments that a head was made with: each is kept as an attribute of the same name."""
    names = [name for name in inspect.signature(type(head).__init__).parameters if name not in ("self", "args", "kwargs")]
    missing = [name for name in names if not hasattr(head, name)]
    if missing:
        raise UsageError(
            f"sampler head {class_path(head)} must keep its arguments as attributes of the same name, so that a"
            f" checkpoint can name them; missing: {', '.join(missing)}. Set self.{missing[0]} in __init__."
        )
    return {name: getattr(head, name) for name in names}


def check_settings(
    checkpoint: dict[str, Any], expected: dict[str, Any], base_config: Callable[[], Any] | None = None
) -> None:
    """Refuse a checkpoint whose weights do not fit the model that is to take them.

    Args:
        checkpoint: a loaded checkpoint.
        expected: ``checkpoint_settings`` of the model.
        base_config: gives the base's configuration, asked where ``target_modules`` are said in other words, to find out
            whether they are the same layers. None: other words are other layers.

    Raises:
        RunError: not one of ours, or of another base, number of masks, rank or head.
    """
    found = checkpoint.get(SETTINGS)
    if found is None:
        raise RunError(
            "the checkpoint was not written by mtp fit: it has no entry 'mtp_settings'. Give another --ckpt_path."
        )
    others = [key for key in LORA_KEYS if not _same_lora(key, found["lora"], expected["lora"], base_config)]
    pairs = [
        ("base model", found["base"], expected["base"], "model.base_model"),
        ("num_masks", found["num_masks"], expected["num_masks"], "model.num_masks"),
        *((f"LoRA {k}", found["lora"][k], expected["lora"][k], f"model.lora.{k}") for k in others),
        ("sampler head", found["sampler_head"], expected["sampler_head"], "model.sampler_head"),
    ]
    for name, there, here, key in pairs:
        if there != here:
            raise RunError(
                f"the checkpoint's {name} is {there}, the configuration's is {here}. Change {key} or --ckpt_path."
            )


def _same_lora(key: str, there: dict[str, Any], here: dict[str, Any], base_config: Callable[[], Any] | None) -> bool:
    """Whether a setting means the same, in the same words or in others."""
    if there[key] == here[key] or there["rank"] != here["rank"]:  # then the rank is what differs
        return there[key] == here[key]
    if key == "alpha":
        return LoRA(**there).effective_alpha == LoRA(**here).effective_alpha
    if key == "target_modules" and base_config is not None:
        config = base_config()
        return adapted_layers(config, LoRA(**there)) == adapted_layers(config, LoRA(**here))
    return False


def check_complete(checkpoint: dict[str, Any], state: dict[str, Any]) -> None:
    """Refuse a checkpoint that lacks a trained weight of the model: it would silently keep what it began with.

    Args:
        checkpoint: a loaded checkpoint.
        state: the ``MTPModule``'s state dict.

    Raises:
        RunError: a weight is missing, too many or of another shape.
    """
    there = checkpoint.get("state_dict", {})
    own, found = (
        {name: value for name, value in each.items() if name.startswith("model.")} for each in (trained_state(state), there)
    )
    if (wrong := other_shape(own, found)) is not None:
        raise RunError(f"the checkpoint is damaged: {wrong}. Give another --ckpt_path.")


def other_shape(own: dict[str, Tensor], found: dict[str, Tensor]) -> str | None:
    """The first weight, by name, that is missing, too many or of another shape.

    Args:
        own: a model's weights.
        found: those that are to take their place.

    Returns:
        A few words, or None where all fit.
    """
    shapes, others = ({name: tuple(value.shape) for name, value in each.items()} for each in (own, found))
    for name in sorted(shapes.keys() | others.keys()):
        if shapes.get(name) != others.get(name):
            return f"{name} should be {shapes.get(name, 'absent')} and is {others.get(name, 'absent')}"
    return None


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint file without unpickling code.

    Args:
        path: the file.

    Returns:
        What is in it.

    Raises:
        RunError: missing, truncated, or not written by ``mtp fit``.
    """
    if not Path(path).is_file():
        found = "is a folder" if Path(path).is_dir() else "does not exist"
        raise RunError(f"checkpoint {str(path)!r} {found}. Give the path of a .ckpt file that mtp fit wrote.")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError as error:
        raise RunError(f"checkpoint {str(path)!r} can't be read: {os_reason(error)}. Change its permissions.") from error
    except Exception as error:  # what is no checkpoint makes the unpickler raise anything, a KeyError for a text file
        raise RunError(
            f"checkpoint {str(path)!r} can't be read; it may be cut short or no checkpoint. Use another one."
        ) from error
    if not isinstance(checkpoint, dict) or SETTINGS not in checkpoint:
        raise RunError(
            f"checkpoint {str(path)!r} was not written by mtp fit: it has no entry {SETTINGS!r}. Use another one."
        )
    settings = checkpoint[SETTINGS] if isinstance(checkpoint[SETTINGS], dict) else {}
    needed = ("base_model", "revision", "base", "num_masks", "lora", "sampler_head")
    missing = [name for name in needed if name not in settings]
    if missing or not isinstance(checkpoint.get("state_dict"), dict):
        raise RunError(
            f"checkpoint {str(path)!r} is damaged: it has no {missing[0] if missing else 'state_dict'}. Use another one."
        )
    return checkpoint


def load_model(
    network_class: type[Network],
    path: str | Path,
    base_model: str | None = None,
    revision: str | None = None,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    attention: str | None = None,
    quantization: str | None = None,
    device_map: Any = None,
    base: PreTrainedModel | None = None,
    named: dict[str, Any] | None = None,
) -> Network:
    """Build a model from a checkpoint file, for use without Lightning.

    Args:
        network_class: the class to build.
        path: a ``.ckpt`` file.
        base_model: where the base lies now, if it moved.
        revision: hub revision of the base; None: the one of the checkpoint.
        dtype: dtype of the base; trained weights follow it (decoding needs no float32 copies).
        device: where to put the model.
        attention: ``sdpa``, ``eager``, or None for the architecture's own choice.
        quantization: ``4bit``, ``8bit``, or None.
        device_map: transformers' placement of the base on several devices, ``auto`` or a dict, instead of ``device``.
        base: the base model, loaded already; it gets the adapters in place.
        named: ``part_settings`` that the checkpoint must have, as far as a configuration names them.

    Returns:
        The model in evaluation mode.

    Raises:
        RunError: the file can't be used, the base is another one, or the checkpoint has other settings than those named.
        UsageError: the device is not there.
    """
    check_placement(device, device_map, base)
    checkpoint = read_checkpoint(path)
    settings = checkpoint[SETTINGS]
    name = base_model or named_base(settings)
    if named is not None:
        expected = {**settings, **named, "lora": {**settings["lora"], **named["lora"]}}
        check_settings(checkpoint, expected, lambda: load_config(name, revision or settings["revision"]))
    if base is None:
        base = load_base(
            name,
            revision or settings["revision"],
            dtype,
            attention,
            quantization,
            device if device_map is None else device_map,
        )
    config = base.config.get_text_config(decoder=True)
    for key, value in settings["base"].items():
        if getattr(config, key) != value:
            raise RunError(
                f"the checkpoint belongs to a base with {key} {value}, and {name!r} has {getattr(config, key)}."
                " Give the base it was trained on with --base_model."
            )
    model = network_class(
        base,
        settings["num_masks"],
        LoRA(**settings["lora"]),
        build_head(settings["sampler_head"]),
        load_tokenizer(name, revision or settings["revision"]),
    )
    prefix = "model."
    weights: dict[str, Tensor] = {k[len(prefix) :]: v for k, v in checkpoint["state_dict"].items() if k.startswith(prefix)}
    complaint = f"checkpoint {str(path)!r} does not fit its own settings"
    fit_weights(model, weights, complaint)
    model.label_counts = parse_label_counts(checkpoint.get(LABEL_COUNTS), model.unembed.vocab_size, complaint)
    model.base_model = name
    model.revision = hub_commit(name, revision or settings["revision"]) or revision or settings["revision"]
    return finish(model)


def fit_weights(model: MTPNetwork, weights: dict[str, Tensor], complaint: str) -> None:
    """Put trained weights into a model.

    Args:
        model: the model.
        weights: trained weights by name.
        complaint: how the message begins where they are not the model's.

    Raises:
        RunError: one is missing, too many, or of another shape.
    """
    own: dict[str, Tensor] = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if model.sampler_head is not None:
        own |= {f"sampler_head.{name}": value for name, value in model.sampler_head.state_dict().items()}
    if (wrong := other_shape(own, weights)) is not None:
        raise RunError(f"{complaint}: {wrong}. It is damaged.")
    model.load_state_dict(weights, strict=False)


def finish(model: Network) -> Network:
    """A loaded model made ready for decoding: trained weights in the base's dtype, evaluation mode."""
    for _, parameter in model.trained_parameters():
        parameter.data = parameter.data.to(model.base.dtype)
    for module in model.modules():
        if isinstance(module, torch.nn.RNNBase):
            module.flatten_parameters()  # a new dtype broke up cuDNN's one block of weights
    return model.eval()


def check_placement(device: str | torch.device | None, device_map: Any, base: PreTrainedModel | None) -> None:
    """Refuse a device that is not there, or two answers to where the model goes, before anything is loaded.

    Args:
        device: a device, or None.
        device_map: a placement on several devices, or None.
        base: a base that is loaded already, or None.

    Raises:
        UsageError: what is wrong.
    """
    if device is not None and device_map is not None:
        raise UsageError("give device or device_map, not both.")
    if base is not None and (device is not None or device_map is not None):
        raise UsageError("base is loaded already: leave device and device_map out.")
    if base is not None and lora_layers(base):
        raise UsageError("base carries LoRA layers already. Load the base model anew, without an adapter.")
    check_device(device)


def check_device(device: str | torch.device | None) -> None:
    """Refuse a device that is not there, before anything is loaded.

    Args:
        device: a device, or None.

    Raises:
        UsageError: no tensor can be put there.
    """
    if device is not None and str(device).startswith("meta"):
        raise UsageError("device must be cpu, cuda or another one that holds numbers, got 'meta'. Change --device.")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        raise UsageError(
            f"device must be cpu, cuda or another one of this machine, got {str(device)!r}: {one_line(error, 100)}."
            " Change --device."
        ) from error


def build_head(settings: dict[str, Any] | None) -> SamplerHead | None:
    """A sampler head from its class path and arguments."""
    if settings is None:
        return None
    module, _, name = settings["class_path"].rpartition(".")
    try:
        kind = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise RunError(f"the sampler head {settings['class_path']} can't be imported: {one_line(error)}.") from error
    if not (isinstance(kind, type) and issubclass(kind, SamplerHead)):
        raise RunError(f"the sampler head {settings['class_path']} is no SamplerHead.")
    return kind(**settings["init_args"])
