# SPDX-License-Identifier: Apache-2.0
"""Loads the base model, its configuration and its tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GgufConfig,
    PreTrainedModel,
)

from mtp_lightning.errors import RunError, UsageError
from mtp_lightning.modeling.base_adapter import adapter_of, merge_adapter, resized_vocabulary
from mtp_lightning.modeling.base_source import ADVICE, find_source, is_out_of_memory, load_error, reason_of
from mtp_lightning.modeling.decoder import check_layer_types
from mtp_lightning.modeling.peft_private import lora_layers
from mtp_lightning.paths import resolve

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_CONFIGS = ("config.json", "adapter_config.json")


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
        if (rows := resized_vocabulary(adapter)) is not None:
            config.get_text_config(decoder=True).vocab_size = rows
        return config
    source, options = find_source(base_model)
    folder = Path(source)
    if folder.is_dir() and not options and not (folder / "config.json").is_file():
        models = [path for path in sorted(folder.iterdir()) if any((path / name).is_file() for name in _CONFIGS)]
        inside = f", but in {', '.join(map(str, models[-3:]))}" if models else ""  # checkpoints of a training run
        raise RunError(f"base model {base_model!r} could not be loaded: no config.json is there{inside}.{ADVICE}")
    try:
        return AutoConfig.from_pretrained(source, revision=revision, **options)
    except Exception as error:  # a damaged file makes transformers raise anything
        raise load_error(base_model, error) from error


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
        own_base = load_base(adapter.base_model, adapter.revision, dtype, attention, None, device)
        return merge_adapter(own_base, adapter, base_model)
    options: dict[str, Any] = {"dtype": parse_dtype(dtype), "device_map": device}
    if attention is not None:
        options["attn_implementation"] = attention
    source, gguf = find_source(base_model)
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
        raise load_error(base_model, error) from error
    # transformers fills them with random numbers; buffers it computes.
    if missing := sorted(found["missing_keys"] & {name for name, _ in base.named_parameters()}):
        others = f" (it has {min(found['unexpected_keys'])} and the like)" if found["unexpected_keys"] else ""
        lacks = f"lacks {len(missing)} of its weights, {missing[0]} first{others}"
        raise RunError(f"base model {base_model!r} {lacks}: save it with save_pretrained, as a causal language model.")
    if lora_layers(base):  # they would be taken for ours
        raise RunError(f"base model {base_model!r} comes with an adapter: download it to a folder, and name that.")
    if gguf:
        base.name_or_path = resolve(base_model)  # transformers names the folder
    return base


def load_tokenizer(base_model: str, revision: str | None = None) -> Any:
    """The base model's tokenizer, which need not have a pad token; RunError if it does not exist or can't be read."""
    if not (Path(resolve(base_model)) / "tokenizer_config.json").is_file():
        adapter = adapter_of(base_model, revision)
        if adapter is not None and not (adapter.folder / "tokenizer_config.json").is_file():
            return load_tokenizer(adapter.base_model, adapter.revision)
    source, options = find_source(base_model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision, **options)
    except Exception as error:  # a damaged file makes transformers and tokenizers raise anything
        if str(error).strip().startswith("Couldn't instantiate the backend tokenizer"):
            raise _no_tokenizer(base_model) from error
        raise RunError(f"no tokenizer could be loaded from {base_model!r}: {reason_of(error)}") from error
    files = [Path(source) / name for name in ("tokenizer.json", *tokenizer.vocab_files_names.values())]
    # Without files transformers gives many architectures a tokenizer of special tokens alone.
    if not options and Path(source).is_dir() and len(tokenizer) < 100 and not any(file.is_file() for file in files):
        raise _no_tokenizer(base_model)
    if options and tokenizer.eos_token is not None and tokenizer.eos_token == tokenizer.bos_token:
        # transformers 5.17 takes the begin token of GGUF files for the end token.
        end = load_config(base_model).eos_token_id
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end) if isinstance(end, int) else tokenizer.eos_token
    return tokenizer


def _no_tokenizer(base_model: str) -> RunError:
    return RunError(
        f"{base_model} has no tokenizer (tokenizer.json, tokenizer_config.json): copy the files of its tokenizer there."
    )


def _quantization_config(name: str) -> BitsAndBytesConfig:
    if name == "4bit":
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    if name == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    raise UsageError(f"quantization must be 4bit or 8bit, got {name!r}.")
