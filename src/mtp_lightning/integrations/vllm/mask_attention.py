# SPDX-License-Identifier: Apache-2.0
"""Attention of masks over the text in pages and the masks of their block. No vLLM.

On a CPU, vLLM's own kernel over a copy of the pages, in which each block is a request (``block_requests``). On a GPU, where
pages are read in place, two parts that their log-sum-exps merge: the text before the pass's last tokens, by FlashAttention,
and those tokens and the masks (``dense_part``).

Letters: R requests, M masks of a request, H key heads, G query heads for each, D head size, N keys, P pages.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mtp_lightning.integrations.vllm.layout import Layout


class BlockRequests(NamedTuple):
    """The blocks of a pass as requests of their own over a copy of the pages: one block, B = R * W, has k tokens."""

    pages: Tensor  # pages of the cache to copy, [N] int64
    block_table: Tensor  # by block: its pages in the copy, [B, P] int32
    slots: Tensor  # by mask: where its key and value go in the copy, [B * k] int64
    seq_lens: Tensor  # by block: the text up to its anchor and its masks, [B] int32
    starts: Tensor  # by block: the row of its first mask, and the end, [B + 1] int32


def block_requests(layout: Layout, table: Tensor, size: int) -> BlockRequests:
    """Blocks as requests: each has its own copy of the pages that its masks are written to; those before are shared.

    Args:
        layout: the pass.
        table: pages of each request, [R, any] integers.
        size: tokens in a page.

    Returns:
        The requests, on the CPU.
    """
    R, (W, k) = layout.num_requests, layout.blocks
    begin = layout.anchors.clamp(min=-1) + 1  # position of each block's first mask, [R, W]
    first, own = begin // size, 1 + (k + size - 2) // size  # its page; pages that k masks can be on
    columns = torch.arange(int(first.max()) + own)
    last_column = table.shape[1] - 1
    table = table[:R].long()
    offsets = torch.arange(own)
    written = (first[..., None] + offsets).clamp(max=last_column).flatten(1)  # past the end: any page, it is overwritten
    pages = torch.cat([table[:, columns.clamp(max=last_column)].flatten(), table.gather(1, written).flatten()])
    shared = torch.arange(R)[:, None, None] * len(columns) + columns  # [R, 1, P]
    copies = R * len(columns) + own * torch.arange(R * W).view(R, W, 1)  # first own copy of each block, [R, W, 1]
    behind = columns - first[..., None]  # pages after the first mask's, [R, W, P]
    block_table = torch.where(behind < 0, shared, copies + behind.clamp(0, own - 1))
    positions = begin[..., None] + torch.arange(k)  # [R, W, k]
    slots = (copies + positions // size - first[..., None]) * size + positions % size
    starts = torch.arange(0, (R * W + 1) * k, k, dtype=torch.int32)
    return BlockRequests(pages, block_table.flatten(0, 1).int(), slots.flatten(), (begin + k).flatten().int(), starts)


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


def merge(a: Tensor, a_lse: Tensor, b: Tensor, b_lse: Tensor) -> Tensor:
    """Attention over two sets of keys from that over each and their log-sum-exps; ``a`` may be empty (-inf), ``b`` not."""
    top = torch.maximum(a_lse, b_lse)
    weight_a, weight_b = (a_lse - top).exp()[..., None], (b_lse - top).exp()[..., None]
    return (torch.where(weight_a > 0, a * weight_a, 0) + b * weight_b) / (weight_a + weight_b)
