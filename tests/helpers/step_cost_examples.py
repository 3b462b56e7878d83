# SPDX-License-Identifier: Apache-2.0
"""Costs of steps, and planners with them. Helpers of the tests, no tests."""

from __future__ import annotations

from mtp_lightning.decoding.calibration import StepSeconds
from mtp_lightning.decoding.planner import AutoPlanner
from mtp_lightning.decoding.planning.draft_plan import Plan, draft_sizes


def costs(per_position: float, per_draft: float) -> StepSeconds:
    """A step of one position takes a second."""

    def seconds(plan: Plan, rows: int) -> float:
        positions = 1 + plan.num_drafts + sum(masks for _, masks in plan.blocks())
        return 1.0 + per_position * (rows * positions - 1) + per_draft * plan.masks

    return seconds


FREE = costs(0.0001, 0.0)
"""A large model on a large GPU: positions cost next to nothing."""

STEEP = costs(0.5, 0.1)
"""A small model on a CPU: a mask, and the draft to verify, each cost half a plain step: even certain drafts do not pay."""

MIDDLING = costs(0.2, 0.05)

GENTLE = costs(0.025, 0.02)


def auto_planner(seconds: StepSeconds, where: str = "all") -> AutoPlanner:
    return AutoPlanner(seconds, 8, draft_sizes(8), where)
