# SPDX-License-Identifier: Apache-2.0
"""Planned drafting: which drafts to verify and which masks to feed, so that decoding gains the most tokens per second.

Beyond the paper, and lossless: verification does not depend on which drafts there are. Before each step all plans of a small
set are valued. A plan verifies c drafts and places blocks of m masks after some of the tokens: after each row's last draft
(as linear decoding does), after its last token and draft c, or after all of them (as quadratic decoding does).

* Tokens gained now: 1 + the probabilities that the first 1, 2, .., c drafts are all accepted. A draft's acceptance
  probability is the drafting head's probability for it, corrected by how often drafts with such a probability were accepted
  (``draft_stats``). Where the text itself offers a better draft (``text_lookup``), that is verified instead.
* Tokens gained later: the probability that there is a block after the last accepted token, times the value of its draft
  (``draft_values``), as far as lookup drafts do not provide the same for free.
* Cost: the seconds of the plan's positions, verification and drafting (``plan_costs``), times the tokens per second that the
  best plans reach.

Where drafting does not pay, the best plan is a plain step; then occasional probes, steps with a small block, find out if
it has begun to pay.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mtp_lightning.decoding.planning.draft_plan import PLAIN, Plan, draft_sizes, few_sizes
from mtp_lightning.decoding.planning.draft_stats import DraftStats, RowOutcome, RowStats
from mtp_lightning.decoding.planning.draft_values import WARMUP_SWEEPS, DraftValues, expected_tokens
from mtp_lightning.decoding.planning.plan_costs import PlanCosts
from mtp_lightning.decoding.planning.step_costs import StepCosts
from mtp_lightning.decoding.planning.text_lookup import TEXT_MEMORY, LookupDraft, LookupStats

AVERAGE_WEIGHT = 0.12
"""Least weight of the newest block or step in the moving averages of a row."""
PRIOR_WEIGHT = 0.05
"""Weight of the newest step in the average over all texts."""
PROBE_SHARE = 0.01
"""Share of the time of steps without masks that is spent on probes."""
MAX_BACKOFF = 4
"""Each failed probe makes the next one rarer, up to this factor."""
PLAN_EVERY = 3
"""Steps for which costs and values are reused."""
SWEEPS, TOLERANCE = 6, 1e-3
"""Sweeps that update the values, and the change in tokens below which they stop early."""


class _Estimates(NamedTuple):
    """Seconds of every plan, [c, m, where], and the best rate, with the rows and the step that they were computed for."""

    seconds: np.ndarray
    rate: float
    num_rows: int
    step: int


class Budget:
    """Plans the steps of one batch.

    Args:
        costs: calibrated costs of the parts of a step.
        stats: acceptance and timing statistics, updated in place.
        num_masks: the largest block, k.
        num_rows: rows B.
        blocks_anywhere: True if blocks may be placed elsewhere than after the last draft.
        coupled: True if plans may depend on the drafts. The rejection rule forbids it: whether a token is verified must not
            depend on the token. Then only what earlier steps accepted counts.
        timed: True if ``costs.observe`` will be told what steps take.
        few_shapes: True if each new shape must be compiled, so that there should be very few.

    Attributes:
        rows: statistics of each active row; its ``chosen_lookup`` is to be verified in place of its block's draft, up to the
            plan's number of drafts.
        costs: what plans cost.
    """

    def __init__(
        self,
        costs: StepCosts,
        stats: DraftStats,
        num_masks: int,
        num_rows: int,
        blocks_anywhere: bool,
        coupled: bool,
        timed: bool = True,
        few_shapes: bool = False,
    ) -> None:
        self.stats, self.num_masks, self.coupled, self.timed = stats, num_masks, coupled, timed
        self.rows = [RowStats(stats.prior_accept_prob.copy()) for _ in range(num_rows)]
        self.placements = ("last", "ends", "all") if blocks_anywhere else ("last",)
        self.sizes = few_sizes(num_masks) if few_shapes else draft_sizes(num_masks)
        self.costs = PlanCosts(costs, stats, self.sizes, self.placements, num_rows)
        self._steps = 0
        self._estimates: _Estimates | None = None
        self._probe_credit, self._probe_backoff = 0.0, 1  # seconds saved up for the next probe
        self._drafting_paused = False  # plain steps until the next probe
        self._estimates_confirmed = False  # computed again since the last step that was recorded

    def use_lookup(self) -> None:
        """Expect drafts that are looked up in the texts from now on."""
        for row in self.rows:
            row.lookup = LookupStats(self.stats.lookup.mean, TEXT_MEMORY)

    def select(self, rows: Sequence[int]) -> None:
        """Continue with these rows only."""
        self.rows = [self.rows[r] for r in rows]
        self.costs.select(len(self.rows))

    def first(self, max_masks: int) -> Plan:
        """The prompt's step: next to a prompt a small block costs little, and shows what to expect of the text."""
        plan = self._best(max_masks, [0] * len(self.rows), False)
        self._drafting_paused = False
        masks = self._largest_size(min(max_masks, max(plan.masks, 2)))
        if plan == PLAIN:  # then the block is a probe, to be paid off before the next one
            self._probe_credit = -self._probe_seconds(masks)
        return Plan(0, masks, "last")

    def choose(self, max_masks: int, num_waiting: Sequence[int], lookup_drafts: Sequence[LookupDraft | None] = ()) -> Plan:
        """The best plan for the next step.

        ``max_masks`` is the largest useful block, ``num_waiting`` the drafts of each row's block that may be verified, and
        ``lookup_drafts`` the draft that each row's text offers; empty: no lookup.
        """
        for row, draft in zip(self.rows, lookup_drafts, strict=False):
            row.lookup_draft = row.chosen_lookup = draft
        if self._drafting_paused:
            return self._or_probe(max_masks, *self._best_without_masks())
        return self._best(max_masks, num_waiting, self.timed)

    def learn(self, outcomes: Sequence[RowOutcome]) -> None:
        """Record the outcome of a step for each active row."""
        for row, outcome in zip(self.rows, outcomes, strict=True):
            if row.lookup is not None and row.lookup_draft is not None:  # verified or not
                self.stats.lookup.learn(row.lookup_draft, outcome.tokens)
                row.lookup.learn(row.lookup_draft, outcome.tokens)
        if self._drafting_paused:
            return
        self._steps += 1
        self._estimates_confirmed = False
        for row, outcome in zip(self.rows, outcomes, strict=True):
            self._learn_row(row, outcome)
        if any(outcome.num_accepted and row.chosen_lookup is None for row, outcome in zip(self.rows, outcomes, strict=True)):
            self._probe_backoff = 1
        if any(outcome.num_drafts for outcome in outcomes):  # else no new block, nothing new about blocks
            self.stats.prior_accept_prob += PRIOR_WEIGHT * (self._mean_accept_prob() - self.stats.prior_accept_prob)

    def _learn_row(self, row: RowStats, outcome: RowOutcome) -> None:
        """Update a row's acceptance probabilities: by its new drafts, or (not coupled) by what was accepted."""
        accepted, verified, count = outcome.num_accepted, outcome.num_verified, outcome.num_drafts
        if self.coupled and row.chosen_lookup is None:
            self.stats.learn(row.head_probs, accepted, verified)
        if not self.coupled and verified:
            seen = min(accepted + 1, verified)
            row.accept_prob[:seen] += self._block_weight(row) * ((np.arange(seen) < accepted) - row.accept_prob[:seen])
        # A custom head may give no probabilities: then the row's average stands in for them.
        has_probs = len(outcome.head_probs) >= count
        row.head_probs = list(outcome.head_probs[:count]) if has_probs else row.accept_prob[:count].tolist()
        if self.coupled and count:
            probs = self.stats.accept_prob(np.array(row.head_probs))
            weight = self._block_weight(row)
            row.accept_prob[:count] += weight * (probs - row.accept_prob[:count])
            row.accept_prob[count:] += weight * (probs[-1] - row.accept_prob[count:])

    @staticmethod
    def _block_weight(row: RowStats) -> float:
        row.num_blocks += 1
        return max(AVERAGE_WEIGHT, 1 / row.num_blocks)

    def _mean_accept_prob(self) -> np.ndarray:
        return self.rows[0].accept_prob if len(self.rows) == 1 else np.mean([row.accept_prob for row in self.rows], axis=0)

    def _largest_size(self, limit: int) -> int:
        """The largest size up to ``limit``."""
        return max(size for size in self.sizes if size <= limit)

    def _values(self) -> DraftValues:
        """Values of drafts for a batch of this size, shared by all texts."""
        return self.stats.values.setdefault((len(self.rows), self.sizes, self.placements), DraftValues(self.sizes))

    def _drop_lookup_drafts(self) -> None:
        for row in self.rows:
            row.chosen_lookup = None

    def _best(self, max_masks: int, num_waiting: Sequence[int], timed: bool) -> Plan:
        """The best plan; or, if ``timed``, a plain step when its time has to be measured."""
        if timed and self.costs.plain_step_due():
            self.costs.refresh()
            self._drop_lookup_drafts()
            return PLAIN
        seconds, rate, *_ = self._estimate()
        accept_probs = [self._row_accept_prob(row, limit) for row, limit in zip(self.rows, num_waiting, strict=True)]
        block_need = np.array([row.block_need for row in self.rows])
        tokens = expected_tokens(accept_probs, block_need, self.num_masks, self._values(), len(self.placements))
        gain = tokens - rate * seconds  # [c, m, where]

        # Only sizes of use; c may be slightly more than the drafts there are, where those do not fill a size.
        most = max(map(len, accept_probs))
        num_c = 1 + next((i for i, size in enumerate(self.sizes) if size >= most), len(self.sizes) - 1)
        num_m = 1 + self.sizes.index(self._largest_size(min(max_masks, self.num_masks)))
        gain = gain[:num_c, :num_m]
        c, m, where = np.unravel_index(int(gain.argmax()), gain.shape)
        plan = Plan(self.sizes[int(c)], self.sizes[int(m)], self.placements[int(where)])
        if plan.masks or max(num_waiting, default=0):
            return plan

        # No drafts and no masks: nothing is learned, so if a plain step is best in this state it remains so.
        plain_gain = len(self.rows) * self._values().draft_value - rate * seconds[0, :, 0]  # after a plain step, [m]
        self._drafting_paused = not plain_gain[:num_m].argmax()
        if self._drafting_paused and not self._estimates_confirmed:  # a pause is long: decide it on fresh estimates
            self._estimates, self._drafting_paused, self._estimates_confirmed = None, False, True
            return self._best(max_masks, num_waiting, timed)
        return self._or_probe(max_masks, plan, float(gain.max() - gain[0, 0, 0]) / rate)

    def _estimate(self) -> _Estimates:
        """Costs of plans and the rate of the best ones, in tokens per second; updated every few steps."""
        B, values, known = len(self.rows), self._values(), self._estimates
        if known is None or known.num_rows != B or known.step + PLAN_EVERY <= self._steps:
            seconds = self.costs.all_plans()
            sweeps = WARMUP_SWEEPS if known is None or not values.rate else SWEEPS
            values.sweep(self._mean_accept_prob(), seconds, sweeps, TOLERANCE)
            self._estimates = known = _Estimates(seconds, values.rate * B, B, self._steps)
        return known

    def _row_accept_prob(self, row: RowStats, limit: int) -> np.ndarray:
        """Acceptance probabilities of the better of a row's two drafts, [at most k]; sets ``row.chosen_lookup``."""
        probs = np.zeros(0)
        if limit > 0:
            probs = self.stats.accept_prob(np.array(row.head_probs[:limit])) if self.coupled else row.accept_prob[:limit]
        if row.lookup is None:
            return probs
        lookup_tokens = 0.0
        if row.chosen_lookup is not None:
            lookup_probs = np.array(row.lookup.accept_probs(row.chosen_lookup))
            lookup_tokens = float(lookup_probs.cumprod().sum())
            if lookup_tokens > probs.cumprod().sum():
                probs = lookup_probs
            else:
                row.chosen_lookup = None
        # The text will probably offer drafts as good as this one after the next block too.
        need = max(0.0, 1.0 - lookup_tokens / row.accept_prob.cumprod().sum())
        row.block_need += AVERAGE_WEIGHT * (need - row.block_need)
        return probs

    def _best_without_masks(self) -> tuple[Plan, float]:
        """The best number of lookup drafts to verify without masks, and the seconds this saves over a plain step."""
        if all(row.chosen_lookup is None for row in self.rows):
            return PLAIN, 0.0
        probs = np.zeros((len(self.rows), self.num_masks))
        for r, row in enumerate(self.rows):
            if row.lookup is not None and row.chosen_lookup is not None:
                probs[r, : len(row.chosen_lookup.tokens)] = row.lookup.accept_probs(row.chosen_lookup)
        tokens = np.concatenate([[0.0], probs.cumprod(1).sum(0).cumsum()])[list(self.sizes)]  # accepted, [c]
        seconds = self.costs.without_masks()
        rate = max(self._values().rate, 1.0 / seconds[0]) * len(self.rows)
        saved = tokens / rate - (seconds - seconds[0])
        c = int(saved.argmax())
        if not c:
            self._drop_lookup_drafts()
        return Plan(self.sizes[c], 0, "last"), float(saved[c])

    def _or_probe(self, max_masks: int, plan: Plan, saved: float) -> Plan:
        """This plan, which saves ``saved`` seconds over a plain step; or, when there is credit for it, a probe."""
        masks = self._largest_size(min(2, max_masks))
        self._probe_credit += PROBE_SHARE * self.costs.plan(PLAIN, 0)
        if masks < 1 or self._probe_credit < (self._probe_seconds(masks) + saved) * self._probe_backoff:
            return plan
        self._probe_credit, self._probe_backoff = 0.0, min(self._probe_backoff + 1, MAX_BACKOFF)
        self._drafting_paused = False
        self._steps += PLAN_EVERY  # estimates are updated at once
        self._drop_lookup_drafts()
        return Plan(0, masks, "last")

    def _probe_seconds(self, masks: int) -> float:
        return self.costs.plan(Plan(0, masks, "last"), masks) - self.costs.plan(PLAIN, 0)
