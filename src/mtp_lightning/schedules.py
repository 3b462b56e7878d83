# SPDX-License-Identifier: Apache-2.0
"""Schedules by optimizer step: of the learning rate, for ``model.lr_scheduler`` in the YAML, and of other numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Ramp:
    """A number that changes linearly during training.

    Args:
        start: the number at first.
        end: the number in the end.
        begin: optimizer step at which the change begins.
        steps: optimizer steps that it takes, 1 or more. None: to the end of the run.
    """

    start: float
    end: float
    begin: int = 0
    steps: int | None = None

    def __post_init__(self) -> None:
        _non_negative("begin", self.begin)
        if self.steps is not None and self.steps < 1:
            raise UsageError(f"steps must be 1 or more, got {self.steps}.")

    def at(self, step: int, total_steps: float) -> float:
        """The number at an optimizer step of a run of ``total_steps``."""
        steps = self.steps if self.steps is not None else max(1, total_steps - self.begin)
        return self.start + (self.end - self.start) * min(1.0, max(0, step - self.begin) / steps)


def _non_negative(name: str, value: Any) -> Any:
    if value < 0:
        raise UsageError(f"{name} must be 0 or more, got {value}.")
    return value
