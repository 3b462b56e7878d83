# SPDX-License-Identifier: Apache-2.0
"""Learning-rate schedules against numbers by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from mtp_lightning.errors import UsageError
from mtp_lightning.schedules import Ramp, WarmupConstant, WarmupCosine


def schedule(kind: Any, **options: Any) -> tuple[torch.optim.Optimizer, Any]:
    """A schedule over one parameter with a learning rate of 1."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    return optimizer, kind(optimizer, **options)


def rates(optimizer: torch.optim.Optimizer, scheduler: Any, steps: int) -> list[float]:
    """The learning rate of each step."""
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def test_schedules_by_hand() -> None:
    assert rates(*schedule(WarmupConstant, warmup_steps=4), 6) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    cosine = rates(*schedule(WarmupCosine, warmup_steps=2, floor=0.5, total_steps=6), 8)
    # 2 steps of warm-up; then 0.5 + 0.25 (1 + cos) at 0, 1/4, 2/4, 3/4 of the rest, and the floor.
    wanted = [0.5, 1.0, 1.0, 0.75 + 0.25 * math.cos(math.pi / 4), 0.75, 0.75 - 0.25 * math.cos(math.pi / 4), 0.5, 0.5]
    assert cosine == pytest.approx(wanted, abs=1e-12)  # rounding of the cosine


def test_a_resumed_run_keeps_its_own_length() -> None:
    _, saved = schedule(WarmupCosine, total_steps=10)
    _, resumed = schedule(WarmupCosine, total_steps=50)
    resumed.load_state_dict(saved.state_dict())
    assert resumed.total_steps == 50


def test_a_ramp_by_hand() -> None:
    ramp = Ramp(2, 8, begin=10, steps=6)
    assert [ramp.at(step, 100) for step in (0, 10, 11, 13, 16, 99)] == [2, 2, 3, 5, 8, 8]
    assert Ramp(1, 0, begin=10).at(15, 20) == 0.5
    for wrong in ({"steps": 0}, {"begin": -1}):
        with pytest.raises(UsageError, match=next(iter(wrong))):
            Ramp(0, 1, **wrong)
