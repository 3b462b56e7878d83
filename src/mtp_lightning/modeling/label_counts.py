# SPDX-License-Identifier: Apache-2.0
"""LabelCounts: how often each token was the label of a mask in training, from which the draft shortlist is chosen."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mtp_lightning.errors import RunError

LABEL_COUNTS = "mtp_label_counts"
"""Their key in checkpoints and saved folders; absent if the run did not count."""
COVERAGE = 0.97
"""Share of the labels that the default shortlist covers."""
ROUNDED_TO = 64
"""A shortlist's size is a multiple of this: kernels work on tiles."""


class LabelCounts:
    """How often each token was a label, [V] int64, immutable."""

    def __init__(self, counts: Tensor) -> None:
        self.counts = counts.cpu()

    @cached_property
    def order(self) -> Tensor:
        """Token ids, the most frequent first and among equals the smallest, [V] int64."""
        return self.counts.argsort(descending=True, stable=True)

    @cached_property
    def default_size(self) -> int:
        """Number of the most frequent tokens that cover ``COVERAGE`` of the labels.

        Counts are add-one smoothed, so a short training, which has seen few of the tokens, asks for nearly all of them.
        """
        reached = (self.counts + 1)[self.order].double().cumsum(0)
        needed = int((reached < COVERAGE * reached[-1]).sum()) + 1
        return -(-needed // ROUNDED_TO) * ROUNDED_TO

    def share(self, size: int) -> float:
        """Share of the labels that the ``size`` most frequent tokens cover."""
        return int(self.counts[self.order[:size]].sum()) / int(self.counts.sum())


def count_labels(counts: Tensor, labels: Tensor) -> None:
    """Add labels (any shape, int64, negative where ignored) to counts [V], in place and without waiting for the device."""
    flat = labels.flatten()
    counts.scatter_add_(0, flat.clamp(min=0), (flat >= 0).long())


def parse_label_counts(value: Any, vocab_size: int, complaint: str) -> LabelCounts | None:
    """Validate counts read from a file, and fit them to a vocabulary with another number of padding rows.

    None if the file was written without counts; a RunError that begins with ``complaint`` if they are not a vector of int64
    from 0 on.
    """
    if value is None:
        return None
    if not isinstance(value, Tensor) or value.dtype != torch.int64 or value.ndim != 1 or bool((value < 0).any()):
        raise RunError(f"{complaint}: {LABEL_COUNTS} should be a vector of int64 numbers from 0 on.")
    return LabelCounts(F.pad(value[:vocab_size], (0, max(0, vocab_size - len(value)))))
