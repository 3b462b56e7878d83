# SPDX-License-Identifier: Apache-2.0
"""Acceptance length of real decoding: tokens generated over steps."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric


class AcceptanceLength(Metric):
    """G / T: tokens generated over steps, the free token included; from 1 to k + 1. The paper calls it acceptance rate.

    As input to ``update``: ``num_tokens`` and ``num_steps``, each a number or a tensor of any shape.
    As output of ``compute``: a scalar, NaN before any step.

    Example:
        >>> metric = AcceptanceLength()
        >>> metric.update(num_tokens=30, num_steps=10)
        >>> metric.update(num_tokens=10, num_steps=10)
        >>> metric.compute()
        tensor(2., dtype=torch.float64)
    """

    full_state_update = False
    num_tokens: Tensor
    num_steps: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("num_tokens", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("num_steps", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, num_tokens: Tensor | int, num_steps: Tensor | int) -> None:
        """Add generated tokens and the steps they took."""
        self.num_tokens += torch.as_tensor(num_tokens, device=self.num_tokens.device).sum()
        self.num_steps += torch.as_tensor(num_steps, device=self.num_steps.device).sum()

    def compute(self) -> Tensor:
        """Tokens over steps."""
        return self.num_tokens.double() / self.num_steps
