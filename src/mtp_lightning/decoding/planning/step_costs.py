# SPDX-License-Identifier: Apache-2.0
"""What steps take, from a few that were measured."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from operator import itemgetter
from typing import NamedTuple

import numpy as np

from mtp_lightning.decoding.planning.draft_plan import PLAIN, Plan


def pair(num_masks: int) -> tuple[Plan, Plan]:
    """Two plans of 2 k positions that differ in the number of tokens drafted: 1 and k."""
    return Plan(num_masks - 1, 1, "all"), Plan(num_masks - 1, num_masks, "last")


class _CostCurve(NamedTuple):
    """Seconds of a step: flat up to ``bend`` positions of a row, linear beyond, and more for each draft after the first."""

    bend: int
    base: float  # seconds of the flat part
    per_position: float  # after the bend
    per_draft: float  # after the first
    last: int  # positions of the largest step that was measured

    def at(self, plan: Plan) -> float:
        """Seconds of a step by this plan."""
        positions = _positions(plan)
        drafting = self.per_draft * _further_drafts(plan)
        # Beyond what was measured no position is free.
        return max(self._undrafted(positions), self._undrafted(self.last) * positions / self.last) + drafting

    def _undrafted(self, positions: int) -> float:
        """Seconds of a step of these positions, without the drafts after the first."""
        return self.base + self.per_position * max(0, positions - self.bend)


class StepCosts:
    """Seconds of steps by the positions that they feed for a row and the tokens they draft, fitted to those measured.

    Up to some number of positions reading the weights decides, beyond it the arithmetic (the roofline model): one curve for
    steps with masks, one for steps that only verify. On a busy machine a fit of few parameters errs less than single
    measurements do. Among the measured are the plain step, which counts as it is, and one with masks; ``pair`` tells what
    drafts cost from what positions do.
    """

    def __init__(self, measured: Mapping[Plan, float]) -> None:
        self.measured = dict(measured)
        masked = [plan for plan in measured if plan.masks]
        if not masked:
            raise ValueError("no step with masks was measured")
        verifying = [plan for plan in measured if not plan.masks and plan != PLAIN]
        self._curves = {True: self._fit(masked), False: self._fit(verifying if len(verifying) > 1 else [PLAIN, *verifying])}

    def seconds(self, plan: Plan) -> float:
        """What a step takes; at least what a plain one does."""
        plain = self.measured[PLAIN]
        return plain if plan == PLAIN else max(plain, self._curves[bool(plan.masks)].at(plan))

    def _fit(self, plans: Sequence[Plan]) -> _CostCurve:
        """The curve with the least squares of relative errors and no negative slope."""
        positions, further = (np.array([count(plan) for plan in plans]) for count in (_positions, _further_drafts))
        seconds = np.array([self.measured[plan] for plan in plans])
        found: list[tuple[float, _CostCurve]] = []
        for bend, has_rise, has_drafts in itertools.product(positions.tolist(), (0, 1), (0, 1)):
            rise = np.maximum(0, positions - bend)
            columns = np.stack([np.ones(len(plans)), has_rise * rise, has_drafts * further], axis=1) / seconds[:, None]
            coefficients = np.linalg.lstsq(columns, np.ones(len(plans)), rcond=None)[0]
            if (coefficients >= 0).all():
                error = float(np.square(columns @ coefficients - 1).sum())
                base, per_position, per_draft = coefficients.tolist()
                found.append((error, _CostCurve(bend, base, per_position, per_draft, int(positions.max()))))
        return min(found, key=itemgetter(0))[1]


def _positions(plan: Plan) -> int:
    return 1 + plan.num_drafts + sum(masks for _, masks in plan.blocks())


def _further_drafts(plan: Plan) -> int:
    return max(0, plan.masks - 1)
