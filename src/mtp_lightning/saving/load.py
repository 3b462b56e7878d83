# SPDX-License-Identifier: Apache-2.0
"""Loading a trained model for use without Lightning, from a checkpoint file, a saved folder or a hub id."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, TypeVar, cast, get_args

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mtp_lightning.errors import RunError, UsageError, one_line
from mtp_lightning.modeling.base import load_base, load_config, load_tokenizer
from mtp_lightning.modeling.decoder import text_config
from mtp_lightning.modeling.gated_lora import LoRA
from mtp_lightning.modeling.network import MaskTokens, MTPNetwork
from mtp_lightning.modeling.peft_private import lora_layers
from mtp_lightning.paths import is_gguf, resolve
from mtp_lightning.saving.base_identity import check_layer_shape, hub_commit, warn_if_other_base
from mtp_lightning.saving.checkpoint import checkpoint_parts, read_checkpoint
from mtp_lightning.saving.checkpoint_files import BEST, LAST, newest_checkpoint
from mtp_lightning.saving.saved_folder import check_head_source, find_folder, read_folder
from mtp_lightning.saving.trained_parts import TrainedParts, build_head, shape_mismatch

Network = TypeVar("Network", bound=MTPNetwork)


def load_pretrained(
    network_class: type[Network], name: str | Path, trust_remote_code: bool = False, **options: Any
) -> Network:
    """Load a trained model; see ``MTPModel.from_pretrained``. The options are those of ``build_network``."""
    check_placement(options.get("device"), options.get("device_map"), options.get("base"))
    return build_network(network_class, read_parts(name, trust_remote_code), **options)


def read_parts(name: str | Path, trust_remote_code: bool = False) -> TrainedParts:
    """The trained parts of a checkpoint file, the folder of a run, a saved folder or a hub id; RunError if it is none."""
    name = resolve(str(name))
    path = Path(name)
    if is_gguf(name):
        raise RunError(f"{name!r} is a base model: give a trained model, and this file as its base_model (--base_model).")
    if path.is_file() or (path.suffix == ".ckpt" and not path.is_dir()):
        return checkpoint_parts(read_checkpoint(path), path)
    if (run := run_checkpoint(path)) is not None:
        print(f"model: {run}", file=sys.stderr)
        return checkpoint_parts(read_checkpoint(run), run)
    parts = read_folder(find_folder(name))
    if not trust_remote_code:
        check_head_source(parts.sampler_head, path if path.is_dir() else None)
    return parts


def run_checkpoint(folder: Path) -> Path | None:
    """The best checkpoint in the folder of a run, else the last one; None if it is the folder of no run."""
    checkpoints = folder / "checkpoints"
    if not checkpoints.is_dir() or (folder / "mtp_config.json").exists():
        return None
    best = next((path for name in (BEST, LAST) if (path := checkpoints / name).is_file()), None)
    best = best or newest_checkpoint([checkpoints])
    if best is None:
        raise RunError(f"the run in {str(folder)!r} has no checkpoint yet.")
    return best


def build_network(
    network_class: type[Network],
    parts: TrainedParts,
    *,
    base_model: str | None = None,
    revision: str | None = None,
    base: PreTrainedModel | None = None,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    device_map: Any = None,
    attention: str | None = None,
    quantization: str | None = None,
) -> Network:
    """Load the base, and build a model of it and the trained parts, in evaluation mode.

    ``base_model`` is where the base lies now, if it moved; without a ``revision`` it is the one that was trained on. A
    ``base`` that is loaded already gets the adapters in place. ``device_map`` is transformers' placement on several devices,
    instead of ``device``. Trained weights follow the base's dtype. RunError if the base can't be loaded or the trained parts
    do not fit it.
    """
    check_placement(device, device_map, base)
    try:
        lora = LoRA(**parts.lora)
    except (TypeError, UsageError) as error:
        raise RunError(f"{parts.source} is damaged: its LoRA can't be built: {one_line(error)}.") from error
    if parts.mask_tokens not in get_args(MaskTokens):
        raise RunError(f"{parts.source} is damaged: its mask_tokens is {parts.mask_tokens!r}.")
    name = base_model or (base.name_or_path if base is not None else "") or parts.base_model
    if revision is None and name == parts.base_model:
        revision = parts.revision
    config = load_config(name, revision).get_text_config(decoder=True) if base is None else text_config(base)
    check_layer_shape(parts.base_shape, config, name)
    revision = hub_commit(name, revision) or revision
    warn_if_other_base(parts.base_model, parts.revision, name, revision)
    head, tokenizer = build_head(parts.sampler_head), _tokenizer(parts, name, revision)
    if base is None:
        base = load_base(name, revision, dtype, attention, quantization, device if device_map is None else device_map)
    model = network_class(base, parts.num_masks, lora, head, tokenizer, cast(MaskTokens, parts.mask_tokens))
    load_weights(model, parts)
    model.base_model, model.revision = name, revision
    model.acceptance, model.lineage = parts.acceptance, parts.lineage
    return _prepare_for_decoding(model)


def _tokenizer(parts: TrainedParts, base_model: str, revision: str | None) -> Any:
    """The base's tokenizer. A saved folder has a copy, for the base that it names and for one without a tokenizer."""
    copied = parts.folder is not None and (parts.folder / "tokenizer_config.json").is_file()
    if copied and base_model == parts.base_model:
        return load_tokenizer(str(parts.folder))
    try:
        return load_tokenizer(base_model, revision)
    except RunError:
        if parts.folder is None:
            raise
        return load_tokenizer(str(parts.folder)) if copied else None


def load_weights(model: MTPNetwork, parts: TrainedParts) -> None:
    """Copy trained weights into a network, in its dtypes; RunError if names or shapes differ."""
    expected: dict[str, Tensor] = dict(model.trained_parameters())
    if model.sampler_head is not None:  # its buffers too
        expected |= {f"sampler_head.{name}": value for name, value in model.sampler_head.state_dict().items()}
    if (mismatch := shape_mismatch(expected, parts.weights)) is not None:
        raise RunError(f"{parts.source} does not fit its own settings or the base: {mismatch}.")
    model.load_state_dict(parts.weights, strict=False)


def _prepare_for_decoding(model: Network) -> Network:
    """Trained weights in the base's dtype, evaluation mode."""
    for _, parameter in model.trained_parameters():
        parameter.data = parameter.data.to(model.base.dtype)
    for module in model.modules():
        if isinstance(module, torch.nn.RNNBase):
            module.flatten_parameters()  # a new dtype broke up cuDNN's one block of weights
    return model.eval()


def check_placement(device: str | torch.device | None, device_map: Any, base: PreTrainedModel | None) -> None:
    """Refuse a device that does not exist, or two answers to where the model goes, before anything is loaded."""
    if device is not None and device_map is not None:
        raise UsageError("give device or device_map, not both.")
    if base is not None and (device is not None or device_map is not None):
        raise UsageError("base is loaded already: leave device and device_map out.")
    if base is not None and lora_layers(base):
        raise UsageError("base has LoRA layers already: load it again without an adapter.")
    check_device(device)


def check_device(device: str | torch.device | None) -> None:
    """Refuse a device that does not exist on this machine."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        raise UsageError(f"this machine has no device {device} ({one_line(error, 100)}): set device to cpu.") from error
