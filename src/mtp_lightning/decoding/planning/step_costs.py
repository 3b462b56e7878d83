# SPDX-License-Identifier: Apache-2.0
"""What steps take, from a few that were measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
            points: dict[int, list[float]] = {}
            for plan, s in measured.items():
                if bool(plan.masks) == masked:
                    points.setdefault(_positions(plan), []).append(s - self._drafting(plan))
            if not points:
                raise ValueError("no step with masks was measured")
            positions = sorted(points)
            # Against noise: no step takes longer than one of more positions, nor less than a plain one.
            least = self._curves[False][1][0] if masked else 0.0
            seconds = _rising([sum(points[at]) / len(points[at]) for at in positions])
            self._curves[masked] = np.array(positions), np.maximum(seconds, least)

    def _drafting(self, plan: Plan) -> float:
        return max(0, plan.masks - 1) * self.per_draft

    def seconds(self, plan: Plan) -> float:
        """What a step takes; a measured one too is smoothed by its neighbours."""
        at, (positions, seconds) = _positions(plan), self._curves[bool(plan.masks)]
        beyond = max(1.0, at / positions[-1])
        return float(np.interp(at, positions, seconds)) * beyond + self._drafting(plan)


def _rising(values: Sequence[float]) -> list[float]:
    """The rising numbers nearest to the values: where these fall, the mean of the neighbours that do."""
    groups: list[tuple[float, int]] = []  # mean and count
    for value in values:
        groups.append((value, 1))
        while len(groups) > 1 and groups[-2][0] > groups[-1][0]:
            (before, n), (last, m) = groups[-2:]
            groups[-2:] = [((n * before + m * last) / (n + m), n + m)]
    return [mean for mean, count in groups for _ in range(count)]


def _positions(plan: Plan) -> int:
    return 1 + plan.num_drafts + sum(masks for _, masks in plan.blocks())
