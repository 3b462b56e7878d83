# SPDX-License-Identifier: Apache-2.0
"""What steps and plans cost: the measured curve, its correction, and times of graphs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from plan_costs import GENTLE
from tiny import CONTEXT, VOCAB, tiny_model, token_row

from mtp_lightning.decoding import loop as decoding
from mtp_lightning.decoding.execution import calibration
from mtp_lightning.decoding.execution.decode_cache import decode_cache
from mtp_lightning.decoding.loop import decode
from mtp_lightning.decoding.options import DecodingOptions
from mtp_lightning.decoding.planning.budget import Budget
from mtp_lightning.decoding.planning.draft_plan import PLAIN, Plan
from mtp_lightning.decoding.planning.draft_stats import DraftStats
from mtp_lightning.decoding.planning.step_costs import Pace, StepCosts
from mtp_lightning.sampler_heads import GRUSamplerHead


def test_the_curve_rises_and_goes_on() -> None:
    curve = StepCosts((1, 3, 9), (2.0, 1.5, 3.0), 0, 0).curve(15)
    assert (np.diff(curve[1:]) >= 0).all() and curve[1] == 1.5 and curve[9] == 3.0
    np.testing.assert_allclose(np.diff(curve[9:]), 0.25)


def test_pace_corrects_the_curve() -> None:
    pace = Pace()
    assert (pace.factors(90) == 1).all()
    for _ in range(100):
        pace.observe(1, True, 1.0, 2.0)
        pace.observe(40, True, 1.0, 0.5)
    without, factors = pace.factors(90)
    assert (without == 1).all()  # steps without masks are apart
    np.testing.assert_allclose([factors[1], factors[60]], [2.0, 0.5], rtol=0.01)
    assert 0.5 < factors[8] < 2.0
    pace.observe(1, False, 1.0, 2.0)
    pace.observe(1, True, 1.0, 1e9)  # a machine that slept
    assert pace.factors(1)[1, 1] < 3 and pace.factors(90)[0] == pytest.approx(2.0)


def test_a_slow_models_calls_all_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step takes longer than there is time for: a curve of a few points is made all the same."""
    clock = SimpleNamespace(now=0.0, perf_counter=lambda: clock.now)
    monkeypatch.setattr(calibration, "time", clock)

    def taking(seconds: float) -> Any:
        def call() -> None:
            clock.now += seconds

        return call

    calls = {n: taking(0.2 + 0.01 * n) for n in (1, 2, 3, 5, 9, 17)}
    found = calibration._time(calls, taking(0.3), 4, 0.6, lambda: None)
    assert found == pytest.approx({n: 0.2 + 0.01 * n for n in (1, 2, 3, 5)})
    clock.now = 0.0
    calls = {1: taking(0.01), 2: taking(0.02)}
    assert calibration._time(calls, taking(0.0), 1, 10.0, lambda: None) == pytest.approx({1: 0.01, 2: 0.02})
    assert clock.now == pytest.approx((calibration.ROUNDS + 1) * 0.03)


def test_costs_are_measured_once_and_quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = tiny_model("gemma3", 3, sampler_head=GRUSamplerHead()), []
    original = decoding.measure_step_costs
    monkeypatch.setattr(decoding, "measure_step_costs", lambda *args: calls.append(args) or original(*args))
    for _ in range(3):
        list(decode(model, token_row([4]).input_ids, DecodingOptions(max_new_tokens=4)))
    assert len(calls) == 1
    costs = decode_cache(model).calibrations[False, VOCAB][0]
    assert costs.positions[0] == 1 and all(second > 0 for second in costs.seconds)
    assert max(costs.positions) <= CONTEXT // 2
    list(decode(model, token_row([4]).input_ids, DecodingOptions(num_masks=2, max_new_tokens=4)))
    assert len(calls) == 1  # fixed masks need none


def test_times_of_graphs_count_where_there_are_no_masks() -> None:
    few = Budget(GENTLE, DraftStats(8), 8, 1, True, True, timed=False, few=True)
    assert few.sizes == (0, 2, 4)
    few.costs.batch = 1, 256
    for plan, seconds in ((PLAIN, 1.0), (Plan(2, 0, "last"), 5.0)):
        for _ in range(3):
            few.observe(plan, 0, seconds, True)
    few.costs.refresh()
    assert few.costs.verifying()[:2] == pytest.approx([1.0, 5.0])
    assert few.costs.verifying()[2] >= 5.0  # more drafts never take less
    assert few.costs.spent(Plan(2, 0, "last"), 0) == pytest.approx(5.0)
