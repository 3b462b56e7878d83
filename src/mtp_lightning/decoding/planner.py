# SPDX-License-Identifier: Apache-2.0
"""Planners: how many drafts the next step verifies, and where it places blocks of masks.

A plan depends on tokens and on calibrated costs only, never on the clock, so a text can be repeated. It never depends on a
draft that is not verified yet: the rejection rule forbids it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import torch

from mtp_lightning.decoding.calibration import StepSeconds, plan_sizes, step_seconds
from mtp_lightning.decoding.execution.decode_cache import decode_cache
from mtp_lightning.decoding.limits import resolve_num_masks, uses_auto
from mtp_lightning.decoding.options import Decoding, DecodingOptions
from mtp_lightning.decoding.planning.draft_plan import PLAIN, Plan, block_placement
from mtp_lightning.decoding.planning.drafting import PLAIN_DECODING, RowStats, path_probs, strategy_rates
from mtp_lightning.decoding.state import DecodeState, Row, StepResult
from mtp_lightning.modeling.network import MTPNetwork

REPLAN_EVERY, SWITCH_GAIN = 4, 1.02
"""Steps for which a strategy is kept, and by how much another one must be better: shapes should not change often."""
PROBE_SHARE, PROBE_MASKS = 0.01, 2
"""Share of the time of plain steps that is spent on probes, and their masks."""


class Planner(Protocol):
    """Decides what each step feeds."""

    def plan(self, state: DecodeState) -> Plan:
        """The plan of the next step; the first one feeds the prompts. May drop the ``text_draft`` of rows."""
        ...

    def update(self, state: DecodeState, result: StepResult) -> None:
        """Learn from a step that has been committed."""
        ...


class FixedPlanner:
    """Verifies all drafts and places blocks of a fixed number of masks (autoregressive: 0): the paper's decoding."""

    def __init__(self, decoding: Decoding, num_masks: int) -> None:
        self.where, self.num_masks = block_placement(decoding), num_masks

    def plan(self, state: DecodeState) -> Plan:
        """See ``Planner``."""
        num_drafts = max(row.num_waiting for row in state.rows)
        if state.fixed_shapes and num_drafts:
            num_drafts = max(num_drafts, self.num_masks)
        return Plan(num_drafts, state.max_useful_masks(self.num_masks), self.where)

    def update(self, state: DecodeState, result: StepResult) -> None:
        """Nothing to learn."""


