# SPDX-License-Identifier: Apache-2.0
"""Budgeted drafting: which drafts to verify and which masks to feed, so that a second gains the most tokens.

Beyond the paper, and lossless, for verification does not care which drafts there are. Before each step all plans of a
small set are valued. A plan verifies the first c drafts and places blocks of m masks after some of the tokens: after the
last draft (as linear decoding does), after the last verified token and the last draft, or after all of them (as quadratic).

* What it gains now: 1 + the chances that the first 1, 2, .., c drafts are all kept. A draft's chance is the drafting
  head's probability for it, corrected by how often drafts with such a probability were kept so far.
* What it gains later: the chance that there is a block after the last token kept, times what its draft will be worth
  (``draft_values``), as drafts of this text did lately.
* What it costs: the measured time of its positions, verifications and draft tokens (``step_costs``), in tokens at the rate
  that the best plans reach.

Where drafting does not pay, the best plan is a plain step; then now and then a small block looks whether it would.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mtp_lightning.draft_record import DraftRecord, RowRecord
from mtp_lightning.draft_values import SETTLE, DraftValues, availability
from mtp_lightning.step_costs import Pace, StepCosts

SIZES = (0, 1, 2, 4, 8)
"""Drafts verified and masks in a block, beside 12, 16, 24, .. and k: few shapes, for kernels are made ready for each."""
FEW = (0, 2, 4)
"""The same, where each shape is compiled."""
FORESIGHT = 0.12
"""Weight of the newest block in a row's mean chances."""
LOOK_SHARE = 0.01
"""Share of the time of plain steps that is spent on looking whether drafting pays."""
REFRESH, PLAIN_EVERY, PLAIN_FIRST = 16, 256, 2
"""Steps between corrections of the costs by what steps really take; and plain steps taken to know what those take."""
PLAN_EVERY, SWEEPS = 3, 6
"""Steps for which prices and values are used, and sweeps that renew them."""


@dataclass(frozen=True)
class Plan:
    """What to feed.

    Attributes:
        num_drafts: drafts to verify, c.
        masks: masks in a block.
        where: the tokens that get a block: ``last``: each row's last draft that is verified, or its last verified token;
            ``ends``: draft c and the last verified token; ``all``.
    """

    num_drafts: int
    masks: int
    where: str

    def blocks(self, drafted: int | None = None) -> tuple[tuple[int, int], ...]:
        """Starts and sizes, as a layout has them, of a row that has so many drafts to verify; None: c."""
        if not self.masks:
            return ()
        c = self.num_drafts
        starts = {"last": [c if drafted is None else drafted], "ends": sorted({0, c}), "all": list(range(c + 1))}[self.where]
        return tuple((start, self.masks) for start in starts)


PLAIN = Plan(0, 0, "last")


@functools.cache
def draft_sizes(num_masks: int) -> tuple[int, ...]:
    """The numbers of drafts and masks that plans have, ascending, for k masks: ``draft_sizes(6) -> (0, 1, 2, 4, 6)``."""
    sizes, step = [size for size in SIZES if size < num_masks], 4
    while sizes[-1] >= SIZES[-1] and sizes[-1] + step < num_masks:
        sizes.append(sizes[-1] + step)
        if sizes[-1] == 4 * step:
            step *= 2
    return (*sizes, num_masks)


def usual_positions(num_masks: int) -> set[int]:
    """Positions of a row in the steps that plans may have, for k masks."""
    sizes = draft_sizes(num_masks)
    return {1 + c + blocks * m for c in sizes for m in sizes for blocks in (1, 2, 1 + c)}


