# SPDX-License-Identifier: Apache-2.0
"""Counts behind the acceptance metrics. Pure functions; sums and counts, never averages."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

REPETITION_THRESHOLD = 0.1
"""A text with a smaller share of repeated 8-grams counts as not repeating itself: loops flatter the acceptance length."""


def draft_runs(hits: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Runs of right drafts from the front of each block whose labels all count.

    ``hits [[1, 1, 0], [1, 0, 1]] -> runs [2, 1]``

    Args:
        hits: whether each draft is right, [..., K] bool.
        valid: whether each label counts, [..., K] bool.

    Returns:
        Sum of (run + 1) over the blocks with K counted labels, scalar int64, and the number of those blocks.
    """
    whole = valid.all(-1)
    runs = hits.long().cumprod(-1).sum(-1)
    return (runs + 1)[whole].sum(), whole.sum()


def offset_hits(hits: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Right drafts and counted labels at each of the K offsets.

    Args:
        hits: [..., K] bool.
        valid: [..., K] bool.

    Returns:
        Two tensors [K] int64.
    """
    return (hits & valid).flatten(0, -2).sum(0), valid.flatten(0, -2).sum(0)


def share_of_reference(forced: float, reference: float) -> float:
    """(forced - 1) / (reference - 1); NaN where the reference is 1, where it has no meaning."""
    return (forced - 1) / (reference - 1) if reference > 1 else float("nan")


def repeated_ngrams(tokens: Sequence[int], n: int = 8) -> float:
    """Share of the n-grams of a text that occurred before in it: how far a text loops.

    ``[1, 2, 1, 2, 1], n = 2 -> 0.5`` (12 21 12 21: two of four came before)

    Args:
        tokens: token ids.
        n: length of the n-grams.

    Returns:
        Between 0 and 1; 0 for a text shorter than n.
    """
    grams = Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))
    total = sum(grams.values())
    return (total - len(grams)) / total if total else 0.0


def survival_counts(accepted: Sequence[int], num_masks: int) -> Tensor:
    """How many steps kept the draft token at each position: the j-th is kept in every step that keeps j or more.

    Args:
        accepted: draft tokens kept in each step.
        num_masks: J.

    Returns:
        [J] int64.
    """
    steps = torch.tensor(list(accepted), dtype=torch.int64)
    return (steps[:, None] >= torch.arange(1, num_masks + 1)).sum(0)
