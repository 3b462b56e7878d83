# SPDX-License-Identifier: Apache-2.0
"""Latent consistency: MTP hidden states are pulled towards the NTP hidden state they are aligned to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from mtp_lightning.losses.base import LossTerm, Unembedding
from mtp_lightning.types import ANCHOR, HiddenStates, LossSum, MaskedInput, compute_dtype


class LatentConsistency(LossTerm):
    """L^lcm: for each anchor the mean over its MTP positions of |z_anchor - z|^2, z_anchor detached.

    Source: Samragh et al. 2025, §2.5. The paper does not say whether the square is summed or averaged over the D
    features.

    Args:
        weight: factor of the term in the loss.
        reduction: over the features: ``mean`` or ``sum``.
    """

    def __init__(self, weight: float = 1.0, reduction: Literal["mean", "sum"] = "mean") -> None:
        super().__init__(weight)
        self.reduction = reduction

    def forward(self, states: HiddenStates, batch: MaskedInput, unembed: Unembedding) -> Sequence[LossSum]:
        """The sum over anchors; under block sampling an unbiased estimate of it."""
        anchors = batch.at_anchors(states.ntp.detach())
        dtype = compute_dtype(states.mtp.dtype)
        distance: Tensor = (anchors.to(dtype) - states.mtp.to(dtype)).square().sum(-1)
        if self.reduction == "mean":
            distance = distance / states.mtp.shape[-1]
        weights = batch.anchor_weights * batch.block_weights[:, :, None]
        return [LossSum((distance * weights.to(dtype)).sum(), ANCHOR)]
