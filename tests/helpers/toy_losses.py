# SPDX-License-Identifier: Apache-2.0
"""A small unembedding that is not linear, and a loss term as a user would write one."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mtp_lightning.losses import TokenLoss, TokenTargets

K, D, V = 3, 8, 97


class RandomUnembedding:
    """A fixed unembedding with soft-capping, so that it is not linear."""

    vocab_size = V

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        self.weight = torch.randn(V, D, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(dtype)

    def __call__(self, hidden: Tensor) -> Tensor:
        return torch.tanh(hidden @ self.weight.T / 4) * 4


UNEMBED = RandomUnembedding()


class Focal(TokenLoss):
    """A user's loss: focal loss with a trained exponent."""

    def __init__(self, head: str = "base", positions: str = "mtp") -> None:
        super().__init__(1.0, head, positions)  # type: ignore[arg-type]
        self.gamma = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))

    def per_position(self, logits: Tensor, targets: TokenTargets) -> Tensor:
        log_p = logits.log_softmax(-1).gather(1, targets.labels[:, None])[:, 0]
        return -((1 - log_p.exp()) ** self.gamma) * log_p * targets.offsets
