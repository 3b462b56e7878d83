# SPDX-License-Identifier: Apache-2.0
"""Learning-rate schedules by optimizer step, for ``model.lr_scheduler`` in the YAML."""

from __future__ import annotations

import math
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from mtp_lightning.errors import UsageError


class WarmupConstant(LambdaLR):
    """Rises linearly for ``warmup_steps`` and stays flat (the paper's schedule).

    Args:
        optimizer: the optimizer.
        warmup_steps: optimizer steps until the full learning rate.
    """

    def __init__(self, optimizer: Optimizer, warmup_steps: int = 0) -> None:
        self.warmup_steps = _non_negative("warmup_steps", warmup_steps)
        super().__init__(optimizer, self.factor)

    def factor(self, step: int) -> float:
        """Share of the full learning rate at an optimizer step."""
        return min(1.0, (step + 1) / max(1, self.warmup_steps))


class WarmupCosine(LambdaLR):
    """Rises linearly for ``warmup_steps`` and falls along a half cosine to ``floor`` at the end of training.

    Args:
        optimizer: the optimizer.
        warmup_steps: optimizer steps until the full learning rate.
        floor: share of the learning rate at the end.
        total_steps: optimizer steps of the run. None: the trainer's.
    """

    def __init__(
        self, optimizer: Optimizer, warmup_steps: int = 0, floor: float = 0.0, total_steps: int | None = None
    ) -> None:
        self.warmup_steps = _non_negative("warmup_steps", warmup_steps)
        self.floor = _non_negative("floor", floor)
        self.total_steps = total_steps
        super().__init__(optimizer, self.factor)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume from a checkpoint; the length of the run is this run's, not the checkpoint's."""
        total = self.total_steps
        super().load_state_dict(state_dict)
        self.total_steps = total if total is not None else self.total_steps

    def factor(self, step: int) -> float:
        """Share of the full learning rate at an optimizer step."""
        rise = min(1.0, (step + 1) / max(1, self.warmup_steps))
        if self.total_steps is None:
            return rise
        progress = max(0, step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        return rise * (self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def _non_negative(name: str, value: Any) -> Any:
    if value < 0:
        raise UsageError(f"{name} must be 0 or more, got {value}.")
    return value
