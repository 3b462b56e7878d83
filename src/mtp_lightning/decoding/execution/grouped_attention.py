# SPDX-License-Identifier: Apache-2.0
"""Attention of a step: groups of heads without copies of keys and values; on a CPU, a query's bits whatever the others are.

If there is a mask, transformers repeats keys and values for each query head, and so copies the whole cache in every layer
of every step. PyTorch's CPU kernel supports groups of heads with a mask and gives the same bits. Its usual GPU kernel for
masks does not: there the queries of the heads that share keys become the queries of one head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from mtp_lightning.decoding.packed_linear import MIN_ROWS, few_rows_differ
from mtp_lightning.modeling.attention import GROUPED_SDPA
from mtp_lightning.modeling.decoder import text_config
from mtp_lightning.modeling.transformers_private import (
    attention_kernel,
    can_switch_attention,
    register_attention,
    sdpa_attention,
)

MAX_FOLDED = 512
"""Queries of a head that are folded on a GPU; more are a prompt's, computed once, and the mask grows with them."""
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
    attend: Callable[..., Tensor] | None = None
    supported = attention_mask is not None and not query.requires_grad and not dropout
    if supported and not any(kwargs.get(name) for name in UNSUPPORTED):
        attend = _attention(query, key)
    if attend is None:
        return sdpa_attention()(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
    return attend(query, key, value, attention_mask, scaling).transpose(1, 2), None


def _attention(query: Tensor, key: Tensor) -> Callable[..., Tensor] | None:
    """The function for these shapes and this device; None: transformers' own."""
    grouped, device = query.shape[1] != key.shape[1], query.device.type
    if device == "cpu" and few_rows_differ(query.dtype):
        return rows_alike
    if device == "cpu" and grouped and query.shape[2] > 1:  # transformers repeats nothing for a single query
        return _attend
    return folded if device == "cuda" and grouped and query.shape[2] <= MAX_FOLDED else None


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float | None) -> Tensor:
    """PyTorch's kernel, with groups of heads."""
    is_grouped = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling, enable_gqa=is_grouped)


def _fold(query: Tensor, mask: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Queries of the heads that share keys as queries of one head, [B, G, H / G * Q, d], and their mask."""
    B, H, Q, d = query.shape
    return query.reshape(B, groups, H // groups * Q, d), mask.repeat(1, 1, H // groups, 1)


def folded(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float | None) -> Tensor:
    """Attention of few queries, [B, H, Q, d], which reads keys and values once for each group of heads."""
    few, few_mask = _fold(query, mask, key.shape[1])
    return _attend(few, key, value, few_mask, scaling).reshape(query.shape)


def rows_alike(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float | None) -> Tensor:
    """Attention in which a query's bits do not depend on the number of the others, [B, H, Q, d], where ``few_rows_differ``.

    The kernel computes queries in blocks of 32, 64 or 256. Few queries of one head are computed with those of the heads
    that share its keys, and a block of fewer than ``MIN_ROWS`` is filled up.
    """
    shape = query.shape
    if shape[2] < MIN_ROWS:
        query, mask = _fold(query, mask, key.shape[1])
    rows = query.shape[2]
    block = 256 if rows >= 768 else 64 if rows >= 192 else 32
    if 0 < rows % block < MIN_ROWS:
        missing = MIN_ROWS - rows % block
        query = torch.cat([query, query[:, :, -1:].expand(-1, -1, missing, -1)], dim=2)
        mask = torch.cat([mask, mask[:, :, -1:].expand(-1, -1, missing, -1)], dim=2)
    return _attend(query, key, value, mask, scaling)[:, :, :rows].reshape(shape)


register_attention(GROUPED_SDPA, grouped_sdpa)


def supports_grouped_sdpa(base: PreTrainedModel) -> bool:
    """True if the base's SDPA attention can be replaced by ``grouped_sdpa``, and its speed or its bits gain by that."""
    config = text_config(base)
    heads = config.num_attention_heads
    gains = getattr(config, "num_key_value_heads", heads) != heads
    gains = gains or base.device.type == "cpu" and few_rows_differ(base.dtype)
    return base.device.type in ("cpu", "cuda") and gains and can_switch_attention(base.__class__)


def decoding_kernel(base: PreTrainedModel) -> str | None:
    """The attention implementation that decoding steps use.

    Not ``flex_attention``: a step's few queries gain nothing from it, and every cache length would be compiled.
    """
    kernel = attention_kernel(base)
    if kernel == "flex_attention":
        capped = getattr(text_config(base), "attn_logit_softcapping", None) is not None
        kernel = "eager" if capped else "sdpa"
    return GROUPED_SDPA if kernel == "sdpa" and supports_grouped_sdpa(base) else kernel