class AutoPlanner:
    """Plans what gains the most tokens per second by the text so far, with drafts of blocks or of the text.

    ``sizes`` are the numbers of drafts and of masks that plans use, ascending from 0; ``where`` is where steps that verify
    place blocks.
    """

    def __init__(self, seconds: StepSeconds, num_masks: int, sizes: Sequence[int], where: str) -> None:
        self._seconds_of, self.num_masks, self.sizes, self.where = seconds, num_masks, sizes, where
        self._stats: dict[int, RowStats] = {}  # by number of the row
        self._known: dict[Plan, float] = {}  # seconds with the rows that are left
        self._num_rows = self._steps = 0
        self._strategy, self._rate = PLAIN_DECODING, 0.0
        self._credit = 0.0  # seconds saved up for the next probe
        self._plan = PLAIN

    def plan(self, state: DecodeState) -> Plan:
        """See ``Planner``."""
        rows, max_masks = state.active, state.max_useful_masks(self.num_masks)
        if len(rows) != self._num_rows:
            self._num_rows, self._steps = len(rows), 0
            self._known.clear()
        if self._steps % REPLAN_EVERY == 0:
            self._choose_strategy([self._stats.setdefault(row.number, RowStats(self.num_masks)) for row in rows])
        self._steps += 1
        self._plan = self._best(rows, self._largest_size(min(self._strategy.masks, max_masks)))
        if self._plan == PLAIN:
            self._plan = self._or_probe(self._largest_size(min(PROBE_MASKS, max_masks)), first=not state.num_steps)
        return self._plan

    def _seconds(self, plan: Plan) -> float:
        if plan not in self._known:
            self._known[plan] = self._seconds_of(plan, self._num_rows)
        return self._known[plan]

    def _largest_size(self, limit: int) -> int:
        return max(size for size in self.sizes if size <= limit)

    def _choose_strategy(self, stats: Sequence[RowStats]) -> None:
        """Choose the strategy for the next steps by what is known of the texts."""
        accept = [sum(probs) / len(stats) for probs in zip(*(each.accept_probs() for each in stats), strict=True)]
        rates = strategy_rates(accept, len(stats), self.sizes, self.where, self._seconds)
        best = max(rates, key=lambda strategy: rates[strategy])
        if rates[best] > SWITCH_GAIN * rates[self._strategy]:
            self._strategy = best
        self._rate = rates[self._strategy]

    def _best(self, rows: Sequence[Row], masks: int) -> Plan:
        """As many drafts as it pays to verify, with the strategy's blocks; without if drafts of all texts are worth more."""
        paths = [self._path(row) for row in rows]
        longest, block = max(map(len, paths)), Plan(0, masks, "last")
        counts = self.sizes[1 : 1 + sum(size < longest for size in self.sizes)]
        # Time is worth the strategy's rate, and drafts what it costs to get them: a step of one token a row and a block.
        block_worth = self._rate * self._seconds(block) / len(rows) - 1

        def gain(plan: Plan) -> float:
            gained = -self._rate * self._seconds(plan)
            for path in (path[: plan.num_drafts] for path in paths):
                # The probability of a block after the accepted ones.
                reached = path[-1] if path and plan.where == "last" else 1.0
                gained += 1 + sum(path) + (block_worth * reached if plan.masks else 0.0)
            return gained

        in_every_step, best = masks > 0 and self._strategy.blocks_in_every_step, block
        if not in_every_step or all(row.text_draft is not None for row in rows):  # such texts will offer the next drafts too
            best = max([block, *(Plan(c, 0, "last") for c in counts)], key=gain)
        if in_every_step and best == block:
            best = max([block, *(Plan(c, masks, self.where) for c in counts)], key=gain)
        if not best.num_drafts:
            for row in rows:
                row.text_draft = None
        return best

    def _path(self, row: Row) -> list[float]:
        """The probability of each draft that it and all before it are accepted; of two drafts the better one stays."""
        stats = self._stats[row.number]
        stats.last_lookup, path = row.text_draft, path_probs(stats.accept_probs()[: row.num_drafts])
        if row.text_draft is not None:
            offered = path_probs(stats.lookup.accept_probs(row.text_draft))
            if sum(offered) > sum(path):
                return offered
            row.text_draft = None
        return path

    def _or_probe(self, masks: int, first: bool) -> Plan:
        """A plain step; or a block of masks that shows what to expect of drafts: at first, and whenever it is paid for."""
        probe = Plan(0, masks, "last")
        seconds = self._seconds(probe) - self._seconds(PLAIN)
        self._credit += PROBE_SHARE * self._seconds(PLAIN)
        if not first and self._credit < seconds:
            return PLAIN
        self._credit -= seconds
        return probe

    def update(self, state: DecodeState, result: StepResult) -> None:
        """See ``Planner``."""
        for row, row_output in zip(state.rows, result.rows, strict=True):
            if row.active:
                self._stats[row.number].learn(row.gained, row_output.drafts[: row.num_drafts])


def make_planner(model: MTPNetwork, options: DecodingOptions, state: DecodeState) -> Planner:
    """The planner that the options ask for."""
    if not uses_auto(model, options):
        return FixedPlanner(options.decoding, resolve_num_masks(model, options))
    seconds = step_seconds(model, options, len(state.rows))
    return AutoPlanner(seconds, model.num_masks, plan_sizes(model, options), block_placement(options.decoding))


@torch.inference_mode()
def calibrate(
    model: MTPNetwork,
    options: DecodingOptions,
    batch_sizes: Iterable[int] = (1,),
    notify: Callable[[str], object] | None = None,
) -> None:
    """Find out what steps of these numbers of rows cost if ``auto`` needs it, so that a clock that starts now leaves it out.

    ``notify`` gets a line of text when something has to be measured.
    """
    resolve_num_masks(model, options)
    if uses_auto(model, options):
        decode_cache(model).prepare(model)
        for num_rows in batch_sizes:
            step_seconds(model, options, num_rows, notify)
