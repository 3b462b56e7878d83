# SPDX-License-Identifier: Apache-2.0
"""Teacher-forced acceptance, without decoding: forced acceptance length, and accuracy at each offset."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

from mtp_lightning.metrics.functional import draft_runs, offset_hits


class ForcedAcceptance(Metric):
    """Mean over starts of (run of correct greedy drafts + 1), over starts whose K labels all count (docs/glossary.md).

    As input to ``update``: ``hits`` and ``valid``, [..., K] bool.
    As output of ``compute``: a scalar from 1 to K + 1, NaN before any start; ``accuracy`` gives [K], by offset.

    Args:
        num_masks: K.

    Example:
        >>> metric = ForcedAcceptance(2)
        >>> metric.update(torch.tensor([[True, False], [True, True]]), torch.ones(2, 2, dtype=torch.bool))
        >>> metric.compute()
        tensor(2.5000, dtype=torch.float64)
    """

    full_state_update = False
    length: Tensor
    starts: Tensor
    hits: Tensor
    labels: Tensor

    def __init__(self, num_masks: int) -> None:
        super().__init__()
        for name, size in (("length", ()), ("starts", ()), ("hits", (num_masks,)), ("labels", (num_masks,))):
            self.add_state(name, torch.zeros(size, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, hits: Tensor, valid: Tensor) -> None:
        """Count the runs and the hits of a batch."""
        length, starts = draft_runs(hits, valid)
        self.length += length
        self.starts += starts
        num_hits, num_labels = offset_hits(hits, valid)
        self.hits += num_hits
        self.labels += num_labels

    def compute(self) -> Tensor:
        """Mean run plus one."""
        return self.length.double() / self.starts

    def accuracy(self) -> Tensor:
        """Share of correct drafts at each mask m_1..m_K over all processes, which must all call this; [K] float64."""
        with self.sync_context(dist_sync_fn=self.dist_sync_fn):
            return self.hits.double() / self.labels
