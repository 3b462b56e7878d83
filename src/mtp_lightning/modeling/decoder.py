# SPDX-License-Identifier: Apache-2.0
"""The base's text decoder: its configuration, which ones are supported, its context length, and a pass over a cache."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from mtp_lightning.errors import UsageError
from mtp_lightning.modeling.transformers_private import cache_keyword

SUPPORTED_LAYERS = {"full_attention", "sliding_attention"}


def text_config(base: PreTrainedModel) -> Any:
    """The configuration of the text decoder."""
    return base.config.get_text_config(decoder=True)


def decoder_layers(base: PreTrainedModel) -> Any:
    """The base's decoder layers, a ``ModuleList``."""
    decoder: Any = base.get_decoder()
    return decoder.layers if hasattr(decoder, "layers") else decoder.h  # GPT-J and Falcon


def num_experts(config: Any) -> int:
    """Experts of each layer; 0 or 1: not a mixture of experts."""
    names = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    return max(int(getattr(config, name, None) or 0) for name in names)


def check_layer_types(config: Any, is_recurrent: bool = False) -> None:
    """Refuse a base whose layers carry a state that masks would disturb (recurrent, linear or chunked attention), or ALiBi.

    The configuration is that of a text decoder, known before any weight is read.
    """
    _max_positions(config)
    unsupported = sorted(set(getattr(config, "layer_types", None) or []) - SUPPORTED_LAYERS)
    if unsupported or is_recurrent:
        problem = ", ".join(unsupported) or "a recurrent state"
        raise UsageError(f"base model {config.model_type} has {problem}; masks need full or sliding-window attention.")


def _max_positions(config: Any) -> int:
    """The number of positions that a configuration names; UsageError for ALiBi (Bloom, MPT) and models without positions."""
    positions = getattr(config, "max_position_embeddings", None)
    if positions is None or getattr(config, "alibi", False):
        raise UsageError(f"base model {config.model_type} is not supported: it takes no position ids, which masks need.")
    return int(positions)


def context_length(config: Any) -> int:
    """The maximum number of positions of a text decoder with this configuration; UsageError if it takes no position ids.

    YaRN extends the original context by its factor; many configurations still name the original one. With longrope and
    dynamic RoPE transformers changes all frequencies once a position passes a boundary. Masks pass it before the tokens do,
    and cached keys keep the old frequencies, so there the context ends at that boundary.
    """
    context = _max_positions(config)
    rope = getattr(config, "rope_parameters", None) or {}
    by_layer_type = [rope] if "rope_type" in rope else rope.values()
    for parameters in by_layer_type:
        kind = parameters.get("rope_type") if isinstance(parameters, dict) else None
        original = parameters.get("original_max_position_embeddings") or context if kind else context
        if kind in ("longrope", "dynamic"):
            context = min(context, int(original))
        elif kind == "yarn":
            context = max(context, int(original * (parameters.get("factor") or 1)))
    return context


def run_decoder(base: PreTrainedModel, inputs: Tensor, mask: Any, positions: Tensor, cache: Any = None) -> Tensor:
    """The last hidden state, [B, Q, D], of embedded positions [B, Q, D] with position ids [B or 1, Q].

    A transformers cache is read and extended.
    """
    decoder: Any = base.get_decoder()
    options = {"use_cache": False} if cache is None else {"use_cache": True, cache_keyword(decoder.__class__): cache}
    return decoder(inputs_embeds=inputs, attention_mask=mask, position_ids=positions, **options).last_hidden_state
