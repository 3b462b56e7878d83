# SPDX-License-Identifier: Apache-2.0
"""Attention of masks over the text in pages and the masks of their block, in plain PyTorch. No vLLM.

On a CPU one fused call over gathered pages (``attend``). On a GPU, where pages are read in place, two parts that their
log-sum-exps merge: the text before the pass's last tokens, by FlashAttention (``paged_part`` is its twin), and those tokens
and the masks (``dense_part``).

Letters: R requests, M masks of a request, H key heads, G query heads for each, D head size, N keys, P pages of ``size``
tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def attend(q: Tensor, keys: Tensor, values: Tensor, bias: Tensor, scale: float) -> Tensor:
    """Attention in one call.

    Args:
        q: queries of masks, [R, M, H, G, D].
        keys: keys, [R, H, N, D].
        values: values, [R, H, N, D].
        bias: ``attention_bias``, [R, 1, G * M, N].
        scale: factor of the scores.

    Returns:
        The output, [R, M, H, G, D].
    """
    R, M, H, G, D = q.shape
    folded = q.permute(0, 2, 3, 1, 4).reshape(R, H, G * M, D)
    out = F.scaled_dot_product_attention(folded, keys, values, attn_mask=bias, scale=scale)
    return out.view(R, H, G, M, D).permute(0, 3, 1, 2, 4)


def attention_bias(text: Tensor, own: Tensor, groups: int, dtype: torch.dtype) -> Tensor:
    """0 where a mask sees a key and -inf elsewhere, [R, 1, G * M, N + M].

    Args:
        text: which mask sees which token of the text, [R, M, N] bool.
        own: which mask sees which mask, [M, M] bool.
        groups: G.
        dtype: the queries' dtype.

    Returns:
        The bias in this dtype.
    """
    seen = torch.cat([text, own.expand(len(text), -1, -1)], dim=2)
    bias = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, float("-inf"))
    return bias[:, None, None].expand(-1, 1, groups, -1, -1).flatten(2, 3)


def gather_pages(kv_cache: Tensor, table: Tensor, layout: str, room: int) -> tuple[Tensor, Tensor]:
    """Keys and values of the pages in a table, in order, with room for more at the end.

    Args:
        kv_cache: vLLM's CPU cache, [pages, H, size, 2 * D].
        table: pages of each request, [R, P] integers.
        layout: how keys and values lie within a page, ``vec`` or ``amx`` (vLLM's names of its kernels).
        room: number of entries at the end that are not filled.

    Returns:
        Keys and values, [R, H, P * size + room, D] each.
    """
    _, H, size, width = kv_cache.shape
    (R, P), D = table.shape, width // 2
    pages = kv_cache[table.long()].view(R, P, H, 2, size * D)
    k, v = pages[:, :, :, 0], pages[:, :, :, 1]
    if layout == "amx":  # 16 tokens by 2 values of keys, and 16 values of 2 tokens, side by side
        k = k.view(R, P, H, size // 16, D // 2, 16, 2).permute(0, 2, 1, 3, 5, 4, 6)
        v = v.view(R, P, H, D // 16, size // 2, 16, 2).permute(0, 2, 1, 4, 6, 3, 5)
    else:  # keys are transposed
        k = k.view(R, P, H, D, size).permute(0, 2, 1, 4, 3)
        v = v.view(R, P, H, size, D).permute(0, 2, 1, 3, 4)
    keys, values = k.new_empty(2, R, H, P * size + room, D)
    keys[:, :, : P * size].view(k.shape).copy_(k)
    values[:, :, : P * size].view(v.shape).copy_(v)
    return keys, values


def dense_part(q: Tensor, keys: Tensor, values: Tensor, seen: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attention over a few keys, in float32.

    Args:
        q: queries, [R, M, H, G, D].
        keys: keys, [R, N, H, D].
        values: values, [R, N, H, D].
        seen: which mask sees which key, at least one each, [R, M, N] bool.
        scale: factor of the scores.

    Returns:
        The output [R, M, H, G, D] and the log-sum-exp of the scores [R, M, H, G].
    """
    scores = torch.einsum("rmhgd,rnhd->rmhgn", q.float(), keys.float()) * scale
    scores = scores.masked_fill(~seen[:, :, None, None], float("-inf"))
    lse = scores.logsumexp(-1)
    return torch.einsum("rmhgn,rnhd->rmhgd", (scores - lse[..., None]).exp(), values.float()), lse


def paged_part(
    q: Tensor, key_pages: Tensor, value_pages: Tensor, table: Tensor, lengths: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention of all masks of a request over the first ``lengths`` tokens in its pages: FlashAttention's twin.

    Args:
        q: queries, [R, M, H, G, D].
        key_pages: keys by page, [pages, size, H, D].
        value_pages: values by page, [pages, size, H, D].
        table: pages of each request, [R, P] integers.
        lengths: tokens to read of each, [R] integers; may be 0.
        scale: factor of the scores.

    Returns:
        The output [R, M, H, G, D], 0 where the length is, and the log-sum-exp of the scores [R, M, H, G], -inf there.
    """
    keys, values = (pages[table.long()].flatten(1, 2).float() for pages in (key_pages, value_pages))
    scores = torch.einsum("rmhgd,rnhd->rmhgn", q.float(), keys) * scale
    unread = torch.arange(keys.shape[1], device=q.device) >= lengths[:, None]
    scores = scores.masked_fill(unread[:, None, None, None], float("-inf"))
    lse = scores.logsumexp(-1)
    weights = (scores - lse[..., None]).exp().nan_to_num(0.0)
    return torch.einsum("rmhgn,rnhd->rmhgd", weights, values), lse


def merge(a: Tensor, a_lse: Tensor, b: Tensor, b_lse: Tensor) -> Tensor:
    """Attention over two sets of keys from that over each and their log-sum-exps; ``a`` may be empty (-inf), ``b`` not."""
    top = torch.maximum(a_lse, b_lse)
    weight_a, weight_b = (a_lse - top).exp()[..., None], (b_lse - top).exp()[..., None]
    return (torch.where(weight_a > 0, a * weight_a, 0) + b * weight_b) / (weight_a + weight_b)
