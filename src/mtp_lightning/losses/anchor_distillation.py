# SPDX-License-Identifier: Apache-2.0
"""Distillation from the anchor: the target is the base model's own prediction at the NTP position aligned to a mask."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from mtp_lightning.losses.anchor_loss import AnchorLoss, Divergences
from mtp_lightning.losses.base import TokenTargets


class AnchorDistillation(AnchorLoss):
    """Cross-entropy to the base model's own next-token distribution at the anchor, instead of the text's token.

    The anchor's output is what verifies the draft, and the same forward pass computes it. Not in the paper; it raised the
    forced acceptance length of a small model at equal budget.

    Args:
        weight: factor of the term in the loss.
        head: ``base`` or ``sampler``.
        target: ``distribution`` for softmax(W z_anchor) at temperature 1, ``argmax`` for its most likely token.
        position_weights: as in ``AnchorLoss``: a number d for d ** (j - 1) at m_j, ``acceptance``, or None.
    """

    def __init__(
        self,
        weight: float = 1.0,
        head: Literal["base", "sampler"] = "sampler",
        target: Literal["distribution", "argmax"] = "distribution",
        position_weights: float | Literal["acceptance"] | None = None,
    ) -> None:
        super().__init__(weight, head, position_weights)
        self.target = target

    def loss(self, between: Divergences) -> Tensor:
        """-sum_v softmax(anchor)[v] log softmax(logits)[v]."""
        return between.cross_entropy

    def per_position(self, logits: Tensor, targets: TokenTargets) -> Tensor:
        """-sum_v softmax(anchor)[v] log softmax(logits)[v], or -log softmax(logits)[argmax anchor]."""
        assert targets.anchor_logits is not None
        if self.target == "argmax":
            return F.cross_entropy(logits, targets.anchor_logits.argmax(-1), reduction="none")
        return F.cross_entropy(logits, targets.anchor_logits.softmax(-1), reduction="none")
