# SPDX-License-Identifier: Apache-2.0
"""What steps take, from a few that were measured."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from mtp_lightning.decoding.planning.draft_plan import PLAIN, Plan


def pair(num_masks: int) -> tuple[Plan, Plan]:
    """Two plans of 2 k positions that differ in the number of tokens drafted: 1 and k."""
    return Plan(num_masks - 1, 1, "all"), Plan(num_masks - 1, num_masks, "last")


class _Line(NamedTuple):
    """Seconds of a step: the same up to ``bend`` positions of a row, then rising evenly, and more for each further draft."""

    bend: int
    base: float  # seconds of a step that drafts one token or none
    per_position: float  # after the bend
    per_draft: float  # after the first
    last: int  # positions of the largest step that was measured

    def at(self, plan: Plan) -> float:
        """Seconds of a step by this plan."""
        positions = _positions(plan)
        drafting = self.per_draft * _further_drafts(plan)
        # Beyond what was measured no position is free.
        return max(self._rise(positions), self._rise(self.last) * positions / self.last) + drafting

    def _rise(self, positions: int) -> float:
        return self.base + self.per_position * max(0, positions - self.bend)


class StepCosts:
    """Seconds of steps by the positions that they feed for a row and the tokens they draft, fitted to those measured.

    Reading the weights takes the same time for few positions as for one, and beyond some number the arithmetic decides: so
    steps with masks, and steps that only verify, each lie on a line with one bend. A few numbers from all measurements err
    less than each measurement by itself does on a busy machine. Among the measured are the plain step, which counts as it
    is, and one with masks; ``pair`` tells what drafts cost from what positions do.
    """

    def __init__(self, measured: Mapping[Plan, float]) -> None:
        self.measured = dict(measured)
        masked = [plan for plan in measured if plan.masks]
        if not masked:
            raise ValueError("no step with masks was measured")
        verifying = [plan for plan in measured if not plan.masks and plan != PLAIN]
        self._lines = {True: self._fit(masked), False: self._fit(verifying if len(verifying) > 1 else [PLAIN, *verifying])}

    def seconds(self, plan: Plan) -> float:
        """What a step takes; at least what a plain one does."""
        plain = self.measured[PLAIN]
        return plain if plan == PLAIN else max(plain, self._lines[bool(plan.masks)].at(plan))

    def _fit(self, plans: Sequence[Plan]) -> _Line:
        """The line nearest to what steps of these plans took, by relative errors; none of its slopes is negative."""
        positions, further = (np.array([count(plan) for plan in plans]) for count in (_positions, _further_drafts))
        seconds = np.array([self.measured[plan] for plan in plans])
        best, least = _Line(1, float(seconds.mean()), 0.0, 0.0, int(positions.max())), np.inf
        for bend, has_rise, has_drafts in itertools.product(positions.tolist(), (0, 1), (0, 1)):
            rise = np.maximum(0, positions - bend)
            columns = np.stack([np.ones(len(plans)), has_rise * rise, has_drafts * further], axis=1)
            found = np.linalg.lstsq(columns / seconds[:, None], np.ones(len(plans)), rcond=None)[0]
            error = float(np.square(columns @ found / seconds - 1).sum())
            if error < least and (found >= 0).all():
                base, per_position, per_draft = found.tolist()
                best, least = _Line(bend, base, per_position, per_draft, best.last), error
        return best


def _positions(plan: Plan) -> int:
    return 1 + plan.num_drafts + sum(masks for _, masks in plan.blocks())


def _further_drafts(plan: Plan) -> int:
    return max(0, plan.masks - 1)
