# SPDX-License-Identifier: Apache-2.0
"""What a base model is known again by: shape, vocabulary, hub commit and a sample of its weights. Plain types, for JSON."""

from __future__ import annotations

import hashlib
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from torch import Tensor
from transformers import PreTrainedModel

from mtp_lightning.errors import RunError
from mtp_lightning.modeling.decoder import text_config
from mtp_lightning.paths import resolve

SHAPE = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
)
"""Keys of a configuration that trained weights depend on; an architecture without one of them leaves it out."""

SAMPLES = 64
"""Weights looked at in the embedding table, and again in the norms and biases: what quantisation leaves alone."""


def shape(config: Any) -> dict[str, Any]:
    """The shape of a text decoder.

    Args:
        config: its configuration.

    Returns:
        Those of ``SHAPE`` that it has.
    """
    values = {name: getattr(config, name, None) for name in SHAPE}
    return {name: value for name, value in values.items() if isinstance(value, int | str)}


def vocabulary(tokenizer: Any) -> str | None:
    """SHA-256 of the tokens and their ids, or None without a tokenizer."""
    if tokenizer is None:
        return None
    digest = hashlib.sha256()
    for token, number in sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0])):
        digest.update(f"{number}\t{token}\n".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


@torch.no_grad()
def weights(base: PreTrainedModel) -> dict[str, list[float | None]]:
    """A few weights, rounded to bfloat16, so that they are the same in whichever dtype the base is loaded.

    Args:
        base: the base model, with or without adapters.

    Returns:
        ``embedding``, and ``vectors`` (norms and biases): ``SAMPLES`` each, or all if there are fewer. None: a weight that
        is offloaded and can't be read here.
    """
    table = base.get_input_embeddings().weight
    vectors = {
        name.replace(".base_layer", ""): parameter
        for name, parameter in base.get_decoder().named_parameters()
        if parameter.ndim == 1 and parameter.is_floating_point() and ".lora_" not in name
    }
    return {"embedding": _sample([table]), "vectors": _sample([vectors[name] for name in sorted(vectors)])}


def _sample(tensors: list[Tensor]) -> list[float | None]:
    """``SAMPLES`` entries, evenly from the tensors laid end to end."""
    ends = list(accumulate(tensor.numel() for tensor in tensors))
    total = ends[-1] if ends else 0
    count = min(SAMPLES, total)
    values: list[float | None] = []
    for number in range(count):
        index = number * total // count
        which = next(i for i, end in enumerate(ends) if index < end)
        tensor = tensors[which].detach()
        place = index - (ends[which] - tensor.numel())
        entry = None if tensor.is_meta else tensor.reshape(-1)[place : place + 1]
        values.append(None if entry is None else entry.float().to(torch.bfloat16).item())
    return values


def describe(base: PreTrainedModel, tokenizer: Any) -> dict[str, Any]:
    """What a saved folder remembers of its base.

    Args:
        base: the base model.
        tokenizer: its tokenizer, or None.

    Returns:
        ``shape``, ``vocabulary``, ``dtype`` and ``weights``.
    """
    return {
        "shape": shape(text_config(base)),
        "vocabulary": vocabulary(tokenizer),
        "dtype": str(base.dtype).removeprefix("torch."),
        "weights": weights(base),
    }


def check_shape(expected: dict[str, Any], config: Any, name: str) -> None:
    """Refuse a base of another shape or number of tokens.

    Args:
        expected: what ``describe`` gave.
        config: the configuration of the base's text decoder.
        name: the base's name, for the message.

    Raises:
        RunError: something differs; it says what.
    """
    found = shape(config)
    for key, value in expected["shape"].items():
        if found.get(key) != value:
            raise RunError(
                f"the folder belongs to a base with {key} {value}, and {name!r} has {found.get(key)}."
                " Give the base it was trained on with base_model."
            )


def hub_commit(name: str, revision: str | None) -> str | None:
    """The commit that a hub id stands for, read from the cache that its configuration was loaded through.

    Transformers itself keeps it in the configuration in some versions only.

    Args:
        name: a folder or a hub id.
        revision: branch, tag or commit; None: the default branch.

    Returns:
        The commit, or None for a folder and what is not in the cache.
    """
    if "://" in name or Path(resolve(name)).exists():
        return None
    try:
        file = try_to_load_from_cache(name, "config.json", revision=revision)
    except HFValidationError:
        return None
    return Path(file).parent.name if isinstance(file, str) else None


def check_revision(expected: str | None, found: str | None, name: str) -> None:
    """Refuse a base that lies on the hub at another commit.

    Args:
        expected: the commit that the folder names; None or a branch: nothing to compare.
        found: the commit of the base, or None where that is not known.
        name: the base's name, for the message.

    Raises:
        RunError: another commit.
    """
    if found is not None and expected is not None and len(expected) == len(found) and found != expected:
        raise RunError(
            f"the folder belongs to revision {expected} of its base, and revision {found} of {name!r} was given."
            " Leave revision out, or give the one that the folder names."
        )


def check_vocabulary(expected: dict[str, Any], tokenizer: Any, name: str) -> None:
    """Refuse a base whose tokens have other numbers.

    Args:
        expected: what ``describe`` gave.
        tokenizer: the tokenizer to compare.
        name: where it comes from, for the message.

    Raises:
        RunError: another vocabulary.
    """
    if expected["vocabulary"] is not None and vocabulary(tokenizer) != expected["vocabulary"]:
        raise RunError(
            f"the folder belongs to a base with another vocabulary than that of {name!r}: their tokenizers give tokens"
            " different numbers. Give the base it was trained on with base_model."
        )


def check_weights(expected: dict[str, Any], base: PreTrainedModel, name: str) -> None:
    """Refuse a base of the same shape that was trained further or anew.

    A sample: a fine-tune that changes none of the weights looked at by a bfloat16 step passes.

    Args:
        expected: what ``describe`` gave.
        base: the base model.
        name: its name, for the message.

    Raises:
        RunError: weights differ.
    """
    # float16 on the way rounds twice, so there one step of bfloat16 (2^-8 of the value, at most 2^-7) proves nothing, nor
    # does what float16 makes 0.
    loose = "float16" in (expected["dtype"], str(base.dtype).removeprefix("torch."))
    found = weights(base)
    pairs = [
        (there, here)
        for part, values in expected["weights"].items()
        for there, here in zip(values, found[part], strict=True)
        if there is not None and here is not None
    ]
    different = sum(abs(there - here) > (max(abs(there), abs(here)) / 128 + 1e-7 if loose else 0.0) for there, here in pairs)
    if different:
        raise RunError(
            f"{name!r} has the shape of the base that the folder belongs to, but other weights ({different} of"
            f" {len(pairs)} looked at): another revision, or a model trained further. Give the base it was trained on"
            " with base_model."
        )
