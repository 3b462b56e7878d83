# SPDX-License-Identifier: Apache-2.0
"""Grouped-query attention on a CPU without copies of keys and values.

transformers repeats keys and values for each query head if there is a mask, which suits GPU kernels; on a CPU it copies the
whole cache in every layer of every step. PyTorch's CPU kernel supports groups of heads with a mask and gives the same bits.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from mtp_lightning.modeling.attention import GROUPED_SDPA
from mtp_lightning.modeling.decoder import text_config
from mtp_lightning.modeling.transformers_private import (
    attention_kernel,
    can_switch_attention,
    register_attention,
    sdpa_attention,
)

UNSUPPORTED = ("position_bias", "softcap", "cache", "output_attentions")
"""Arguments that only transformers' own function handles."""


def grouped_sdpa(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Any]:
    """An attention function of transformers' interface: query [B, H, Q, d], key and value [B, G, W, d] -> [B, Q, H, d]."""
    # transformers repeats nothing for a single query or without a mask.
    plain = attention_mask is None or query.shape[2] == 1 or query.shape[1] == key.shape[1]
    if (
        plain
        or dropout
        or query.device.type != "cpu"
        or query.requires_grad
        or any(kwargs.get(name) for name in UNSUPPORTED)
    ):
        return sdpa_attention()(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask, scale=scaling, enable_gqa=True)
    return out.transpose(1, 2), None


register_attention(GROUPED_SDPA, grouped_sdpa)


def supports_grouped_sdpa(base: PreTrainedModel) -> bool:
    """True if the base's SDPA attention can be replaced by ``grouped_sdpa``, and gains by it."""
    config = text_config(base)
    heads = config.num_attention_heads
    is_grouped = getattr(config, "num_key_value_heads", heads) != heads
    return base.device.type == "cpu" and is_grouped and can_switch_attention(base.__class__)


def decoding_kernel(base: PreTrainedModel) -> str | None:
    """The attention implementation that decoding steps use.

    Not ``flex_attention``: a step's few queries gain nothing from it, and every cache length would be compiled.
    """
    kernel = attention_kernel(base)
    if kernel == "flex_attention":
        capped = getattr(text_config(base), "attn_logit_softcapping", None) is not None
        kernel = "eager" if capped else "sdpa"
    return GROUPED_SDPA if kernel == "sdpa" and supports_grouped_sdpa(base) else kernel
