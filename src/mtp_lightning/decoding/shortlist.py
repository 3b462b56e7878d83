# SPDX-License-Identifier: Apache-2.0
"""Shortlist: the unembedding of the tokens that drafts are chosen from, a part of the vocabulary.

A token that is not listed is never drafted, and nothing else changes: verification uses the whole vocabulary. The idea is
that of FR-Spec (Zhao et al. 2025, arXiv 2502.14856): few tokens make up most of any text.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from mtp_lightning.decoding.packed_linear import PackedLinear, is_autocast
from mtp_lightning.modeling.label_counts import LabelCounts
from mtp_lightning.modeling.unembedding import FrozenUnembedding


class Shortlist:
    """Logits of the listed ``tokens``, ids [N] int64, ascending; the base's output layer is a plain linear one."""

    def __init__(self, unembed: FrozenUnembedding, tokens: Tensor) -> None:
        self.unembed, self.tokens = unembed, tokens
        weight, bias = unembed.head.weight.detach(), unembed.head.bias
        rows = None if bias is None else bias.detach().index_select(0, tokens)
        self.linear = PackedLinear(weight.index_select(0, tokens), rows)

    def __call__(self, hidden: Tensor) -> Tensor:
        """Logits [..., N] of hidden states [..., D]."""
        if is_autocast(hidden.device):  # would not cast packed weights
            return self.unembed(hidden).index_select(-1, self.tokens)
        return self.unembed.scale_and_cap(self.linear(hidden))

    def spread(self, scores: Tensor) -> Tensor:
        """Scores [..., N] as those of the whole vocabulary, [..., V]: -inf for tokens that are not listed."""
        whole = scores.new_full((*scores.shape[:-1], self.unembed.vocab_size), float("-inf"))
        return whole.index_copy_(-1, self.tokens, scores)


def shortlist_size(counts: LabelCounts | None, vocab_size: int, asked: int | Literal["auto", "all"]) -> int:
    """The number of tokens that drafts are chosen from, 1 to V, for the option ``draft_vocabulary``."""
    if asked == "auto":
        size = vocab_size if counts is None else counts.default_size
        return size if 2 * size <= vocab_size else vocab_size
    return vocab_size if asked == "all" else min(asked, vocab_size)
