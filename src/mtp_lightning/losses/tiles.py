# SPDX-License-Identifier: Apache-2.0
"""What losses need of the vocabulary, summed over tiles of it: logits never exist as a whole. Gradients in closed form."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mtp_lightning.losses.chunked import chunk_size

TILE = 2048
"""Tokens of the vocabulary whose logits exist at once."""
STATE_MULTIPLE = 128
"""States are padded to this: their number differs from batch to batch, and on a CPU each shape of a product keeps memory."""


class LogSumExp(torch.autograd.Function):
    """log sum exp(W h) of states [N, D], and its gradient, the mean row of W [V, D] under softmax(W h): [N], [N, D]."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """States are float32 or float64, as are the outputs; products have W's dtype, or autocast's."""
        weight = _for_products(weight)
        with torch.autocast(hidden.device.type, enabled=False):
            parts = [_over_tiles(chunk, weight) for chunk in hidden.detach().split(chunk_size(hidden, TILE))]
        log_sums, rows = map(torch.cat, zip(*parts, strict=True))
        ctx.mark_non_differentiable(rows)
        ctx.save_for_backward(rows)
        return log_sums, rows

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        """The rows, scaled."""
        return upstream[0][:, None] * ctx.saved_tensors[0], None


def _over_tiles(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """One chunk of states; sums over the tiles so far are relative to the largest logit so far."""
    num_states = len(hidden)
    if padding := -num_states % STATE_MULTIPLE:
        hidden = F.pad(hidden, (0, 0, 0, padding))
    states = hidden.to(weight.dtype)
    largest = hidden.new_full((len(hidden), 1), -torch.inf)
    total, rows = torch.zeros_like(largest), torch.zeros_like(hidden)
    # In place, in memory that all tiles share: fresh memory for each would cost as much time as the exponentials.
    logits, exponentials = (hidden.new_empty(len(hidden) * TILE, dtype=d) for d in (weight.dtype, hidden.dtype))
    product = torch.empty_like(states)
    for tile in weight.split(TILE):
        shape = len(hidden), len(tile)
        tile_logits, e = (buffer[: shape[0] * shape[1]].view(shape) for buffer in (logits, exponentials))
        torch.mm(states, tile.t(), out=tile_logits)
        e.copy_(tile_logits)
        new_largest = torch.maximum(largest, e.amax(1, keepdim=True))
        e.sub_(new_largest).exp_()
        shrink = (largest - new_largest).exp_()
        largest = new_largest
        total.mul_(shrink).add_(e.sum(1, keepdim=True))
        torch.mm(tile_logits.copy_(e), tile, out=product)
        rows.mul_(shrink).add_(product)
    return (largest + total.log()).squeeze(1)[:num_states], rows.div_(total)[:num_states]


class Overlap(torch.autograd.Function):
    """sum_v min(p, q)[v] of the anchors' p = softmax(W a) and the drafts' q = softmax(W h), [N].

    With K the tokens where q < p, its gradient is sum_K q[v] W[v] - (sum_K q[v]) E_q[W].
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        log_sums: Tensor,
        rows: Tensor,
        anchors: Tensor,
        anchor_log_sums: Tensor,
        anchor_index: Tensor,
        weight: Tensor,
    ) -> Tensor:
        """States h [N, D] and a [A, D] with what ``LogSumExp`` gives for them, and the anchor of each h, [N] int64."""
        weight = _for_products(weight)
        # In the order of the anchors: then the positions of a chunk share few of them.
        order = anchor_index.argsort(stable=True)
        overlap, grad = torch.empty_like(log_sums), torch.empty_like(rows)
        with torch.autocast(hidden.device.type, enabled=False):
            for chunk in order.split(chunk_size(hidden, 2 * TILE)):
                shared, index = anchor_index[chunk].unique_consecutive(return_inverse=True)
                a, a_sums = anchors[shared].to(weight.dtype), anchor_log_sums[shared, None]
                h, h_sums = hidden.detach()[chunk].to(weight.dtype), log_sums.detach()[chunk, None]
                both, kept, kept_rows = torch.zeros_like(h_sums), torch.zeros_like(h_sums), torch.zeros_like(rows[chunk])
                for tile in weight.split(TILE):
                    q = torch.mm(h, tile.t()).to(rows.dtype).sub_(h_sums).exp_()
                    p = torch.mm(a, tile.t()).to(rows.dtype).sub_(a_sums).exp_()[index]
                    is_kept = q < p
                    both += torch.minimum(p, q).sum(1, keepdim=True)
                    q *= is_kept
                    kept += q.sum(1, keepdim=True)
                    kept_rows += torch.mm(q.to(weight.dtype), tile)
                overlap[chunk] = both.squeeze(1)
                grad[chunk] = kept_rows - kept * rows[chunk]
        ctx.save_for_backward(grad)
        return overlap

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        """The rows, scaled."""
        return upstream[0][:, None] * ctx.saved_tensors[0], None, None, None, None, None, None


def _for_products(weight: Tensor) -> Tensor:
    """W in the dtype of products: autocast's, or its own."""
    kind = weight.device.type
    return weight.detach().to(torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype)
