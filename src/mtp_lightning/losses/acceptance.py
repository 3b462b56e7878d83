# SPDX-License-Identifier: Apache-2.0
"""Losses that raise the acceptance of drafts itself, instead of a divergence from the base model's distribution.

Source: Samarin et al. 2026, arXiv 2602.23881. See ``anchor_loss`` for p, q and what their overlap has to do with acceptance.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mtp_lightning.losses.anchor_loss import AnchorLoss, Divergences


class TotalVariation(AnchorLoss):
    """1 - sum_v min(p, q)[v]: the share of drafts drawn from q that the rejection rule refuses.

    Its gradient vanishes where p and q hardly overlap, as they do at the beginning of training.
    """

    uses_overlap = True

    def loss(self, between: Divergences) -> Tensor:
        """1 - overlap."""
        return 1 - between.overlap


class NegativeLogAcceptance(AnchorLoss):
    """-log sum_v min(p, q)[v]: the gradient of the total variation over the acceptance, so that it does not vanish."""

    uses_overlap = True

    def loss(self, between: Divergences) -> Tensor:
        """-log overlap."""
        return -between.overlap.clamp_min(torch.finfo(between.overlap.dtype).tiny).log()


class HybridAcceptance(AnchorLoss):
    """w KL(p, q) + (1 - w) TV(p, q) with w = exp(-3 a), a the overlap: KL where drafts are bad, total variation where good.

    a is the position's own, without gradient, so that the loss of a position does not depend on what else is in the batch.
    """

    uses_overlap = True

    def loss(self, between: Divergences) -> Tensor:
        """The mixture."""
        w = (-3 * between.overlap.detach()).exp()
        return w * between.kl + (1 - w) * (1 - between.overlap)
