# SPDX-License-Identifier: Apache-2.0
"""What plans cost on this machine: the measured curve of positions, corrected by what steps really take."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mtp_lightning.decoding.planning.draft_plan import Plan
from mtp_lightning.decoding.planning.draft_stats import DraftStats
from mtp_lightning.decoding.planning.step_costs import Pace, StepCosts

REFRESH = 16
"""Steps between corrections of the costs by what steps really take."""


class PlanCosts:
    """Seconds that plans take for a batch.

    Args:
        costs: what steps cost.
        record: what steps took so far; it learns.
        sizes: numbers of drafts and masks that plans have, ascending from 0.
        places: where blocks may stand.
        num_rows: rows B.

    Attributes:
        num_rows: rows that go on.
        batch: rows that steps feed, those that have finished included, and slots of the cache.
    """

    def __init__(
        self, costs: StepCosts, record: DraftStats, sizes: Sequence[int], places: Sequence[str], num_rows: int
    ) -> None:
        self.costs, self.record, self.sizes, self.places = costs, record, tuple(sizes), tuple(places)
        self.num_rows, self.batch = num_rows, (num_rows, 0)
        c, m = np.array(self.sizes)[:, None, None], np.array(self.sizes)[None, :, None]
        starts = np.array(self.sizes)[:, None]
        blocks = np.concatenate([np.ones_like(starts), 1 + (starts > 0), 1 + starts], axis=1)[:, : len(self.places)]
        self._positions = 1 + c + blocks[:, None, :] * m  # [c, m, place], c and m by their numbers among the sizes
        self._parts = np.broadcast_to(costs.verified * c, self._positions.shape)
        self._curve = costs.curve(int(self._positions.max()) * num_rows)
        self._raw: dict[int, np.ndarray] = {}
        self._seconds: dict[int, np.ndarray] = {}
        self._verifying: dict[int, list[float]] = {}
        self._spent: dict[tuple[int, Plan, int], float] = {}
        self._since_refresh = 0

    def refresh(self) -> None:
        """Correct the costs by what was seen."""
        self._since_refresh = 0
        self._seconds.clear()
        self._verifying.clear()
        self._spent.clear()

    def seconds(self) -> np.ndarray:
        """What every plan costs but for drafting, [c, m, place] by numbers of sizes."""
        B = self.num_rows
        if B not in self._seconds:
            factors = self.record.pace.factors(len(self._curve) - 1)
            masked = np.minimum(np.arange(len(self.sizes)), 1)[None, :, None]
            self._seconds[B] = self._expected() * factors[masked, self._positions * B]
        return self._seconds[B]

    def verifying(self) -> list[float]:
        """What steps without masks cost, [c]; more drafts never take less."""
        B = self.num_rows
        if B not in self._verifying:
            self._verifying[B] = np.maximum.accumulate(self.prices()[:, 0, 0]).tolist()
        return self._verifying[B]

    def prices(self, more: np.ndarray | None = None) -> np.ndarray:
        """What every plan costs, drafting included; of plans that are graphs what they take, as far as that is known.

        Args:
            more: the chances that a second, third, .. token is drafted, [k - 1]; None: always.

        Returns:
            Seconds, [c, m, place] by numbers of sizes.
        """
        links = np.ones(self.sizes[-1] + 1)
        links[0] = 0.0
        if more is not None:
            links[2:] = more
        begun = self.chain(1) - self.link()
        drafting = links.cumsum() * self.link() + np.where(links.cumsum() > 0, begun, 0.0)
        prices = self.seconds() + drafting[list(self.sizes)][None, :, None]
        for (batch, plan), (taken, _) in self.record.taken.items():
            known = plan.num_drafts in self.sizes and plan.masks in self.sizes and plan.where in self.places
            if batch == self.batch and known:
                prices[self.place(plan)] = taken
        return prices

    def spent(self, plan: Plan, links: int) -> float:
        """What a step costs that drafts so many tokens one after another."""
        taken = self.record.taken.get((self.batch, plan))
        if taken:
            return taken[0]
        key = (self.num_rows, plan, links)
        if key not in self._spent:
            self._spent[key] = float(self.seconds()[self.place(plan)]) + self.chain(links)
        return self._spent[key]

    def place(self, plan: Plan) -> tuple[int, int, int]:
        """Where a plan's figures stand."""
        return self.sizes.index(plan.num_drafts), self.sizes.index(plan.masks), self.places.index(plan.where)

    def chain(self, links: float) -> float:
        """What it costs to draft so many tokens."""
        return links * self.link() + (self.costs.begun * self.num_rows**0.5 if links else 0.0)

    def link(self) -> float:
        """What one more token of a draft costs."""
        return self.costs.drafted * self.num_rows**0.5

    def known(self) -> float:
        """How many plain steps of the batch were seen."""
        return float(self.record.pace.counts[0, self.num_rows.bit_length() - 1])

    def observe(self, plan: Plan, links: int, seconds: float, graph: bool = False) -> None:
        """Take note of what a step took.

        Args:
            plan: what was fed.
            links: draft tokens drawn one after another.
            seconds: what it took.
            graph: whether the step ran as a graph, whose time does not depend on what rows hold.
        """
        B = self.num_rows
        if (B, plan) not in self.record.shapes:  # a shape's first step says nothing of the others
            self.record.shapes.add((B, plan))
            return
        place = self.place(plan)
        if graph:
            mean, count = self.record.taken.get((self.batch, plan), (0.0, 0))
            count = min(count + 1, Pace.STEPS)
            seen = min(seconds, 2 * mean) if count > 1 else seconds  # a step that something held up says little
            self.record.taken[self.batch, plan] = mean + (seen - mean) / count, count
        if B not in self._raw:
            self._raw[B] = self._expected()
        expected = float(self._raw[B][place]) + self.chain(links)
        self.record.pace.observe(int(self._positions[place]) * B, plan.masks > 0, expected, seconds)
        self._since_refresh += 1
        if self._since_refresh >= REFRESH:
            self.refresh()

    def _expected(self) -> np.ndarray:
        return self._curve[self._positions * self.num_rows] + self._parts * self.num_rows**0.5
