# SPDX-License-Identifier: Apache-2.0
"""A PEFT adapter as a base model: it is merged into the base that it names."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from peft import PeftModel
from safetensors import safe_open
from transformers import PreTrainedModel

from mtp_lightning.errors import RunError
from mtp_lightning.modeling.base_source import hub_file, is_out_of_memory, load_error, reason_of
from mtp_lightning.paths import check_exists, is_gguf, resolve

_ADAPTER_FILES = ["adapter_config.json", "adapter_model.*", "mtp_config.json", "tokenizer_config.json"]
# Other architectures' names of the embeddings do not matter: transformers saves them as lm_head too.
_EMBEDDINGS = tuple(
    f"{layer}{wrapper}.weight"
    for layer in ("embed_tokens", "lm_head")
    for wrapper in ("", ".base_layer", ".token_adapter.base_layer")
)


class Adapter(NamedTuple):
    """A PEFT adapter and what it belongs to."""

    folder: Path  # where its files are
    base_model: str  # its base
    revision: str | None  # hub revision of its base


def adapter_of(base_model: str, revision: str | None = None) -> Adapter | None:
    """The PEFT adapter in a folder or on the hub, None if the name is a base's; RunError if it can't be used as a base."""
    folder = Path(resolve(base_model))
    if not folder.exists() and not is_gguf(base_model):
        # A base has a configuration, which is needed next, so that most names cost no request.
        if hub_file(base_model, "config.json", revision) or not hub_file(base_model, "adapter_config.json", revision):
            return None
        try:  # the repository may hold a whole training run, so only what is read here
            folder = Path(snapshot_download(base_model, revision=revision, allow_patterns=_ADAPTER_FILES))
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
            raise load_error(base_model, error) from error
    path = folder / "adapter_config.json"
    if not path.is_file():
        return None
    if (folder / "config.json").is_file() and any(map(_is_base_weights, folder.iterdir())):
        raise RunError(
            f"{base_model!r} has a whole model and an adapter in one folder, merged already or not: move adapter_config.json"
            " and adapter_model.safetensors to a folder of their own, or delete them."
        )
    if (folder / "mtp_config.json").is_file():
        raise RunError(f"{base_model!r} is a trained model, not a base: name the base it was trained on.")
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        if not settings["base_model_name_or_path"]:
            raise KeyError("base_model_name_or_path")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{str(path)!r} does not name a base_model_name_or_path.") from error
    if not any(folder.glob("adapter_model.*")):
        raise RunError(f"the adapter {base_model!r} has no weights: no adapter_model.safetensors is there.")
    check_exists(settings["base_model_name_or_path"], f" {str(path)!r} names it: correct its base_model_name_or_path.")
    return Adapter(folder, settings["base_model_name_or_path"], settings.get("revision"))


def _is_base_weights(path: Path) -> bool:
    """True for a file of a whole model's weights, not of an adapter's."""
    return path.suffix in (".safetensors", ".bin") and path.name.startswith(("model", "pytorch_model", "consolidated"))


def resized_vocabulary(adapter: Adapter) -> int | None:
    """The rows of the embeddings that an adapter has for more or fewer tokens than its base; None if it has none."""
    file = adapter.folder / "adapter_model.safetensors"
    if not file.is_file():
        return None
    with safe_open(str(file), framework="pt") as weights:
        names = [name for name in weights.keys() if name.endswith(_EMBEDDINGS)]  # noqa: SIM118 # it can't be iterated over
        return int(weights.get_slice(names[0]).get_shape()[0]) if names else None


def merge_adapter(base: PreTrainedModel, adapter: Adapter, name: str) -> PreTrainedModel:
    """The base with the PEFT adapter ``name`` merged into its weights."""
    if getattr(base, "is_quantized", False):
        raise RunError(
            f"the adapter {name!r} can't be merged into its base {adapter.base_model!r}, whose weights are quantised: in its"
            " adapter_config.json name the base that they were made from."
        )
    try:
        rows = resized_vocabulary(adapter)
        if rows is not None and rows != base.get_input_embeddings().weight.shape[0]:
            base.resize_token_embeddings(rows, mean_resizing=False)  # the adapter has them
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="Found missing adapter keys")
            peft: Any = PeftModel.from_pretrained(base, str(adapter.folder))
        _untie(base)
        merged = peft.merge_and_unload()
    except Exception as error:  # peft and safetensors raise many types
        if is_out_of_memory(error):
            raise
        raise RunError(f"the adapter {name!r} does not fit its base {adapter.base_model!r}: {reason_of(error)}") from error
    print(f"base {adapter.base_model}, with the adapter {name} merged into its weights", file=sys.stderr)
    merged.name_or_path = name
    return merged.eval()


def _untie(base: PreTrainedModel) -> None:
    """Give the output layer a copy of its weights if they are the embeddings' too and an adapter acts on either."""
    layers: Any = (base.get_input_embeddings(), base.get_output_embeddings())
    embeddings, head = (getattr(layer, "base_layer", layer) for layer in layers)
    if (embeddings, head) != layers and getattr(embeddings, "weight", None) is getattr(head, "weight", head):
        head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=False)
