# SPDX-License-Identifier: Apache-2.0
"""All cross-entropies at MTP positions in one pass over the vocabulary, with the gradient in closed form.

For logits W h, a target distribution t and p = softmax(W h),

    -sum_v t[v] log p[v] = log sum_v exp(W h)[v] - h . m      gradient: E_p[W] - m      with m = E_t[W]

where E_p[W] is the mean of W's rows under p. So all that is needed from the vocabulary is the log of the sum and the mean
row, for the states of both heads and once for each anchor, whose mean row is the m of all masks that share it. The pass is
over tiles of the vocabulary, as in FlashAttention, so W is read once and logits never exist as a whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mtp_lightning.losses.anchor_distillation import AnchorDistillation
from mtp_lightning.losses.base import LossTerm, TokenLoss, Unembedding
from mtp_lightning.losses.chunked import chunk_size
from mtp_lightning.losses.cross_entropy import BaseCrossEntropy, SamplerCrossEntropy
from mtp_lightning.types import IGNORE_INDEX, MTP, HiddenStates, LossSum, MaskedInput, compute_dtype

TILE = 2048
"""Tokens of the vocabulary whose logits exist at once."""


def loss_sums(
    terms: Mapping[str, LossTerm], states: HiddenStates, batch: MaskedInput, unembed: Unembedding
) -> dict[str, Sequence[LossSum]]:
    """The sums of each term, by name: of those with a closed form together, of all others by their own ``forward``."""
    weight: Tensor | None = getattr(unembed, "matrix", None)
    sums: dict[str, Sequence[LossSum]] = {}
    if weight is not None:
        together = {
            name: term for name, term in terms.items() if isinstance(term, TokenLoss) and _has_closed_form(term, states)
        }
        if together:
            sums = _closed_form_sums(together, states, batch, weight)
    return {name: sums[name] if name in sums else term(states, batch, unembed) for name, term in terms.items()}


def _has_closed_form(term: TokenLoss, states: HiddenStates) -> bool:
    """True for cross-entropies at MTP positions to the text or to the anchor's distribution; not for subclasses."""
    if type(term) is AnchorDistillation:
        is_known = term.target == "distribution"
    else:
        is_known = type(term) in (BaseCrossEntropy, SamplerCrossEntropy)
    if not is_known or term.positions != "mtp":
        return False
    return term.head == "base" or states.sampler is not None


def _closed_form_sums(
    terms: dict[str, TokenLoss], states: HiddenStates, batch: MaskedInput, weight: Tensor
) -> dict[str, Sequence[LossSum]]:
    counted = (batch.mtp_labels != IGNORE_INDEX).flatten().nonzero().squeeze(1)
    heads = list(dict.fromkeys(term.head for term in terms.values()))
    dtype = compute_dtype(states.mtp.dtype)
    at_heads = [states.mtp if head == "base" else states.sampler for head in heads]
    hidden = torch.stack([h.flatten(0, 2).index_select(0, counted).to(dtype) for h in at_heads if h is not None])
    log_sums = LogSumExp.apply(hidden.flatten(0, 1), weight)[0].view(hidden.shape[:2])
    targets: dict[bool, Tensor] = {}  # E_t[W], by whether the target is the anchor's distribution
    if any(term.uses_anchors for term in terms.values()):
        L = batch.input_ids.shape[1]
        places = torch.arange(batch.input_ids.numel(), device=counted.device).view(-1, L)
        # Up to K masks share an anchor.
        anchors, inverse = batch.at_anchors(places).flatten().index_select(0, counted).unique(return_inverse=True)
        with torch.no_grad():
            at_anchors = states.ntp.flatten(0, 1).index_select(0, anchors).to(dtype)
            targets[True] = LogSumExp.apply(at_anchors, weight)[1].index_select(0, inverse)
    if not all(term.uses_anchors for term in terms.values()):
        targets[False] = weight.detach().index_select(0, batch.mtp_labels.flatten().index_select(0, counted)).to(dtype)
    weights = batch.block_weights[:, :, None].expand(batch.mtp_labels.shape).flatten().index_select(0, counted).to(dtype)
    sums: dict[str, Sequence[LossSum]] = {}
    for name, term in terms.items():
        place = heads.index(term.head)
        losses = log_sums[place] - (hidden[place] * targets[term.uses_anchors]).sum(-1)
        sums[name] = [LossSum((losses * weights).sum(), MTP)]
    return sums


class LogSumExp(torch.autograd.Function):
    """log sum exp(W h) of states [N, D], and its gradient, the mean row of W [V, D] under softmax(W h): [N], [N, D]."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """States are float32 or float64, as are the outputs; products have W's dtype, or autocast's."""
        kind = hidden.device.type
        weight = weight.detach().to(torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype)
        with torch.autocast(kind, enabled=False):
            parts = [_over_tiles(chunk, weight) for chunk in hidden.detach().split(chunk_size(hidden, TILE))]
        log_sums, rows = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        ctx.mark_non_differentiable(rows)
        ctx.save_for_backward(rows)
        return log_sums, rows

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        """The rows, scaled."""
        return upstream[0][:, None] * ctx.saved_tensors[0], None


def _over_tiles(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """One chunk of states; sums over the tiles so far are relative to the largest logit so far."""
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
    return (largest + total.log()).squeeze(1), rows.div_(total)
