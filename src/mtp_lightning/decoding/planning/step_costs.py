# SPDX-License-Identifier: Apache-2.0
"""What steps take, from a few that were measured."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from mtp_lightning.decoding.planning.draft_plan import PLAIN, Plan


def pair(num_masks: int) -> tuple[Plan, Plan]:
    """Two plans of 2 k positions that differ in the number of tokens drafted: 1 and k."""
    return Plan(num_masks - 1, 1, "all"), Plan(num_masks - 1, num_masks, "last")


class StepCosts:
    """Seconds of steps: those measured, and others by the positions that they feed for a row and the tokens they draft.

    Among the measured are the plain step and one with masks, and, where other plans than these are asked for, both of
    ``pair(num_masks)``: without these, drafting tokens after the first takes no time.
    """

    def __init__(self, measured: Mapping[Plan, float], num_masks: int) -> None:
        self.measured = dict(measured)
        one, all_tokens = (measured.get(plan, 0.0) for plan in pair(num_masks))
        # Of each token after the first. No step with several drafted tokens may come out shorter than a plain one by it.
        estimates = [(s - measured[PLAIN]) / (plan.masks - 1) for plan, s in measured.items() if plan.masks > 1]
        self.per_draft = max(0.0, min([(all_tokens - one) / max(1, num_masks - 1), *estimates]))
        self._curves: dict[bool, tuple[Any, Any]] = {}  # without masks and with, for one drafted token
        for masked in (False, True):
            points: dict[int, float] = {}
            for plan, s in measured.items():
                if bool(plan.masks) == masked:
                    at = _positions(plan)
                    points[at] = min(s - self._drafting(plan), points.get(at, math.inf))
            positions, seconds = map(np.array, zip(*sorted(points.items()), strict=True))
            # Against noise: no step takes longer than one of as many positions or more, nor less than a plain one.
            least = self._curves[False][1][0] if masked else 0.0
            self._curves[masked] = positions, np.maximum(np.minimum.accumulate(seconds[::-1])[::-1], least)

    def _drafting(self, plan: Plan) -> float:
        return max(0, plan.masks - 1) * self.per_draft

    def seconds(self, plan: Plan) -> float:
        """What a step takes; a measured one too is bounded by those of more positions."""
        at, (positions, seconds) = _positions(plan), self._curves[bool(plan.masks)]
        beyond = max(1.0, at / positions[-1])
        return float(np.interp(at, positions, seconds)) * beyond + self._drafting(plan)


def _positions(plan: Plan) -> int:
    return 1 + plan.num_drafts + sum(masks for _, masks in plan.blocks())
