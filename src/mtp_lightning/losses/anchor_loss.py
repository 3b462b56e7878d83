# SPDX-License-Identifier: Apache-2.0
"""What losses to the anchor share: two distributions compared, and weights by a draft's place in its block.

p is the base model's own distribution at the anchor, which verifies the draft; q is the draft's. A token drawn from q is
accepted by the rejection rule with probability a = sum_v min(p, q)[v] = 1 - TV(p, q), by coupled verification with at least
a / (2 - a).
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mtp_lightning.errors import UsageError
from mtp_lightning.losses.base import TokenLoss, TokenTargets, Unembedding
from mtp_lightning.losses.chunked import chunk_size
from mtp_lightning.types import IGNORE_INDEX, MaskedInput, compute_dtype


class Divergences(NamedTuple):
    """How the draft's distribution q differs from the anchor's p, at each of n positions.

    Attributes:
        cross_entropy: -sum p log q, [n].
        kl: sum p log(p / q), [n].
        overlap: sum min(p, q), 0 to 1, [n]; in ``AnchorLoss.loss`` only with ``uses_overlap``.
    """

    cross_entropy: Tensor
    kl: Tensor
    overlap: Tensor


def overlap(anchor_logits: Tensor, logits: Tensor) -> Tensor:
    """sum_v min(p, q)[v] of p = softmax(anchor_logits) and q = softmax(logits), [n] from [n, V]."""
    return torch.minimum(anchor_logits.softmax(-1), logits.softmax(-1)).sum(-1)


def divergences(anchor_logits: Tensor, logits: Tensor) -> Divergences:
    """The divergences of the distributions with these logits, [n, V]."""
    cross_entropy = F.cross_entropy(logits, anchor_logits.softmax(-1), reduction="none")
    entropy = F.cross_entropy(anchor_logits, anchor_logits.softmax(-1), reduction="none")
    return Divergences(cross_entropy, cross_entropy - entropy, overlap(anchor_logits, logits))


class AnchorLoss(TokenLoss):
    """A loss at MTP positions between the base model's distribution at the anchor and the draft's. Subclasses: ``loss``.

    Args:
        weight: factor of the term in the loss.
        head: ``base`` or ``sampler``.
        position_weights: weight of m_j within its block. A number d: d ** (j - 1). ``acceptance``: the chance that
            decoding gets there, the product of the overlaps of p and q at m_1..m_{j-1}, without gradient. None: 1.

    Attributes:
        uses_overlap: True in subclasses whose ``loss`` reads ``Divergences.overlap``.
    """

    uses_anchors = True
    uses_overlap = False

    def __init__(
        self,
        weight: float = 1.0,
        head: Literal["base", "sampler"] = "sampler",
        position_weights: float | Literal["acceptance"] | None = None,
    ) -> None:
        super().__init__(weight, head, "mtp")
        if isinstance(position_weights, int | float) and not 0 < position_weights <= 1:
            raise UsageError(f"position_weights must be above 0 and at most 1, acceptance or null, got {position_weights}.")
        self.position_weights = position_weights

    @abstractmethod
    def loss(self, between: Divergences) -> Tensor:
        """The loss of each position, in nats or as a probability, [n]."""

    def per_position(self, logits: Tensor, targets: TokenTargets) -> Tensor:
        """The loss from logits."""
        assert targets.anchor_logits is not None
        return self.loss(divergences(targets.anchor_logits, logits))

    def mtp_weights(self, hidden: Tensor, anchors: Tensor | None, batch: MaskedInput, unembed: Unembedding) -> Tensor:
        """Weight of each MTP position, those of ``position_weights`` included."""
        overlaps = None
        if self.position_weights == "acceptance":
            assert anchors is not None
            overlaps = _overlaps(hidden, anchors, batch, unembed)
        return self.weigh(batch, overlaps)

    def weigh(self, batch: MaskedInput, overlaps: Tensor | None) -> Tensor:
        """Weight of each MTP position, [B, P, K]; with ``acceptance`` from the overlaps [B, P, K], 1 where none counts."""
        weights = batch.block_weights[:, :, None].expand(batch.mtp_labels.shape)
        if self.position_weights is None:
            return weights
        if self.position_weights == "acceptance":
            assert overlaps is not None
            reached = overlaps.cumprod(-1).roll(1, -1)
            reached[..., 0] = 1
            return weights * reached
        return weights * self.position_weights ** torch.arange(weights.shape[2], device=weights.device)


@torch.no_grad()
def _overlaps(hidden: Tensor, anchors: Tensor, batch: MaskedInput, unembed: Unembedding) -> Tensor:
    """Overlaps at MTP positions, 1 where the label is ignored, [B, P, K]; a chunk of logits at a time."""
    counted = batch.mtp_labels != IGNORE_INDEX
    size = chunk_size(hidden, 2 * unembed.vocab_size)
    dtype = compute_dtype(hidden.dtype)
    values = torch.ones(counted.shape, dtype=dtype, device=hidden.device)
    chunks = zip(anchors[counted].split(size), hidden[counted].split(size), strict=True)
    values[counted] = torch.cat([overlap(unembed(a).to(dtype), unembed(h).to(dtype)) for a, h in chunks])
    return values
