# SPDX-License-Identifier: Apache-2.0
"""Budgeted drafting: which drafts to verify and which masks to feed, so that a second gains the most tokens.

Beyond the paper, and lossless, for verification does not care which drafts there are. Before each step all plans of a
small set are valued. A plan verifies the first c drafts and places blocks of m masks after some of the tokens: after the
last draft (as linear decoding does), after the last verified token and the last draft, or after all of them (as quadratic).

* What it gains now: 1 + the chances that the first 1, 2, .., c drafts are all kept. A draft's chance is the drafting
  head's probability for it, corrected by how often drafts with such a probability were kept so far. Where the text itself
  offers a better draft (``text_lookup``), that is verified instead.
* What it gains later: the chance that there is a block after the last token kept, times what its draft will be worth
  (``draft_values``), as drafts of this text did lately, and beyond what the text offers for nothing.
* What it costs: the measured time of its positions, verifications and draft tokens (``plan_costs``), in tokens at the
  rate that the best plans reach.

Where drafting does not pay, the best plan is a plain step; then now and then a small block looks whether it would.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mtp_lightning.decoding.planning.draft_plan import PLAIN, Plan, draft_sizes, few_sizes
from mtp_lightning.decoding.planning.draft_stats import DraftStats, RowStats
from mtp_lightning.decoding.planning.draft_values import SETTLE, DraftValues, availability
from mtp_lightning.decoding.planning.plan_costs import PlanCosts
from mtp_lightning.decoding.planning.step_costs import StepCosts
from mtp_lightning.decoding.planning.text_lookup import ONE_TEXT, LookupRecord, TextLookup

FORESIGHT = 0.12
"""Weight of the newest block in a row's mean chances, and of the newest step in how far the text's own drafts go."""
LOOK_SHARE = 0.01
"""Share of the time of steps without masks that is spent on looking whether drafting pays."""
PLAIN_EVERY, PLAIN_FIRST, PLAIN_MORE = 256, 2, 16
"""Steps between plain steps taken to know what those take, and how many are taken at first. Until many are known the next
one comes after so many steps for each that is, for two slow ones would make drafting look good for long."""
PLAN_EVERY, SWEEPS, CLOSE = 3, 6, 1e-3
"""Steps for which prices and values are used, sweeps that renew them, and the change in tokens that ends these early."""


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
        rows: what is known of each row that goes on; ``rows[r].found`` is the draft that its text offers, where that one is
            verified in place of the block's, as far as the plan has drafts.
        costs: what plans cost.
        stops_early: whether a draft ends once its chance is below ``least``.
        least: the chance below which another draft token costs more than it can bring.
    """

    def __init__(
        self,
        costs: StepCosts,
        record: DraftStats,
        num_masks: int,
        num_rows: int,
        anywhere: bool,
        coupled: bool,
        timed: bool = True,
        few: bool = False,
    ) -> None:
        self.record, self.num_masks, self.coupled, self.timed = record, num_masks, coupled, timed
        self.rows = [RowStats(record.usual.copy()) for _ in range(num_rows)]
        self.places = ("last", "ends", "all") if anywhere else ("last",)
        self.sizes = few_sizes(num_masks) if few else draft_sizes(num_masks)
        self.costs = PlanCosts(costs, record, self.sizes, self.places, num_rows)
        self._price: tuple[np.ndarray, float, int, int] | None = None
        self.stops_early, self.least = False, 0.0
        self._steps = 0
        self._owed = 0.0
        self._looks = 1
        self._resting = False
        self._sure = False

    def read(self, texts: Sequence[Sequence[int]]) -> None:
        """Look for drafts in the texts from now on.

        Args:
            texts: the tokens of each row so far.
        """
        for row, tokens in zip(self.rows, texts, strict=True):
            row.text, row.lookups = TextLookup(tokens), LookupRecord(self.record.lookups.mean, ONE_TEXT)

    def _fitting(self, most: int) -> int:
        """The largest size that is not above ``most``."""
        return max(size for size in self.sizes if size <= most)

    def observe(self, plan: Plan, links: int, seconds: float, graph: bool = False) -> None:
        """Take note of what a step took; see ``PlanCosts``. The plans depend on it, the text does not."""
        self.record.since_plain[len(self.rows).bit_length()] = 0 if plan == PLAIN else self._since_plain() + 1
        self.costs.observe(plan, links, seconds, graph)

    def _since_plain(self) -> int:
        """Steps since the last plain one of about so many rows, of all texts."""
        return self.record.since_plain.get(len(self.rows).bit_length(), 0)

    def _values(self) -> DraftValues:
        """What drafts are worth to a batch of so many rows; the next text begins with what the last one found."""
        key = (len(self.rows), self.sizes, self.places)
        if key not in self.record.values:
            self.record.values[key] = DraftValues(self.sizes)
        return self.record.values[key]

    def _prices(self) -> tuple[np.ndarray, float]:
        """What every plan takes, [c, m, place], and the tokens a second that the best plans reach. Renewed now and then."""
        B, values = len(self.rows), self._values()
        if self._price is None or self._price[2] != B or self._price[3] + PLAN_EVERY <= self._steps:
            more = None
            if self.stops_early and self.num_masks > 1:  # about as often as it is reached, a token is drafted
                more = np.stack([row.mean for row in self.rows]).cumprod(1).max(0)[: self.sizes[-1] - 1]
            seconds = self.costs.prices(more)
            usual = self.rows[0].mean if B == 1 else np.mean([row.mean for row in self.rows], axis=0)
            values.sweep(usual, seconds, SETTLE if self._price is None or not values.rate else SWEEPS, CLOSE)
            self._price = seconds, values.rate * B, B, self._steps
        return self._price[0], self._price[1]

    def first(self, room: int) -> Plan:
        """The prompt's step. Beside a whole prompt a small block costs little, and it tells what to expect of the text.

        Args:
            room: largest block that is of use.

        Returns:
            The plan.
        """
        plan = self._best(room, [0] * len(self.rows), False)
        self._resting = False
        masks = self._fitting(min(room, max(plan.masks, 2)))
        if plan == PLAIN:  # that is a look, so the next one may come when this one has been paid
            self._owed = -self._price_of_look(masks)
        return Plan(0, masks, "last")

    def choose(self, room: int, limits: Sequence[int], spare: Sequence[int] = ()) -> Plan:
        """The best plan for the next step.

        Args:
            room: largest block that is of use.
            limits: drafts that each row has from its block, as far as they may be verified.
            spare: how many drafts each row might have verified; empty: no more than those.

        Returns:
            The plan.
        """
        for row, most in zip(self.rows, spare, strict=False):
            row.offered = row.text.draft(min(most, self.num_masks)) if row.text is not None and most > 0 else None
            row.found = row.offered
        return self._look(room, *self._without_masks()) if self._resting else self._best(room, limits, self.timed)

    def _best(self, room: int, limits: Sequence[int], timed: bool) -> Plan:
        """The best plan; ``timed``: or a plain step, where it has to be known what that takes."""
        B, k = len(self.rows), self.num_masks
        known = self.costs.known()
        if timed and (known < PLAIN_FIRST or self._since_plain() >= min(PLAIN_EVERY, PLAIN_MORE * (known + 1))):
            self.costs.refresh()
            self._forget_found()
            return PLAIN
        price, rate = self._prices()
        chances, lasting = np.zeros((B, k)), np.ones((B, k))
        most = 0
        for r, (row, limit) in enumerate(zip(self.rows, limits, strict=True)):
            own = np.zeros(0)
            if limit > 0:
                own = self.record.chance(np.array(row.probabilities[:limit])) if self.coupled else row.mean[:limit]
            if row.found is not None and row.lookups is not None:
                read = np.array(row.lookups.chances(row.found))
                gain = read.cumprod().sum()
                # What the next block will be worth, for the text will go on offering drafts as good as now.
                row.lacking += FORESIGHT * (max(0.0, 1.0 - gain / row.mean.cumprod().sum()) - row.lacking)
                if gain > own.cumprod().sum():
                    own = read
                else:
                    row.found = None
            elif row.text is not None:
                row.lacking += FORESIGHT * (1.0 - row.lacking)
            chances[r, : len(own)] = own
            lasting[r, : len(own)] = own
            most = max(most, len(own))
        sizes, one = list(self.sizes), np.ones((B, 1))
        reached = np.concatenate([one, chances.cumprod(1)], axis=1)  # that the first a are all kept
        whole = np.concatenate([one, lasting.cumprod(1)], axis=1)  # those of them that there are
        now = reached.cumsum(1).sum(0)[sizes]  # tokens of verifying c drafts, [c]
        # Rows that will have a block after their last token, as far as they need one.
        needed = np.array([[row.lacking] for row in self.rows])
        missed = float((needed[:, 0] * (1.0 - reached[:, 1])).sum())
        there = availability(
            (needed * reached)[:, sizes].sum(0), (needed * whole)[:, sizes].sum(0), missed, len(self.places)
        )
        value = now[:, None, None] + there[:, None, :] * self._values().worth[None, :, None] - rate * price
        # A token that is reached more seldom than this brings less than the time to draft it would elsewhere. The chain goes
        # on for all rows together.
        self.least = rate / B * self.costs.link() if self.stops_early else 0.0
        # A few more drafts than there are, if the next size wants it; those count for nothing.
        c = next((number for number, size in enumerate(self.sizes) if size >= most), len(self.sizes) - 1)
        best = value[: c + 1, : self.sizes.index(self._fitting(min(room, k))) + 1]
        place = np.unravel_index(int(best.argmax()), best.shape)
        plan = Plan(self.sizes[int(place[0])], self.sizes[int(place[1])], self.places[int(place[2])])
        if plan.masks or max(limits, default=0):
            return plan
        # With no drafts at hand a plain step teaches nothing, so what is best after it is the same again.
        alone = B * self._values().worth - rate * price[0, :, 0]
        self._resting = not alone[: best.shape[1]].argmax()
        if self._resting and not self._sure:  # for long, so not by values that are on their way
            self._price, self._resting, self._sure = None, False, True
            return self._best(room, limits, timed)
        return self._look(room, plan, float(best.max() - best[0, 0, 0]) / rate)

    def _forget_found(self) -> None:
        for row in self.rows:
            row.found = None

    def _look(self, room: int, plan: Plan, seconds: float) -> Plan:
        """This plan without masks, or once there is time for it a small block, to look whether drafting pays by now.

        Args:
            room: largest block that is of use.
            plan: the plan.
            seconds: what it saves beside a plain step.

        Returns:
            The plan to carry out.
        """
        masks = self._fitting(min(2, room))
        self._owed += LOOK_SHARE * self.costs.spent(PLAIN, 0)
        if masks < 1 or self._owed < (self._price_of_look(masks) + seconds) * self._looks:
            return plan
        self._owed, self._looks, self._resting = 0.0, min(self._looks + 1, 4), False  # in vain so far: less often
        self._steps += PLAN_EVERY  # what it shows is to count at once
        self._forget_found()
        return Plan(0, masks, "last")

    def _price_of_look(self, masks: int) -> float:
        return self.costs.spent(Plan(0, masks, "last"), masks) - self.costs.spent(PLAIN, 0)

    def _without_masks(self) -> tuple[Plan, float]:
        """The best plan that has none: how many of the drafts that the texts offer to verify; and the seconds it saves."""
        lists = [row.lookups.chances(row.found) for row in self.rows if row.found is not None and row.lookups is not None]
        if not lists:
            return PLAIN, 0.0
        seconds = self.costs.verifying()
        rate = max(self._values().rate, 1.0 / seconds[0]) * len(self.rows)
        best, saved, total, j = 0, 0.0, 0.0, 0
        reached = [1.0] * len(lists)
        for number, size in enumerate(self.sizes[1:], 1):
            while j < size:
                reached = [chance * (row[j] if j < len(row) else 0.0) for chance, row in zip(reached, lists, strict=True)]
                total += sum(reached)
                j += 1
            if total / rate - (seconds[number] - seconds[0]) > saved:
                best, saved = number, total / rate - (seconds[number] - seconds[0])
        if not best:
            self._forget_found()
        return Plan(self.sizes[best], 0, "last"), saved

    def learn(
        self,
        plan: Plan,
        links: int,
        kept: Sequence[int],
        drafted: Sequence[int],
        depths: Sequence[int],
        new: Sequence[Sequence[float]],
        texts: Sequence[Sequence[int]] = (),
    ) -> None:
        """Take note of a step.

        Args:
            plan: what was fed.
            links: draft tokens drawn one after another.
            kept: drafts kept in each row.
            drafted: drafts verified in each row.
            depths: drafts that each row has now.
            new: the head's probabilities of them.
            texts: the tokens that each row gained; not needed where no drafts are looked for in texts.
        """
        for row, tokens in zip(self.rows, texts, strict=False):
            if row.text is not None and row.lookups is not None:
                if row.offered is not None:  # whether or not it was verified
                    self.record.lookups.learn(row.offered, tokens)
                    row.lookups.learn(row.offered, tokens)
                row.text.extend(tokens)
        if self._resting:
            return
        self._steps += 1
        self._sure = False
        for row, a, c, depth, probabilities in zip(self.rows, kept, drafted, depths, new, strict=True):
            if self.coupled and row.found is None:
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
        if any(a > 0 and row.found is None for a, row in zip(kept, self.rows, strict=True)):
            self._looks = 1
        if not any(depths):  # no block, nothing new of them
            return
        usual = np.mean([row.mean for row in self.rows], axis=0)
        self.record.usual += 0.05 * (usual - self.record.usual)

    def _weight(self, row: RowStats) -> float:
        row.blocks += 1
        return max(FORESIGHT, 1 / row.blocks)

    def select(self, rows: Sequence[int]) -> None:
        """Go on with these rows alone."""
        self.rows = [self.rows[r] for r in rows]
        self.costs.num_rows = len(self.rows)
