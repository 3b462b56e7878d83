# SPDX-License-Identifier: Apache-2.0
"""All losses to text or anchor at MTP positions in one pass over the vocabulary, with the gradient in closed form.

For logits W h, a target distribution t and p = softmax(W h),

    -sum_v t[v] log p[v] = log sum_v exp(W h)[v] - h . m      gradient: E_p[W] - m      with m = E_t[W]

where E_p[W] is the mean of W's rows under p. So all that is needed from the vocabulary is the log of the sum and the mean
row, for the states of both heads and once for each anchor, whose mean row is the m of all masks that share it. The pass is
over tiles of the vocabulary, as in FlashAttention, so W is read once and logits never exist as a whole. The overlap of two
distributions takes a second pass, which knows the sums.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from mtp_lightning.errors import UsageError
from mtp_lightning.losses.anchor_distillation import AnchorDistillation
from mtp_lightning.losses.anchor_loss import AnchorLoss, Divergences
from mtp_lightning.losses.base import LossTerm, TokenLoss, Unembedding
from mtp_lightning.losses.cross_entropy import BaseCrossEntropy, SamplerCrossEntropy
from mtp_lightning.losses.tiles import LogSumExp, Overlap
from mtp_lightning.types import ANCHOR, IGNORE_INDEX, MTP, NTP, HiddenStates, LossSum, MaskedInput, compute_dtype


def loss_sums(
    terms: Mapping[str, LossTerm], states: HiddenStates, batch: MaskedInput, unembed: Unembedding
) -> dict[str, Sequence[LossSum]]:
    """The sums of each term, by name: of those with a closed form together, of all others by their own ``forward``."""
    weight: Tensor | None = getattr(unembed, "matrix", None)
    together: dict[str, TokenLoss] = {}
    if weight is not None:
        together = {
            name: term for name, term in terms.items() if isinstance(term, TokenLoss) and _has_closed_form(term, states)
        }
    shared = _SharedPass(list(together.values()), states, batch, weight) if weight is not None and together else None
    return {
        name: [LossSum(shared.total(together[name]), MTP)]
        if shared is not None and name in together
        else _own_sums(term, states, batch, unembed)
        for name, term in terms.items()
    }


def _own_sums(term: LossTerm, states: HiddenStates, batch: MaskedInput, unembed: Unembedding) -> Sequence[LossSum]:
    """The sums that the term itself computes; UsageError if they are something else."""
    sums: Any = term(states, batch, unembed)
    if not isinstance(sums, Sequence) or not sums or not all(map(_is_sum, sums)):
        raise UsageError(
            f"{type(term).__name__}.forward must return a list of LossSum, each with a scalar tensor as its total and"
            " NTP, MTP or ANCHOR, or a tuple of these, as its denominator."
        )
    return sums


def _is_sum(value: Any) -> bool:
    """True for a well-formed LossSum."""
    if not isinstance(value, LossSum) or not isinstance(value.total, Tensor) or value.total.ndim:
        return False
    counts = value.denominator if isinstance(value.denominator, tuple) else (value.denominator,)
    return len(counts) > 0 and all(type(each) is int and each in (NTP, MTP, ANCHOR) for each in counts)


def _has_closed_form(term: TokenLoss, states: HiddenStates) -> bool:
    """True for losses at MTP positions to the text or to the anchor's distribution, and subclasses that change ``loss``."""
    if type(term) is AnchorDistillation:
        is_known = term.target == "distribution"
    elif isinstance(term, AnchorLoss):
        methods = ("forward", "per_position", "mtp_weights")
        is_known = all(getattr(type(term), name) is getattr(AnchorLoss, name) for name in methods)
    else:
        is_known = type(term) in (BaseCrossEntropy, SamplerCrossEntropy)
    if not is_known or term.positions != "mtp":
        return False
    return term.head == "base" or states.sampler is not None


