# SPDX-License-Identifier: Apache-2.0
"""Planners: how many drafts the next step verifies, and where it places blocks of masks."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Protocol

import torch

from mtp_lightning.decoding.compiled_executor import can_compile
from mtp_lightning.decoding.execution.calibration import measure_step_costs
from mtp_lightning.decoding.execution.decode_cache import decode_cache
from mtp_lightning.decoding.execution.decoding_mode import DecodingMode
from mtp_lightning.decoding.executor import token_choice
from mtp_lightning.decoding.limits import resolve_num_masks, uses_auto
from mtp_lightning.decoding.options import Decoding, DecodingOptions
from mtp_lightning.decoding.planning.budget import Budget
from mtp_lightning.decoding.planning.draft_plan import Plan, plan_positions
from mtp_lightning.decoding.planning.draft_stats import DraftStats, RowOutcome
from mtp_lightning.decoding.planning.step_costs import StepCosts
from mtp_lightning.decoding.state import DecodeState, Row, StepResult
from mtp_lightning.decoding.token_choice import TokenChoice
from mtp_lightning.modeling.network import MTPNetwork


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
        self.where, self.num_masks = "all" if decoding == "quadratic" else "last", num_masks

    def plan(self, state: DecodeState) -> Plan:
        """See ``Planner``."""
        num_drafts = max(row.num_waiting for row in state.rows)
        if state.fixed_shapes and num_drafts:
            num_drafts = max(num_drafts, self.num_masks)
        return Plan(num_drafts, state.max_useful_masks(self.num_masks), self.where)

    def update(self, state: DecodeState, result: StepResult) -> None:
        """Nothing to learn."""


class AutoPlanner:
    """Plans what gains the most tokens per second, from acceptance statistics and step times."""

    def __init__(self, budget: Budget, state: DecodeState, text_drafts: bool) -> None:
        self._budget, self._rows = budget, state.rows
        budget.costs.batch = len(state.rows), state.cache.capacity
        state.choice.return_draft_probs = budget.coupled
        if text_drafts:
            budget.use_lookup()

    def plan(self, state: DecodeState) -> Plan:
        """See ``Planner``."""
        rows, budget = self._selected(state), self._budget
        max_masks = state.max_useful_masks(budget.num_masks)
        if state.num_steps:
            self._plan = budget.choose(max_masks, [row.num_drafts for row in rows], [row.text_draft for row in rows])
            for row, known in zip(rows, budget.rows, strict=True):
                row.text_draft = known.chosen_lookup
        else:
            self._plan = budget.first(max_masks)
        self._begin = time.perf_counter()
        return self._plan

    def _selected(self, state: DecodeState) -> list[Row]:
        """The rows that are left, to which the budget is narrowed down."""
        rows = state.active
        if len(rows) < len(self._rows):
            self._budget.select([self._rows.index(row) for row in rows])
            self._rows = rows
        return rows

    def update(self, state: DecodeState, result: StepResult) -> None:
        """See ``Planner``."""
        num_drawn = result.output.drafts.tokens.shape[1]
        if state.num_steps > 1 and result.from_graph is not None:
            seconds = time.perf_counter() - self._begin
            self._budget.costs.observe(self._plan, num_drawn, seconds, result.from_graph)
        rows = state.active
        self._budget.learn(
            [RowOutcome(row.num_accepted, row.num_verified, row.num_drafts, row.draft_probs, row.gained) for row in rows]
        )


def make_planner(model: MTPNetwork, options: DecodingOptions, state: DecodeState, text_drafts: bool) -> Planner:
    """The planner that the options ask for; ``text_drafts`` says whether a proposer offers drafts from the text."""
    if not uses_auto(model, options):
        return FixedPlanner(options.decoding, resolve_num_masks(model, options))
    on_cpu, graphs = model.base.device.type == "cpu", state.fixed_shapes
    costs, stats = calibration(model, options, state.choice, graphs)
    budget = Budget(
        costs,
        stats,
        model.num_masks,
        len(state.rows),
        blocks_anywhere=options.decoding == "quadratic",
        coupled=options.coupled,
        few_shapes=graphs and on_cpu,  # there each shape takes seconds to compile
    )
    return AutoPlanner(budget, state, text_drafts)


def calibration(
    model: MTPNetwork, options: DecodingOptions, choice: TokenChoice, graphs: bool
) -> tuple[StepCosts, DraftStats]:
    """What steps cost, measured once per model, and the acceptance statistics of its drafts."""
    kind = graphs, choice.num_candidates
    known = decode_cache(model).calibrations
    if kind not in known:
        plain = replace(options, logits_processor=None, repetition_penalty=1.0)
        one_row = TokenChoice(plain, [0], model.base.device, choice.num_candidates)
        with DecodingMode(model).active():
            costs = measure_step_costs(model, one_row, plan_positions(model.num_masks))
        known[kind] = costs, DraftStats(model.num_masks)
    return known[kind]


@torch.inference_mode()
def calibrate(model: MTPNetwork, options: DecodingOptions) -> None:
    """Measure what steps cost if ``auto`` needs it, so that a clock that starts now does not count it."""
    resolve_num_masks(model, options)
    if uses_auto(model, options):
        decode_cache(model).prepare(model)
        calibration(model, options, token_choice(model, options, [0]), can_compile(model, options))
