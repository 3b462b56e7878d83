# SPDX-License-Identifier: Apache-2.0
"""What steps and plans cost: the calibrated curve, its correction by measured steps, and times of graphs."""

from __future__ import annotations

import numpy as np
import pytest
from step_cost_examples import GENTLE, make_budget

from mtp_lightning.decoding.planning.budget import Budget
from mtp_lightning.decoding.planning.draft_plan import PLAIN, Plan
from mtp_lightning.decoding.planning.draft_stats import DraftStats
from mtp_lightning.decoding.planning.step_costs import CurveCorrection, StepCosts


def test_the_curve_rises_and_is_extrapolated() -> None:
    curve = StepCosts((1, 3, 9), (2.0, 1.5, 3.0), 0, 0).curve(15)
    assert (np.diff(curve[1:]) >= 0).all() and curve[1] == 1.5 and curve[9] == 3.0
    np.testing.assert_allclose(np.diff(curve[9:]), 0.25)


def test_measured_steps_correct_the_curve() -> None:
    correction = CurveCorrection()
    assert (correction.factors(90) == 1).all()
    for _ in range(100):
        correction.observe(1, True, 1.0, 2.0)
        correction.observe(40, True, 1.0, 0.5)
    without_masks, with_masks = correction.factors(90)
    assert (without_masks == 1).all()
    np.testing.assert_allclose([with_masks[1], with_masks[60]], [2.0, 0.5], rtol=0.01)
    assert 0.5 < with_masks[8] < 2.0
    correction.observe(1, False, 1.0, 2.0)
    correction.observe(1, True, 1.0, 1e9)  # a machine that slept
    assert correction.factors(1)[1, 1] < 3 and correction.factors(90)[0] == pytest.approx(2.0)


def test_a_block_has_a_fixed_cost() -> None:
    plan, expensive = Plan(0, 2, "last"), make_budget(GENTLE._replace(draft_start=2.0))
    assert expensive.costs.plan(plan, 2) == pytest.approx(make_budget(GENTLE).costs.plan(plan, 2) + 2.0)


def test_measured_times_of_graphs_replace_the_curve() -> None:
    budget = Budget(GENTLE, DraftStats(8), 8, 1, True, True, timed=False, few_shapes=True)
    assert budget.sizes == (0, 2, 4)
    budget.costs.batch = 1, 256
    for plan, seconds in ((PLAIN, 1.0), (Plan(2, 0, "last"), 5.0)):
        for _ in range(3):
            budget.costs.observe(plan, 0, seconds, True)
    budget.costs.refresh()
    without_masks = budget.costs.without_masks()
    assert without_masks[:2] == pytest.approx([1.0, 5.0]) and without_masks[2] >= 5.0  # more drafts never take less
    assert budget.costs.plan(Plan(2, 0, "last"), 0) == pytest.approx(5.0)