class _SharedPass:
    """What the terms share, at the N MTP positions that count."""

    def __init__(self, terms: list[TokenLoss], states: HiddenStates, batch: MaskedInput, weight: Tensor) -> None:
        self.batch, self.weight, self.ntp = batch, weight, states.ntp.detach()
        self.dtype = compute_dtype(states.mtp.dtype)
        self.counted = (batch.mtp_labels != IGNORE_INDEX).flatten().nonzero().squeeze(1)
        heads = list(dict.fromkeys(term.head for term in terms))
        self.heads_with_overlap = list(dict.fromkeys(term.head for term in terms if _needs_overlap(term)))
        at_heads = [states.mtp if head == "base" else states.sampler for head in heads]
        hidden = torch.stack([self.pick(h.flatten(0, 2)).to(self.dtype) for h in at_heads if h is not None])
        log_sums, rows = LogSumExp.apply(hidden.flatten(0, 1), weight)
        self.hidden = dict(zip(heads, hidden, strict=True))  # head -> [N, D]
        self.log_sums = dict(zip(heads, log_sums.view(hidden.shape[:2]), strict=True))  # head -> [N]
        self.rows = dict(zip(heads, rows.view(hidden.shape), strict=True))  # head -> [N, D]

    def pick(self, values: Tensor) -> Tensor:
        """The N of values [B * P * K, ...]."""
        return values.index_select(0, self.counted)

    @cached_property
    def anchors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of the A anchors: states [A, D], log sums [A] and mean rows [A, D]; and the anchor of each position, [N]."""
        L = self.ntp.shape[1]
        places = torch.arange(self.ntp.shape[0] * L, device=self.ntp.device).view(-1, L)
        # Up to K masks share an anchor.
        anchors, index = self.pick(self.batch.at_anchors(places).flatten()).unique(return_inverse=True)
        states = self.ntp.flatten(0, 1).index_select(0, anchors).to(self.dtype)
        with torch.no_grad():
            log_sums, rows = LogSumExp.apply(states, self.weight)
        return states, log_sums, rows, index

    @cached_property
    def overlaps(self) -> dict[str, Tensor]:
        """Head -> overlap with the anchor's distribution, [N], of the heads that need it."""
        heads = self.heads_with_overlap
        states, anchor_log_sums, _, index = self.anchors
        hidden, log_sums, rows = (torch.cat([of[head] for head in heads]) for of in (self.hidden, self.log_sums, self.rows))
        overlaps = Overlap.apply(
            hidden, log_sums.detach(), rows, states, anchor_log_sums, index.repeat(len(heads)), self.weight
        )
        return dict(zip(heads, overlaps.view(len(heads), -1), strict=True))

    @cached_property
    def text_rows(self) -> Tensor:
        """W's row of each label, [N, D]."""
        return self.weight.detach().index_select(0, self.pick(self.batch.mtp_labels.flatten())).to(self.dtype)

    def total(self, term: TokenLoss) -> Tensor:
        """The weighted sum of a term's losses."""
        hidden, log_sums = self.hidden[term.head], self.log_sums[term.head]
        weights = self.batch.block_weights[:, :, None].expand(self.batch.mtp_labels.shape)
        if not isinstance(term, AnchorLoss):
            losses = log_sums - (hidden * self.text_rows).sum(-1)
        else:
            states, anchor_log_sums, anchor_rows, index = self.anchors
            cross_entropy = log_sums - (hidden * anchor_rows.index_select(0, index)).sum(-1)
            entropy = (anchor_log_sums - (states * anchor_rows).sum(-1)).index_select(0, index)
            overlap = self.overlaps[term.head] if _needs_overlap(term) else torch.ones_like(entropy)
            losses = term.loss(Divergences(cross_entropy, cross_entropy - entropy, overlap))
            by_block = torch.ones_like(weights, dtype=self.dtype)
            by_block.view(-1).index_copy_(0, self.counted, overlap.detach())
            weights = term.weigh(self.batch, by_block)
        return (losses * self.pick(weights.flatten()).to(self.dtype)).sum()


def _needs_overlap(term: TokenLoss) -> bool:
    """True if the term's loss or its weights read the overlap."""
    return isinstance(term, AnchorLoss) and (term.uses_overlap or term.position_weights == "acceptance")