class Budget:
    """Plans the steps of one batch.

    Args:
        costs: what steps cost.
        record: how drafts of this model do; it learns.
        num_masks: the largest block.
        num_rows: rows B.
        anywhere: whether blocks may stand elsewhere than after the last draft.
        coupled: whether plans may depend on the drafts. The rejection rule forbids it: whether a token is verified must
            not depend on the token. Then only what earlier steps kept counts.
        timed: whether ``observe`` will be told what steps take.
        few: whether each shape is dear to make ready, so that there should be very few.

    Attributes:
        batch: rows that steps feed, those that have finished included, and slots of the cache.
        stops_early: whether a draft ends once its chance is below ``least``.
        least: the chance below which another draft token costs more than it can bring.
    """

    def __init__(
        self,
        costs: StepCosts,
        record: DraftRecord,
        num_masks: int,
        num_rows: int,
        anywhere: bool,
        coupled: bool,
        timed: bool = True,
        few: bool = False,
    ) -> None:
        self.costs, self.record, self.num_masks, self.coupled, self.timed = costs, record, num_masks, coupled, timed
        self.rows = [RowRecord(record.usual.copy()) for _ in range(num_rows)]
        self.places = ("last", "ends", "all") if anywhere else ("last",)
        self.sizes = draft_sizes(num_masks)
        if few:
            self.sizes = tuple(size for size in self.sizes if size in FEW or size == min(num_masks, FEW[-1]))
        c, m = np.array(self.sizes)[:, None, None], np.array(self.sizes)[None, :, None]
        starts = np.array(self.sizes)[:, None]
        blocks = np.concatenate([np.ones_like(starts), 1 + (starts > 0), 1 + starts], axis=1)[:, : len(self.places)]
        self._positions = 1 + c + blocks[:, None, :] * m  # [c, m, place], c and m by their numbers among the sizes
        self._parts = np.broadcast_to(costs.verified * c, self._positions.shape)
        self.values = DraftValues(self.sizes)
        self._price: tuple[np.ndarray, float, int, int] | None = None
        self.batch = num_rows, 0
        self.stops_early, self.least = False, 0.0
        self._curve = costs.curve(int(self._positions.max()) * num_rows)
        self._seconds: dict[int, np.ndarray] = {}
        self._raw: dict[int, np.ndarray] = {}
        self._steps = 0
        self._since_refresh = 0
        self._since_plain = 0
        self._owed = 0.0
        self._looks = 1
        self._resting = False
        self._sure = False

    def seconds(self, num_rows: int) -> np.ndarray:
        """What every plan costs but for drafting, [c, m, place] by numbers of sizes."""
        if num_rows not in self._seconds:
            factors = self.record.pace.factors(len(self._curve) - 1)
            self._seconds[num_rows] = self._expected(num_rows) * factors[self._positions * num_rows]
        return self._seconds[num_rows]

    def _expected(self, num_rows: int) -> np.ndarray:
        return self._curve[self._positions * num_rows] + self._parts * num_rows**0.5

    def spent(self, plan: Plan, links: int) -> float:
        """What a step costs that drafts so many tokens one after another."""
        taken = self.record.taken.get((self.batch, plan))
        return taken[0] if taken else float(self.seconds(len(self.rows))[self._place(plan)]) + self._chain(links)

    def _fitting(self, most: int) -> int:
        """The largest size that is not above ``most``."""
        return max(size for size in self.sizes if size <= most)

    def _has(self, plan: Plan) -> bool:
        return plan.num_drafts in self.sizes and plan.masks in self.sizes and plan.where in self.places

    def _place(self, plan: Plan) -> tuple[int, int, int]:
        return self.sizes.index(plan.num_drafts), self.sizes.index(plan.masks), self.places.index(plan.where)

    def _chain(self, links: float) -> float:
        """What it costs to draft so many tokens."""
        return links * self._link() + (self.costs.begun * len(self.rows) ** 0.5 if links else 0.0)

    def _link(self) -> float:
        """What one more token of a draft costs."""
        return self.costs.drafted * len(self.rows) ** 0.5

    def observe(self, plan: Plan, links: int, seconds: float, graph: bool = False) -> None:
        """Take note of what a step took; the plans depend on it, the text does not.

        Args:
            plan: what was fed.
            links: draft tokens drawn one after another.
            seconds: what it took.
            graph: whether the step ran as a graph, whose time does not depend on what rows hold.
        """
        B = len(self.rows)
        if self._resting and plan == PLAIN and self.record.pace.counts[B.bit_length() - 1] >= Pace.STEPS:
            return
        if (B, plan) not in self.record.shapes:  # a shape's first step says nothing of the others
            self.record.shapes.add((B, plan))
            return
        place = self._place(plan)
        if graph:
            mean, count = self.record.taken.get((self.batch, plan), (0.0, 0))
            count = min(count + 1, Pace.STEPS)
            seen = min(seconds, 2 * mean) if count > 1 else seconds  # a step that something held up says little
            self.record.taken[self.batch, plan] = mean + (seen - mean) / count, count
        if B not in self._raw:
            self._raw[B] = self._expected(B)
        expected = float(self._raw[B][place]) + self._chain(links)
        self.record.pace.observe(int(self._positions[place]) * B, expected, seconds)
        self._since_refresh += 1
        if self._since_refresh >= REFRESH:
            self._since_refresh = 0
            self._seconds.clear()

    def _more(self) -> np.ndarray:
        """The chances that the first 1, 2, .. of a draft are all kept, [B, k]."""
        return np.stack([row.mean for row in self.rows]).cumprod(1)

    def _drafting(self) -> np.ndarray:
        """What drafting costs for each size of block, [m]."""
        links = np.ones(self.num_masks + 1)
        links[0] = 0.0
        if self.stops_early and self.num_masks > 1:
            links[2:] = self._more().max(0)[:-1]  # about as often as it is reached, a token is drafted
        begun = self._chain(1) - self._link()
        return (links.cumsum() * self._link() + np.where(links.cumsum() > 0, begun, 0.0))[list(self.sizes)]

    def _prices(self) -> tuple[np.ndarray, float]:
        """What every plan takes, [c, m, place], and the tokens a second that the best plans reach. Renewed now and then."""
        B = len(self.rows)
        if self._price is None or self._price[2] != B or self._price[3] + PLAN_EVERY <= self._steps:
            seconds = self.seconds(B) + self._drafting()[None, :, None]
            for (batch, plan), (taken, _) in self.record.taken.items():
                if batch == self.batch and self._has(plan):
                    seconds[self._place(plan)] = taken
            usual = self.rows[0].mean if B == 1 else np.mean([row.mean for row in self.rows], axis=0)
            self.values.sweep(usual, seconds, SETTLE if self._price is None else SWEEPS)
            self._price = seconds, self.values.rate * B, B, self._steps
        return self._price[0], self._price[1]

    def first(self, room: int) -> Plan:
        """The prompt's step. Beside a whole prompt a small block costs little, and it tells what to expect of the text.

        Args:
            room: largest block that is of use.

        Returns:
            The plan.
        """
        plan = self.choose(room, [0] * len(self.rows))
        self._resting = False
        return Plan(0, self._fitting(min(room, max(plan.masks, 2))), "last")

    def choose(self, room: int, limits: Sequence[int]) -> Plan:
        """The best plan for the next step.

        Args:
            room: largest block that is of use.
            limits: drafts that each row has, as far as they may be verified.

        Returns:
            The plan.
        """
        B, k = len(self.rows), self.num_masks
        if self._resting:
            return self._rest(B, room)
        self._since_plain += 1
        known = self.record.pace.counts[B.bit_length() - 1]
        if self.timed and (known < PLAIN_FIRST or self._since_plain >= PLAIN_EVERY):
            self._since_plain = 0
            self._seconds.clear()
            return PLAIN
        price, rate = self._prices()
        chances, lasting = np.zeros((B, k)), np.ones((B, k))
        for r, (row, limit) in enumerate(zip(self.rows, limits, strict=True)):
            if limit > 0:
                chances[r, :limit] = (
                    self.record.chance(np.array(row.probabilities[:limit])) if self.coupled else row.mean[:limit]
                )
                lasting[r, :limit] = chances[r, :limit]
        sizes, one = list(self.sizes), np.ones((B, 1))
        reached = np.concatenate([one, chances.cumprod(1)], axis=1)  # that the first a are all kept
        whole = np.concatenate([one, lasting.cumprod(1)], axis=1)  # those of them that there are
        now = reached.cumsum(1).sum(0)[sizes]  # tokens of verifying c drafts, [c]
        # Rows that will have a block after their last token.
        there = availability(reached[:, sizes].sum(0), whole[:, sizes].sum(0), len(self.places))
        value = now[:, None, None] + there[:, None, :] * self.values.worth[None, :, None] - rate * price
        # A token that is reached more seldom than this brings less than the time to draft it would elsewhere. The chain goes
        # on for all rows together.
        self.least = rate / B * self._link() if self.stops_early else 0.0
        # A few more drafts than there are, if the next size wants it; those count for nothing.
        most = max(limits, default=0)
        c = next((number for number, size in enumerate(self.sizes) if size >= most), len(self.sizes) - 1)
        best = value[: c + 1, : self.sizes.index(self._fitting(min(room, k))) + 1]
        place = np.unravel_index(int(best.argmax()), best.shape)
        plan = Plan(self.sizes[int(place[0])], self.sizes[int(place[1])], self.places[int(place[2])])
        # With no drafts at hand a plain step teaches nothing, so what is best after it is the same again.
        self._resting = plan == PLAIN and not max(limits, default=0)
        if self._resting and not self._sure:  # for long, so not by values that are on their way
            self._price, self._resting, self._sure = None, False, True
            return self.choose(room, limits)
        return self._rest(B, room) if self._resting else plan

    def _rest(self, num_rows: int, room: int) -> Plan:
        """A plain step, or once there is time for it a small block, to look whether drafting pays by now."""
        look = self._fitting(min(2, room))
        plain = self.spent(PLAIN, 0)
        self._owed += LOOK_SHARE * plain
        price = self.spent(Plan(0, look, "last"), look) - plain
        if look < 1 or self._owed < price * self._looks:
            return PLAIN
        self._owed, self._looks, self._resting = 0.0, min(self._looks + 1, 4), False  # in vain so far: less often
        self._steps += PLAN_EVERY  # what it shows is to count at once
        return Plan(0, look, "last")

    def learn(
        self,
        plan: Plan,
        links: int,
        kept: Sequence[int],
        drafted: Sequence[int],
        depths: Sequence[int],
        new: Sequence[Sequence[float]],
    ) -> None:
        """Take note of a step.

        Args:
            plan: what was fed.
            links: draft tokens drawn one after another.
            kept: drafts kept in each row.
            drafted: drafts verified in each row.
            depths: drafts that each row has now.
            new: the head's probabilities of them.
        """
        if self._resting:
            return
        self._steps += 1
        self._sure = False
        for row, a, c, depth, probabilities in zip(self.rows, kept, drafted, depths, new, strict=True):
            if self.coupled:
                self.record.learn(row.probabilities, a, c)
            if not self.coupled and c:
                seen = min(a + 1, c)
                row.mean[:seen] += self._weight(row) * ((np.arange(seen) < a) - row.mean[:seen])
            # A head of one's own may draft without saying how sure it is: then what this text's drafts do in general counts.
            row.probabilities = list(probabilities[:depth]) if len(probabilities) >= depth else row.mean[:depth].tolist()
            if self.coupled and depth:
                chances = self.record.chance(np.array(row.probabilities))
                weight = self._weight(row)
                row.mean[:depth] += weight * (chances - row.mean[:depth])
                row.mean[depth:] += weight * (chances[-1] - row.mean[depth:])
        if plan.num_drafts and sum(kept) > 0:
            self._looks = 1
        usual = np.mean([row.mean for row in self.rows], axis=0)
        self.record.usual += 0.05 * (usual - self.record.usual)

    def _weight(self, row: RowRecord) -> float:
        row.blocks += 1
        return max(FORESIGHT, 1 / row.blocks)

    def select(self, rows: Sequence[int]) -> None:
        """Go on with these rows alone."""
        self.rows = [self.rows[r] for r in rows]
