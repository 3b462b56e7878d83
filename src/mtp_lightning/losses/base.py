# SPDX-License-Identifier: Apache-2.0
"""Loss terms: modules that turn hidden states into sums over positions, with the count that each sum is divided by.

To write your own, subclass ``TokenLoss`` (a loss per position from logits) or ``LossTerm`` (anything else) and name the
class in ``model.losses`` of the YAML::

    class FocalLoss(TokenLoss):
        def per_position(self, logits, targets):  # [n, V] -> [n]
            log_p = logits.log_softmax(-1).gather(1, targets.labels[:, None])[:, 0]
            return -((1 - log_p.exp()) ** 2) * log_p
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from mtp_lightning.errors import UsageError
from mtp_lightning.losses.chunked import chunked_sum
from mtp_lightning.types import IGNORE_INDEX, MTP, NTP, HiddenStates, LossSum, MaskedInput, compute_dtype


class Unembedding(Protocol):
    """The frozen unembedding: hidden states [..., D] to logits [..., V], soft-capped or scaled as in the base."""

    vocab_size: int

    def __call__(self, hidden: Tensor) -> Tensor:
        """Logits of hidden states."""
        ...


class LossTerm(nn.Module, ABC):
    """One summand of the loss.

    Args:
        weight: factor of the term in the loss.
    """

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        self.weight = weight

    @abstractmethod
    def forward(self, states: HiddenStates, batch: MaskedInput, unembed: Unembedding) -> Sequence[LossSum]:
        """Sums of per-position losses over the batch.

        Args:
            states: hidden states of the batch.
            batch: the masked input.
            unembed: the base model's unembedding.

        Returns:
            One or more sums. The term's value is the sum of their totals over their denominators.
        """


def term_value(sums: Sequence[LossSum], counts: Tensor) -> Tensor:
    """The value of a loss term, a scalar: the sum of its totals over their counts; 0 where there is nothing to count.

    ``counts`` are ``MaskedInput.counts`` of the whole batch that the sums are part of, over ranks and accumulation, [3].
    """
    parts = []
    for total, denominator in sums:
        indices = (denominator,) if isinstance(denominator, int) else denominator
        divisor = counts[list(indices)].sum().clamp_min(1).to(total.dtype)
        parts.append(total / divisor)
    return torch.stack(parts).sum()


class TokenTargets(NamedTuple):
    """The targets of a chunk of n positions.

    Attributes:
        labels: token ids, [n] int64.
        offsets: how far ahead each position predicts, 1 at NTP positions and j + 1 at m_j, [n] int64.
        anchor_logits: the base model's own logits for the same label, [n, V], detached; None unless ``uses_anchors``.
    """

    labels: Tensor
    offsets: Tensor
    anchor_logits: Tensor | None


class TokenLoss(LossTerm):
    """A loss per position from the logits there. Subclasses implement ``per_position``.

    Args:
        weight: factor of the term in the loss.
        head: what is unembedded: ``base`` (the decoder's hidden state) or ``sampler`` (the sampler head's output).
        positions: ``mtp``, ``ntp`` or ``all``. With a frozen gated base the loss of the base head at NTP positions is a
            constant; a sampler head without an output at NTP positions has no loss there.
        joint_mean: divide NTP and MTP positions together by their joint count, as the paper does; else each by its own,
            which keeps the expected loss the same when blocks are sampled.

    Attributes:
        uses_anchors: True in subclasses that read ``TokenTargets.anchor_logits``.
    """

    uses_anchors = False

    def __init__(
        self,
        weight: float = 1.0,
        head: Literal["base", "sampler"] = "base",
        positions: Literal["mtp", "ntp", "all"] = "mtp",
        joint_mean: bool = False,
    ) -> None:
        super().__init__(weight)
        self.head = head
        self.positions = positions
        self.joint_mean = joint_mean

    @abstractmethod
    def per_position(self, logits: Tensor, targets: TokenTargets) -> Tensor:
        """The loss of each position of a chunk.

        Args:
            logits: [n, V], float32 or float64.
            targets: labels and offsets of the same positions.

        Returns:
            Loss in nats, [n].
        """

    def forward(self, states: HiddenStates, batch: MaskedInput, unembed: Unembedding) -> Sequence[LossSum]:
        """The sums over NTP and MTP positions that this term counts."""
        if self.head == "sampler" and states.sampler is None:
            raise UsageError(f"loss term {type(self).__name__} needs a sampler head, and model.sampler_head is false.")
        ntp = states.ntp if self.head == "base" else states.sampler_ntp
        mtp = states.mtp if self.head == "base" else states.sampler
        assert mtp is not None
        sums = []
        if self.positions != "ntp":
            shape, K = batch.mtp_labels.shape, mtp.shape[2]
            offsets = torch.arange(2, K + 2, device=mtp.device).expand(shape)
            anchors = batch.at_anchors(states.ntp.detach()) if self.uses_anchors else None
            weights = self.mtp_weights(mtp, anchors, batch, unembed)
            sums.append(LossSum(self._sum(mtp, batch.mtp_labels, weights, offsets, anchors, unembed), MTP))
        if self.positions != "mtp" and ntp is not None:
            ones = torch.ones_like(batch.ntp_labels)
            anchors = states.ntp.detach() if self.uses_anchors else None
            sums.append(LossSum(self._sum(ntp, batch.ntp_labels, ones, ones, anchors, unembed), NTP))
        if not sums:
            raise UsageError(f"loss term {type(self).__name__} counts NTP positions, where this sampler head has no output.")
        if self.joint_mean and len(sums) == 2:
            sums = [LossSum(sums[0].total + sums[1].total, (NTP, MTP))]
        return sums

    def mtp_weights(self, hidden: Tensor, anchors: Tensor | None, batch: MaskedInput, unembed: Unembedding) -> Tensor:
        """Weight of the loss at each MTP position, without gradient, [B, P, K]; states and anchors are [B, P, K, D]."""
        return batch.block_weights[:, :, None].expand(batch.mtp_labels.shape)

    def _checked(self, losses: Tensor, logits: Tensor) -> Tensor:
        """What ``per_position`` returned; UsageError unless it is a loss of each position, which trains something."""
        name, n = type(self).__name__, len(logits)
        if not isinstance(losses, Tensor) or losses.shape != (n,):
            found = f"shape {list(losses.shape)}" if isinstance(losses, Tensor) else type(losses).__name__
            raise UsageError(f"{name}.per_position must return a loss of each position, shape [{n}], got {found}.")
        if torch.is_grad_enabled() and logits.requires_grad and not losses.requires_grad:
            raise UsageError(f"{name}.per_position returned losses without a gradient: they don't depend on the logits.")
        return losses

    def _sum(
        self, hidden: Tensor, labels: Tensor, weights: Tensor, offsets: Tensor, anchors: Tensor | None, unembed: Unembedding
    ) -> Tensor:
        """The weighted sum over the positions whose label counts, a chunk of logits at a time."""
        counted = (labels != IGNORE_INDEX).flatten().nonzero().squeeze(1)  # the one place here that waits for the device

        def pick(values: Tensor) -> Tensor:
            return values.flatten(0, labels.ndim - 1).index_select(0, counted)

        picked_labels, picked_offsets = pick(labels), pick(offsets)
        picked_anchors = None if anchors is None else pick(anchors)

        def losses(chunk: Tensor, positions: slice) -> Tensor:
            logits = unembed(chunk)
            dtype = compute_dtype(logits.dtype)
            anchor_logits = None
            if picked_anchors is not None:
                with torch.no_grad():
                    anchor_logits = unembed(picked_anchors[positions]).to(dtype)
            targets = TokenTargets(picked_labels[positions], picked_offsets[positions], anchor_logits)
            return self._checked(self.per_position(logits.to(dtype), targets), logits)

        return chunked_sum(pick(hidden), pick(weights), losses, unembed.vocab_size, tuple(self.parameters()))
