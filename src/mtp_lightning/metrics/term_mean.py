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

    As input to ``update``: ``sums`` of the term (one or two, always of the same kind) and ``counts`` [3] of the same batch.
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
    divisors: Tensor

    def __init__(self) -> None:
        super().__init__()
        # A term has at most two sums (NTP and MTP).
        self.add_state("totals", torch.zeros(2, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("counts", torch.zeros(3, dtype=torch.float64), dist_reduce_fx="sum")
        # 1 where a sum is divided by a count. A state, so that a process without a batch gets it from the others.
        self.add_state("divisors", torch.zeros(2, 3, dtype=torch.float64), dist_reduce_fx="max")

    def update(self, sums: Sequence[LossSum], counts: Tensor) -> None:
        """Add a batch."""
        for index, part in enumerate(sums):
            self.totals[index] += part.total.detach().double()
            self.divisors[index, [part.denominator] if isinstance(part.denominator, int) else list(part.denominator)] = 1.0
        self.counts += counts

    def compute(self) -> Tensor:
        """The term's value."""
        parts = []
        for total, divisor in zip(self.totals, self.divisors, strict=True):
            indices = tuple(divisor.nonzero().flatten().tolist())
            if indices:
                parts.append(LossSum(total, indices))
        return term_value(parts, self.counts) if parts else torch.full((), float("nan"), dtype=torch.float64)
