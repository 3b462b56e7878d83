# SPDX-License-Identifier: Apache-2.0
"""What plans cost on this machine: the calibrated curve of positions, corrected by measured steps."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mtp_lightning.decoding.planning.draft_plan import PLAIN, Plan
from mtp_lightning.decoding.planning.draft_stats import DraftStats
from mtp_lightning.decoding.planning.step_costs import CurveCorrection, StepCosts

REFRESH_EVERY = 16
"""Steps between updates of the costs from measured steps."""
PLAIN_FIRST = 2
"""Plain steps taken at the beginning to know what they take."""
PLAIN_EVERY, PLAIN_EVERY_SEEN = 256, 16
"""Steps between later plain steps: at first the second number for each plain step seen, since two slow ones would make
drafting look good for long; then at most the first number."""


class PlanCosts:
    """Seconds that plans take for a batch. Arrays are [c, m, where] by index among the sizes and block positions.

    Args:
        costs: calibrated costs of the parts of a step.
        stats: measured steps; updated in place.
        sizes: numbers of drafts and of masks that plans use, ascending from 0.
        placements: where plans place blocks (``Plan.where``).
        num_rows: rows B.

    Attributes:
        num_rows: active rows.
        batch: rows that steps feed, finished ones included, and slots of the cache.
    """

    def __init__(
        self, costs: StepCosts, stats: DraftStats, sizes: Sequence[int], placements: Sequence[str], num_rows: int
    ) -> None:
        self.costs, self.stats, self.sizes, self.placements = costs, stats, tuple(sizes), tuple(placements)
        self.batch = num_rows, 0
        c, m = np.array(self.sizes)[:, None, None], np.array(self.sizes)[None, :, None]
        blocks = np.concatenate([np.ones_like(c), 1 + (c > 0), 1 + c], axis=2)[..., : len(self.placements)]
        self._positions = 1 + c + blocks * m  # per row
        self._verify_seconds = np.broadcast_to(costs.per_verified * c, self._positions.shape)
        self._curve = costs.curve(int(self._positions.max()) * num_rows)
        self._steps_since_refresh = 0
        self.select(num_rows)

    def select(self, num_rows: int) -> None:
        """Continue with this number of rows, not more than before."""
        self.num_rows = num_rows
        self._expected = self._curve[self._positions * num_rows] + self._verify_seconds * num_rows**0.5
        self._corrected: np.ndarray | None = None
        self._without_masks: np.ndarray | None = None

    def refresh(self) -> None:
        """Correct the costs by the steps measured so far."""
        self._steps_since_refresh = 0
        self._corrected = self._without_masks = None

    def _verifying(self) -> np.ndarray:
        """Seconds of every plan without drafting."""
        if self._corrected is None:
            factors = self.stats.correction.factors(len(self._curve) - 1)
            masked = np.minimum(np.arange(len(self.sizes)), 1)[None, :, None]
            self._corrected = self._expected * factors[masked, self._positions * self.num_rows]
        return self._corrected

    def without_masks(self) -> np.ndarray:
        """Seconds of the plans without masks, [c]; more drafts never take less."""
        if self._without_masks is None:
            self._without_masks = np.maximum.accumulate(self.all_plans()[:, 0, 0])
        return self._without_masks

    def all_plans(self) -> np.ndarray:
        """Seconds of every plan, drafting included; of graphs the measured ones where known."""
        num_drafted = np.arange(self.sizes[-1] + 1)
        fixed = self.drafting(1) - self.draft_token()
        drafting = num_drafted * self.draft_token() + np.where(num_drafted > 0, fixed, 0.0)
        seconds = self._verifying() + drafting[list(self.sizes)][None, :, None]
        for (batch, plan), (mean, _) in self.stats.graph_seconds.items():
            if batch == self.batch and {plan.num_drafts, plan.masks} <= set(self.sizes) and plan.where in self.placements:
                seconds[self._index(plan)] = mean
        return seconds

    def plan(self, plan: Plan, num_drafted: int) -> float:
        """Seconds of a step that drafts ``num_drafted`` tokens one after another."""
        measured = self.stats.graph_seconds.get((self.batch, plan))
        if measured:
            return measured[0]
        return float(self._verifying()[self._index(plan)]) + self.drafting(num_drafted)

    def _index(self, plan: Plan) -> tuple[int, int, int]:
        return self.sizes.index(plan.num_drafts), self.sizes.index(plan.masks), self.placements.index(plan.where)

    def drafting(self, num_drafted: int) -> float:
        """Seconds of drafting this number of tokens one after another."""
        return num_drafted * self.draft_token() + (self.costs.draft_start * self.num_rows**0.5 if num_drafted else 0.0)

    def draft_token(self) -> float:
        """Seconds of one more token of a draft."""
        return self.costs.per_draft * self.num_rows**0.5

    def plain_step_due(self) -> bool:
        """True if a plain step is to be run, because it has to be measured (again) for about this number of rows."""
        size = self.num_rows.bit_length()
        seen = float(self.stats.correction.counts[0, size - 1])
        return seen < PLAIN_FIRST or self.stats.steps_since_plain[size] >= min(PLAIN_EVERY, PLAIN_EVERY_SEEN * (seen + 1))

    def observe(self, plan: Plan, num_drafted: int, seconds: float, graph: bool = False) -> None:
        """Record the seconds of a step that drafted ``num_drafted`` tokens one after another.

        The time of a ``graph`` does not depend on what rows contain.
        """
        B, since_plain = self.num_rows, self.stats.steps_since_plain
        since_plain[B.bit_length()] = 0 if plan == PLAIN else since_plain[B.bit_length()] + 1
        if (B, plan) not in self.stats.seen_shapes:  # the first step of a shape is not representative
            self.stats.seen_shapes.add((B, plan))
            return
        if graph:
            mean, count = self.stats.graph_seconds.get((self.batch, plan), (0.0, 0))
            count = min(count + 1, CurveCorrection.MEMORY)
            clipped = min(seconds, 2 * mean) if count > 1 else seconds  # outliers say little
            self.stats.graph_seconds[self.batch, plan] = mean + (clipped - mean) / count, count
        index = self._index(plan)
        expected = float(self._expected[index]) + self.drafting(num_drafted)
        self.stats.correction.observe(int(self._positions[index]) * B, plan.masks > 0, expected, seconds)
        self._steps_since_refresh += 1
        if self._steps_since_refresh >= REFRESH_EVERY:
            self.refresh()
