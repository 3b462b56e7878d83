# SPDX-License-Identifier: Apache-2.0
"""Candidates: the tokens that the sampler head chooses the drafts of a block from, and their rows of the unembedding.

Over the whole vocabulary every draft token would read the whole unembedding. Instead the base head's logits of all masks of
the block, one product, name the best few tokens at each mask, and the sampler head scores only those. Verification uses the
whole vocabulary, so the text is the same.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Unembedding(Protocol):
    """A base's unembedding with a plain linear output layer: ``FrozenUnembedding``, or another engine's."""

    head: Any  # has ``weight`` [V, D] or longer, and ``bias`` [V] or None
    vocab_size: int

    def __call__(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of hidden states [..., D]."""
        ...

    def scale_and_cap(self, logits: Tensor) -> Tensor:
        """Scale and cap raw logits of any part of the vocabulary."""
        ...


class Candidates:
    """The best m tokens at each mask, by the base head's logits [B, J, V]: ``tokens``, [B, J, m] int64, ascending."""

    def __init__(self, unembed: Unembedding, logits: Tensor, count: int) -> None:
        self.unembed = unembed
        # Ascending: of equal scores the smallest id is drafted, as the base's argmax has it.
        self.tokens = logits.topk(count, sorted=False).indices.sort(-1).values
        weight, bias = unembed.head.weight, unembed.head.bias
        self.weight = F.embedding(self.tokens, weight)
        self.bias = None if bias is None else bias[self.tokens]

    def logits(self, j: int, states: Tensor) -> Tensor:
        """Logits of the candidates of the j-th mask, [B, m], from the sampler head's output [B, D]."""
        logits = torch.bmm(self.weight[:, j], states[..., None])[..., 0]
        return self.unembed.scale_and_cap(logits if self.bias is None else logits + self.bias[:, j])

    def spread(self, scores: Tensor) -> Tensor:
        """Scores [B, J, m] as those of the whole vocabulary, [B, J, V]: -inf for tokens that are no candidates."""
        whole = scores.new_full((*scores.shape[:-1], self.unembed.vocab_size), float("-inf"))
        return whole.scatter_(-1, self.tokens, scores)
