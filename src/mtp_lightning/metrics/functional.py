# SPDX-License-Identifier: Apache-2.0
"""Counts behind the acceptance metrics. Pure functions; sums and counts, never averages."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

REPETITION_THRESHOLD = 0.1
"""A text counts as not repeating itself if fewer of its 8-grams are repeats: loops inflate the acceptance length."""


def draft_runs(hits: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Runs of correct drafts from the front of each block, over the blocks whose labels all count, of [..., K] bool.

    ``hits [[1, 1, 0], [1, 0, 1]] -> runs [2, 1]``

    Returns the sum of (run + 1) over the blocks with K counted labels, scalar int64, and the number of those blocks.
    """
    is_complete = valid.all(-1)
    runs = hits.long().cumprod(-1).sum(-1)
    return (runs + 1)[is_complete].sum(), is_complete.sum()


def offset_hits(hits: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Correct drafts and counted labels at each of the K offsets, [K] int64 each, of [..., K] bool."""
    return (hits & valid).flatten(0, -2).sum(0), valid.flatten(0, -2).sum(0)


def share_of_reference(forced: float, reference: float) -> float:
    """(forced - 1) / (reference - 1); NaN, undefined, if the reference is 1."""
    return (forced - 1) / (reference - 1) if reference > 1 else float("nan")


def repeated_ngrams(tokens: Sequence[int], n: int = 8) -> float:
    """Share of a text's n-grams that occurred before in it, from 0 to 1; 0 for a text shorter than n.

    ``[1, 2, 1, 2, 1], n = 2 -> 0.5`` (12 21 12 21: two of four occurred before)
    """
    grams = Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))
    total = sum(grams.values())
    return (total - len(grams)) / total if total else 0.0


def survival_counts(lengths: Sequence[int], max_length: int) -> Tensor:
    """Number of lengths that are at least 1, 2, .., ``max_length``, [max_length] int64.

    Of the accepted drafts of each step these are the steps that accepted the draft at each position.
    ``lengths [2, 0, 1], max_length 2 -> [2, 1]``
    """
    return (torch.tensor(list(lengths), dtype=torch.int64)[:, None] >= torch.arange(1, max_length + 1)).sum(0)
