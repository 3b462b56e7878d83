# SPDX-License-Identifier: Apache-2.0
"""Attention of MTP positions on a CPU: over the row's NTP keys and their own block, without an S x S mask.

A mask sees NTP positions up to its block's start, and its own block. So the scores are a product with the L cached
keys and small products within blocks, [.., L + K] instead of [.., L + P * K]. NTP keys and values get no gradient,
and none are repeated for the query heads that share them. PyTorch's fused kernel does all of that, and its backward pass is
slow on a CPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from mtp_lightning.modeling.decoder import text_config
from mtp_lightning.modeling.transformers_private import attention_kernel, can_switch_attention, register_attention

BLOCK_ATTENTION = "mtp_blocks"
"""Name of ``block_attention`` among transformers' attention functions."""
MAX_SCORES = 1 << 24
"""Scores of a layer that are kept; if there are more, they are computed again in the backward pass, this many at a time."""


def supports_block_attention(base: PreTrainedModel) -> bool:
    """True if the base's MTP positions can use ``block_attention``."""
    has_dropout = base.training and bool(getattr(text_config(base), "attention_dropout", 0.0))
    on_cpu = base.device.type == "cpu" and not torch.compiler.is_compiling()
    return on_cpu and not has_dropout and attention_kernel(base) == "sdpa" and can_switch_attention(base.__class__)


def block_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """An attention function of transformers' interface, for the M = P * K MTP positions of a masked input alone.

    Query [B, H, M, d], key [B, G, L + M, d] and value [B, G, L + M, e] of the L cached NTP positions and the MTP positions,
    and ``masking.block_mask`` [B, 1, M, L + K] bool give the output [B, M, H, e], and None.
    """
    B, H, M, d = query.shape
    L = key.shape[2] - M
    K = attention_mask.shape[3] - L
    query = query * (d**-0.5 if scaling is None else scaling)
    ntp_key, ntp_value = key[:, :, :L].detach(), value[:, :, :L].detach()
    key, value = key[:, :, L:], value[:, :, L:]
    blocks = max(1, MAX_SCORES // (B * H * K * (L + K)))
    recompute = blocks * K < M and torch.is_grad_enabled()
    outputs = []
    for begin in range(0, M, blocks * K):
        part = slice(begin, begin + blocks * K)
        inputs = query[:, :, part], ntp_key, key[:, :, part], ntp_value, value[:, :, part], attention_mask[:, :, part]
        if recompute:
            outputs.append(checkpoint(_attend, *inputs, use_reentrant=False, preserve_rng_state=False))
        else:
            outputs.append(_attend(*inputs))
    return torch.cat(outputs, 2).transpose(1, 2), None


def _attend(query: Tensor, ntp_key: Tensor, key: Tensor, ntp_value: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """The output of whole blocks, [B, H, M, e]; heads that share keys are rows of one product."""
    (B, H, M, d), (G, L) = query.shape, ntp_key.shape[1:3]
    K = mask.shape[3] - L
    R, P = H // G, M // K

    def by_block(x: Tensor) -> Tensor:
        return x.reshape(B, G, R, P, K, -1).transpose(2, 3).reshape(B, G, P, R * K, -1)

    def by_head(x: Tensor) -> Tensor:
        return x.view(B, G, P, R, K, -1).transpose(2, 3).reshape(B, G, R * M, -1)

    query = query.reshape(B, G, R * M, d)
    key, value = key.reshape(B, G, P, K, d), value.reshape(B, G, P, K, -1)
    scores = torch.cat([query @ ntp_key.transpose(2, 3), by_head(by_block(query) @ key.transpose(3, 4))], -1)
    scores = scores.view(B, G, R, M, -1).masked_fill(~mask[:, :, None], -torch.inf)
    on_ntp, on_own = scores.softmax(-1).view(B, G, R * M, -1).split([L, K], -1)
    return (on_ntp @ ntp_value + by_head(by_block(on_own) @ value)).view(B, H, M, -1)


register_attention(BLOCK_ATTENTION, block_attention)
