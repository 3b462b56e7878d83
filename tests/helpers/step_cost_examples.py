# SPDX-License-Identifier: Apache-2.0
"""Costs of steps, and a planner with them. Helpers of the tests, no tests."""

from __future__ import annotations

from mtp_lightning.decoding.planning.budget import Budget
from mtp_lightning.decoding.planning.draft_stats import DraftStats
from mtp_lightning.decoding.planning.step_costs import StepCosts

FREE = StepCosts((1, 81), (1.0, 1.01), 0.0, 0.0)
"""A large model on a large GPU: positions cost next to nothing."""

STEEP = StepCosts((1, 2, 81), (1.0, 1.5, 41.0), 0.01, 0.1)
"""A small model on a CPU: a mask, and the draft to verify, each cost half a plain step: even certain drafts do not pay."""

MIDDLING = StepCosts((1, 81), (1.0, 17.0), 0.01, 0.05)
"""A position costs a fifth of a plain step."""

GENTLE = StepCosts((1, 81), (1.0, 3.0), 0.005, 0.02)


def make_budget(costs: StepCosts, num_rows: int = 1, coupled: bool = True, anywhere: bool = True) -> Budget:
    return Budget(costs, DraftStats(8), 8, num_rows, anywhere, coupled, timed=False)
