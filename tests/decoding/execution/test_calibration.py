# SPDX-License-Identifier: Apache-2.0
"""Costs of steps are measured once, within a time limit, and a slow model still gets a curve."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import CONTEXT, tiny_model, token_row

from mtp_lightning.decoding import planner
from mtp_lightning.decoding.execution import calibration
from mtp_lightning.decoding.execution.decode_cache import decode_cache
from mtp_lightning.decoding.loop import decode
from mtp_lightning.decoding.options import DecodingOptions
from mtp_lightning.sampler_heads import GRUSamplerHead


def test_a_slow_model_gets_a_curve_of_a_few_points(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=0.0, perf_counter=lambda: clock.now)
    monkeypatch.setattr(calibration, "time", clock)

    def taking(seconds: float) -> Any:
        def call() -> None:
            clock.now += seconds

        return call

    def before(n: int) -> None:
        clock.now += 0.3 if n > 1 else 0.0

    calls = {n: taking(0.2 + 0.01 * n) for n in (1, 2, 3, 5, 9, 17)}
    found = calibration._time(calls, before, 4, 0.6, torch.device("cpu"))
    assert found == pytest.approx({n: 0.2 + 0.01 * n for n in (1, 2, 3, 5)})
    clock.now = 0.0
    calls = {1: taking(0.01), 2: taking(0.02)}
    assert calibration._time(calls, lambda _: None, 1, 10.0, torch.device("cpu")) == pytest.approx({1: 0.01, 2: 0.02})
    assert clock.now == pytest.approx((calibration.ROUNDS + 1) * 0.03)


def test_costs_are_measured_once_for_a_device_and_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = tiny_model("gemma3", 3, sampler_head=GRUSamplerHead()), []
    measure = planner.measure_step_costs
    monkeypatch.setattr(planner, "measure_step_costs", lambda *args: calls.append(args) or measure(*args))

    def run(**options: Any) -> None:
        list(decode(model, token_row([4]).input_ids, DecodingOptions(max_new_tokens=4, **options)))

    run(num_masks=2)  # fixed masks need no costs
    assert not calls
    run()
    run()
    assert len(calls) == 1
    costs, stats = decode_cache(model).calibrations[False, 64]
    assert costs.positions[0] == 1 and max(costs.positions) <= CONTEXT // 2 and all(second > 0 for second in costs.seconds)
    model.float()
    run()
    assert len(calls) == 2 and [*decode_cache(model).calibrations] == [(False, 64)]
    assert decode_cache(model).calibrations[False, 64][1] is not stats
