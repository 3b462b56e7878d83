# SPDX-License-Identifier: Apache-2.0
"""A loss term over many batches: sums over counts, divided once at the end."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

from mtp_lightning.losses.base import term_value
from mtp_lightning.types import LossSum


class TermMean(Metric):
    """The value of one loss term over everything it was updated with.

    As input to ``update``: ``sums`` of the term and ``counts`` [3] of the same batch.
    As output of ``compute``: a scalar, NaN before any update.

    Example:
        >>> from mtp_lightning.types import MTP, NTP
        >>> metric = TermMean()
        >>> metric.update([LossSum(torch.tensor(6.0), MTP), LossSum(torch.tensor(8.0), NTP)], torch.tensor([4.0, 2.0, 0.0]))
        >>> metric.compute()
        tensor(5., dtype=torch.float64)
    """

    full_state_update = False
    totals: Tensor
    counts: Tensor
    updates: Tensor

    def __init__(self) -> None:
        super().__init__()
        # By the counts that a sum is divided by, a bit for each: NTP and MTP together are number 0b011.
        self.add_state("totals", torch.zeros(8, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("counts", torch.zeros(3, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("updates", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, sums: Sequence[LossSum], counts: Tensor) -> None:
        """Add a batch."""
        for total, denominator in sums:
            indices = (denominator,) if isinstance(denominator, int) else denominator
            self.totals[sum(1 << index for index in set(indices))] += total.detach().double()
        self.counts += counts
        self.updates += 1

    def compute(self) -> Tensor:
        """The term's value."""
        if not self.updates:
            return torch.full((), float("nan"), dtype=torch.float64)
        indices = (tuple(index for index in range(3) if bits >> index & 1) for bits in range(1, 8))
        return term_value(list(map(LossSum, self.totals[1:], indices)), self.counts)
