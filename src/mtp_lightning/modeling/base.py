# SPDX-License-Identifier: Apache-2.0
"""Loads the base model, its configuration and its tokenizer."""

from __future__ import annotations

import json
import sys
import textwrap
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import hf_hub_download, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from peft import PeftModel
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GgufConfig,
    PreTrainedModel,
)

from mtp_lightning.errors import RunError, UsageError
from mtp_lightning.modeling.decoder import check_layer_types, text_config
from mtp_lightning.modeling.peft_private import lora_layers
from mtp_lightning.paths import check_exists, is_gguf, resolve

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_ADAPTER_FILES = ["adapter_config.json", "adapter_model.*", "mtp_config.json", "tokenizer_config.json"]
_CONFIGS = ("config.json", "adapter_config.json")
_EMBEDDINGS = ("embed_tokens.weight", "embed_tokens.base_layer.weight", "lm_head.weight", "lm_head.base_layer.weight")
_ADVICE = (
    " Set model.base_model (--base_model) to a folder with config.json and weights, a GGUF file, or a hub id that this"
    " machine can reach."
)


def parse_dtype(dtype: str | torch.dtype) -> torch.dtype | str:
    """A torch dtype from its name; ``auto`` (the dtype that the base was saved in) stays; UsageError for an unknown name."""
    if isinstance(dtype, torch.dtype) or dtype == "auto":
        return dtype
    if dtype not in DTYPES:
        raise UsageError(f"dtype must be auto or one of {', '.join(DTYPES)}, got {dtype!r}.")
    return DTYPES[dtype]


def load_config(base_model: str, revision: str | None = None) -> Any:
    """The configuration of a model; no weights are read. RunError if it does not exist or can't be read."""
    if (adapter := adapter_of(base_model, revision)) is not None:
        config = load_config(adapter.base_model, adapter.revision)
        if (rows := _resized_vocabulary(adapter)) is not None:
            config.get_text_config(decoder=True).vocab_size = rows
        return config
    source, options = _source(base_model)
    folder = Path(source)
    if folder.is_dir() and not options and not (folder / "config.json").is_file():
        models = [path for path in sorted(folder.iterdir()) if any((path / name).is_file() for name in _CONFIGS)]
        inside = f", but in {', '.join(map(str, models[-3:]))}" if models else ""  # checkpoints of a training run
        raise RunError(f"base model {base_model!r} could not be loaded: no config.json is there{inside}.{_ADVICE}")
    try:
        return AutoConfig.from_pretrained(source, revision=revision, **options)
    except Exception as error:  # a damaged file makes transformers raise anything
        raise _load_error(base_model, error) from error


