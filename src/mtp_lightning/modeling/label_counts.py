# SPDX-License-Identifier: Apache-2.0
"""LabelCounts: how often each token was a label of a mask in training, and which tokens are worth drafting for that."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from mtp_lightning.errors import RunError

LABEL_COUNTS = "mtp_label_counts"
"""What they are called in files; those of a run that did not count have none."""
COVERAGE = 0.97
"""Share of the labels that a usual shortlist has."""
ROUNDED_TO = 64
"""A shortlist's size is a multiple of this: kernels work on tiles."""


class LabelCounts:
    """How often each token was a label; never changed.

    Args:
        counts: [V] int64.
    """

    def __init__(self, counts: Tensor) -> None:
        self.counts = counts.cpu()

    @cached_property
    def order(self) -> Tensor:
        """Token ids, the most frequent first and among equals the smallest, [V] int64."""
        return self.counts.argsort(descending=True, stable=True)

    @cached_property
    def default_size(self) -> int:
        """How many of the most frequent tokens have ``COVERAGE`` of the labels.

        Each token counts once more than it was seen. So a short training, which has not met most of what there is, asks
        for nearly all tokens.
        """
        reached = (self.counts + 1)[self.order].double().cumsum(0)
        needed = int((reached < COVERAGE * reached[-1]).sum()) + 1
        return -(-needed // ROUNDED_TO) * ROUNDED_TO

    def share(self, size: int) -> float:
        """The share of the labels that are among the so many most frequent tokens."""
        return int(self.counts[self.order[:size]].sum()) / int(self.counts.sum())


def count_labels(counts: Tensor, labels: Tensor) -> None:
    """Add a batch's labels to counts, in place and without waiting for the device.

    Args:
        counts: [V] int64.
        labels: token ids, negative where ignored, any shape, int64.
    """
    flat = labels.flatten()
    counts.scatter_add_(0, flat.clamp(min=0), (flat >= 0).long())


def parse_label_counts(found: Any, vocab_size: int, complaint: str) -> LabelCounts | None:
    """Counts that were read from a file.

    Args:
        found: what the file has; None: it was written without.
        vocab_size: V.
        complaint: how the message begins where they are no counts of this vocabulary.

    Returns:
        The counts, or None.

    Raises:
        RunError: another shape or dtype, or a number below 0.
    """
    if found is None:
        return None
    right = (
        isinstance(found, Tensor)
        and (found.dtype, found.layout, found.device.type) == (torch.int64, torch.strided, "cpu")
        and tuple(found.shape) == (vocab_size,)
    )
    if not right or bool((found < 0).any()):
        what = f"{tuple(found.shape)} {found.dtype}" if isinstance(found, Tensor) else type(found).__name__
        what += ", with a number below 0" if right else ""
        raise RunError(
            f"{complaint}: {LABEL_COUNTS} should be {vocab_size} int64 numbers from 0 on and is {what}. It is damaged."
        )
    return LabelCounts(found)
