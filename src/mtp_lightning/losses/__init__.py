# SPDX-License-Identifier: Apache-2.0
"""Loss terms. One file a loss; ``base`` has what they share."""

from mtp_lightning.losses.acceptance import HybridAcceptance, NegativeLogAcceptance, TotalVariation
from mtp_lightning.losses.anchor_distillation import AnchorDistillation
from mtp_lightning.losses.anchor_loss import AnchorLoss, Divergences
from mtp_lightning.losses.base import LossTerm, TokenLoss, TokenTargets, Unembedding, term_value
from mtp_lightning.losses.cross_entropy import BaseCrossEntropy, SamplerCrossEntropy
from mtp_lightning.losses.latent_consistency import LatentConsistency

__all__ = [
    "AnchorDistillation",
    "AnchorLoss",
    "BaseCrossEntropy",
    "Divergences",
    "HybridAcceptance",
    "LatentConsistency",
    "LossTerm",
    "NegativeLogAcceptance",
    "SamplerCrossEntropy",
    "TokenLoss",
    "TokenTargets",
    "TotalVariation",
    "Unembedding",
    "term_value",
]