def load_base(
    base_model: str,
    revision: str | None = None,
    dtype: str | torch.dtype = "auto",
    attention: str | None = None,
    quantization: str | None = None,
    device: str | torch.device | None = None,
) -> PreTrainedModel:
    """Load a causal language model, in evaluation mode; RunError if it does not exist or can't be read.

    The base is a folder, a hub id, a ``package://`` name or a GGUF file, which is dequantised (dtype ``auto``: to float32).
    A PEFT adapter, in a folder or on the hub, is merged into its own base.
    ``attention`` is ``sdpa``, ``eager``, ``flex_attention``, or None for the architecture's own choice; ``quantization`` is
    ``4bit`` or ``8bit`` (bitsandbytes). UsageError for a wrong option or an architecture that can't take mask tokens.
    """
    if (adapter := adapter_of(base_model, revision)) is not None:
        if quantization is not None:
            raise UsageError(f"quantization {quantization!r}: the adapter {base_model!r} can't be merged into such weights.")
        return _merged(load_base(adapter.base_model, adapter.revision, dtype, attention, None, device), adapter, base_model)
    options: dict[str, Any] = {"dtype": parse_dtype(dtype), "device_map": device}
    if attention is not None:
        options["attn_implementation"] = attention
    source, gguf = _source(base_model)
    if gguf and quantization is not None:
        raise UsageError(f"quantization {quantization!r} can't be applied to a GGUF file, got {base_model!r}.")
    if gguf:
        options |= {"quantization_config": GgufConfig(dequantize=True), **gguf}
    elif quantization is not None:
        options["quantization_config"] = _quantization_config(quantization)
    config = load_config(base_model, revision)
    check_layer_types(config.get_text_config(decoder=True))
    try:
        base, found = AutoModelForCausalLM.from_pretrained(
            source, config=config, revision=revision, output_loading_info=True, **options
        )
    except Exception as error:  # a damaged file makes transformers and safetensors raise anything
        if is_out_of_memory(error) or (isinstance(error, RuntimeError) and "CUDA error" in str(error)):  # the file is fine
            raise
        raise _load_error(base_model, error) from error
    if missing := sorted(found["missing_keys"]):  # transformers fills them with random numbers
        others = f" (it has {min(found['unexpected_keys'])} and the like)" if found["unexpected_keys"] else ""
        lacks = f"lacks {len(missing)} of its weights, {missing[0]} first{others}"
        raise RunError(f"base model {base_model!r} {lacks}: save it again with save_pretrained.")
    if lora_layers(base):  # they would be taken for ours
        raise RunError(
            f"base model {base_model!r} has weights and an adapter in one folder, merged already or not: move"
            " adapter_config.json and adapter_model.safetensors to a folder of their own, or delete them."
        )
    if gguf:
        base.name_or_path = resolve(base_model)  # transformers names the folder
    return base


def load_tokenizer(base_model: str, revision: str | None = None) -> Any:
    """The base model's tokenizer, which need not have a pad token; RunError if it does not exist or can't be read."""
    if not (Path(resolve(base_model)) / "tokenizer_config.json").is_file():
        adapter = adapter_of(base_model, revision)
        if adapter is not None and not (adapter.folder / "tokenizer_config.json").is_file():
            return load_tokenizer(adapter.base_model, adapter.revision)
    source, options = _source(base_model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision, **options)
    except Exception as error:  # a damaged file makes transformers and tokenizers raise anything
        if str(error).strip().startswith("Couldn't instantiate the backend tokenizer"):
            raise _no_tokenizer(base_model) from error
        raise RunError(f"no tokenizer could be loaded from {base_model!r}: {_reason(error)}") from error
    files = [Path(source) / name for name in ("tokenizer.json", *tokenizer.vocab_files_names.values())]
    # Without files transformers gives many architectures a tokenizer of special tokens alone.
    if not options and Path(source).is_dir() and len(tokenizer) < 100 and not any(file.is_file() for file in files):
        raise _no_tokenizer(base_model)
    if options and tokenizer.eos_token is not None:  # transformers 5.17 gives GGUF files the begin token as the end token
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(load_config(base_model).eos_token_id)
    return tokenizer


