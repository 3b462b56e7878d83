# SPDX-License-Identifier: Apache-2.0
"""Cross-entropy to the text, for the base head and for the sampler head. Source: Samragh et al. 2025, §2.5."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from mtp_lightning.losses.base import TokenLoss, TokenTargets


class _CrossEntropy(TokenLoss):
    def per_position(self, logits: Tensor, targets: TokenTargets) -> Tensor:
        """-log softmax(logits)[label]."""
        return F.cross_entropy(logits, targets.labels, reduction="none")


class BaseCrossEntropy(_CrossEntropy):
    """L^b: -log softmax(W z)[y], with the decoder's hidden state z and the label y of the text.

    Args:
        weight: factor of the term in the loss.
        positions: ``all`` is the paper's; the NTP part is a constant for a gated model and costs an unembedding.
        joint_mean: the paper's joint mean over NTP and MTP positions.
    """

    def __init__(
        self, weight: float = 1.0, positions: Literal["mtp", "ntp", "all"] = "mtp", joint_mean: bool = False
    ) -> None:
        super().__init__(weight, "base", positions, joint_mean)


class SamplerCrossEntropy(_CrossEntropy):
    """L^s: -log softmax(W h)[y], with the sampler head's output h, teacher-forced with the true previous token.

    Args:
        weight: factor of the term in the loss.
        positions: ``all`` is the paper's; a head without an output at NTP positions has its loss at MTP positions only.
        joint_mean: the paper's joint mean over NTP and MTP positions.
    """

    def __init__(
        self, weight: float = 1.0, positions: Literal["mtp", "ntp", "all"] = "mtp", joint_mean: bool = False
    ) -> None:
        super().__init__(weight, "sampler", positions, joint_mean)