def _no_tokenizer(base_model: str) -> RunError:
    return RunError(
        f"{base_model} has no tokenizer (tokenizer.json, tokenizer_config.json): copy the files of its tokenizer there."
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
            raise _load_error(base_model, error) from error
    path = folder / "adapter_config.json"
    if not path.is_file() or ((folder / "config.json").is_file() and any(map(_is_base_weights, folder.iterdir()))):
        return None
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


def _resized_vocabulary(adapter: Adapter) -> int | None:
    """The rows of the embeddings that an adapter has for more or fewer tokens than its base; None if it has none."""
    file = adapter.folder / "adapter_model.safetensors"
    if not file.is_file():
        return None
    with safe_open(str(file), framework="pt") as weights:
        names = [name for name in weights.keys() if name.endswith(_EMBEDDINGS)]  # noqa: SIM118 # it can't be iterated over
        return int(weights.get_slice(names[0]).get_shape()[0]) if names else None


def hub_file(name: str, file: str, revision: str | None = None) -> Path | None:
    """A file of a hub id, in the cache or downloaded; None if it is not there. RunError for a path of nothing here."""
    if "://" in name:
        return None
    check_exists(name, _ADVICE)  # a missing folder of ours: the hub would be asked for it, again and again
    try:
        cached = try_to_load_from_cache(name, file, revision=revision)
        return Path(cached if isinstance(cached, str) else hf_hub_download(name, file, revision=revision))
    except (HFValidationError, EntryNotFoundError, OSError):  # or out of reach: what loads the base reports it
        return None


def _merged(base: PreTrainedModel, adapter: Adapter, name: str) -> PreTrainedModel:
    """The base with the PEFT adapter ``name`` merged into its weights."""
    if getattr(base, "is_quantized", False):
        raise RunError(
            f"the adapter {name!r} can't be merged into its base {adapter.base_model!r}, whose weights are quantised: in its"
            " adapter_config.json name the base that they were made from."
        )
    try:
        rows = _resized_vocabulary(adapter)
        if rows is not None and rows != base.get_input_embeddings().weight.shape[0]:
            base.resize_token_embeddings(rows, mean_resizing=False)  # the adapter has them
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="Found missing adapter keys")
            peft: Any = PeftModel.from_pretrained(base, str(adapter.folder))
        _untie(base)
        merged = peft.merge_and_unload()
    except Exception as error:  # peft and safetensors raise many types
        raise RunError(f"the adapter {name!r} does not fit its base {adapter.base_model!r}: {_reason(error)}") from error
    print(f"base {adapter.base_model}, with the adapter {name} merged into its weights", file=sys.stderr)
    merged.name_or_path = name
    return merged.eval()


def _untie(base: PreTrainedModel) -> None:
    """Give the output layer its own weights if an adapter acts on it or on the embeddings that it shares them with.

    It acts on one of the two alone, and merged into shared weights it would act on both.
    """
    layers: Any = (base.get_input_embeddings(), base.get_output_embeddings())
    embeddings, head = (getattr(layer, "base_layer", layer) for layer in layers)
    if (embeddings, head) != layers and getattr(embeddings, "weight", None) is getattr(head, "weight", head):
        head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=False)
        text_config(base).tie_word_embeddings = base.config.tie_word_embeddings = False


def _source(base_model: str) -> tuple[str, dict[str, str]]:
    """Folder or hub id that transformers loads from, and for a GGUF file the option that names it there."""
    if not is_gguf(base_model):
        check_exists(base_model, _ADVICE)
        return resolve(base_model), {}
    path = Path(resolve(base_model))
    if not path.is_file():
        raise RunError(f"base model {base_model!r} could not be loaded: no such file is there.")
    return str(path.parent), {"gguf_file": path.name}


def is_out_of_memory(error: BaseException) -> bool:
    """True if an error says that memory ran out, on a GPU or on the host."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def _quantization_config(name: str) -> BitsAndBytesConfig:
    if name == "4bit":
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    if name == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    raise UsageError(f"quantization must be 4bit or 8bit, got {name!r}.")


def _load_error(base_model: str, error: Exception) -> RunError:
    return RunError(f"base model {base_model!r} could not be loaded: {_reason(error)}{_ADVICE}")


def _reason(error: Exception) -> str:
    """One sentence of a library's error, which may run over pages."""
    lines = str(error).strip().splitlines()
    text = textwrap.shorten(lines[0].rstrip(" .:!"), 300, placeholder=" ...") if lines else ""
    if "ignore_mismatched_sizes" in text:
        return "the shapes of its weights are not those that its config.json says."
    # An expected error explains itself; the message of a KeyError is a single word, so its class is named as well.
    is_expected = text and isinstance(error, OSError | ValueError | ImportError)
    return f"{text}." if is_expected else f"{type(error).__name__}{': ' if text else ''}{text}."
