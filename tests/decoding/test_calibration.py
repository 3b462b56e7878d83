# SPDX-License-Identifier: Apache-2.0
"""What steps take is measured once and kept on disk; a file that can't be read or written is no error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny import CONTEXT, tiny_model, token_row

from mtp_lightning.decoding import calibration
from mtp_lightning.decoding.calibration import measure, measured_plans, step_costs, step_seconds
from mtp_lightning.decoding.execution.decode_cache import decode_cache
from mtp_lightning.decoding.executor import EagerExecutor
from mtp_lightning.decoding.loop import decode
from mtp_lightning.decoding.options import DecodingOptions
from mtp_lightning.decoding.planner import calibrate
from mtp_lightning.decoding.planning.draft_plan import PLAIN, Plan
from mtp_lightning.decoding.planning.step_costs import StepCosts
from mtp_lightning.model import MTPModel
from mtp_lightning.sampler_heads import GRUSamplerHead


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[int]:
    """Collects the numbers of rows for which something is measured; the folder is ``cache`` in ``tmp_path``."""
    monkeypatch.setenv(calibration.FOLDER_VARIABLE, str(tmp_path / "cache"))
    calls: list[int] = []
    real = calibration.measure
    monkeypatch.setattr(calibration, "measure", lambda *args: calls.append(args[2]) or real(*args))
    return calls


def calibrated(model: MTPModel, num_rows: int = 1, **options: Any) -> StepCosts:
    """What ``auto`` goes by, as a new process would find it."""
    decode_cache(model).calibrations.clear()
    calibrate(model, DecodingOptions(**options), [num_rows])
    return next(iter(decode_cache(model).calibrations.values()))


def test_costs_are_measured_once(measured: list[int], tmp_path: Path) -> None:
    model, notes = tiny_model("gemma3", 3, sampler_head=GRUSamplerHead()), list[str]()
    list(decode(model, token_row([4]).input_ids, DecodingOptions(max_new_tokens=4, num_masks=2)))
    assert not measured  # fixed masks need no costs
    calibrate(model, DecodingOptions(), [1], notes.append)
    first = calibrated(model)
    assert calibrated(model, prompt_lookup=False, max_new_tokens=7).measured == first.measured
    assert measured == [1] and len(notes) == 1 and len(list((tmp_path / "cache").iterdir())) == 1
    calibrated(model, 3)
    assert measured == [1, 4]
    calibrated(model, temperature=1.0)
    calibrated(model.float())
    assert measured == [1, 4, 1, 1]
    calibrated(tiny_model("gemma3", 3, seed=9, sampler_head=GRUSamplerHead()).double())  # other weights, like shapes
    assert measured == [1, 4, 1, 1]
    calibrated(tiny_model("gemma3", 4, sampler_head=GRUSamplerHead()).double())
    assert measured == [1, 4, 1, 1, 1]


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "\ufffd", '{"key": 1, "seconds": []}', "other", "missing", "negative", "no number"]
)
def test_a_damaged_file_is_written_again(measured: list[int], tmp_path: Path, content: str) -> None:
    model = tiny_model("llama", 2)
    calibrated(model)
    (path,) = (tmp_path / "cache").iterdir()
    stored = json.loads(path.read_bytes())
    damages = {
        "other": {**stored, "key": {**stored["key"], "threads": -1}},
        "missing": {**stored, "seconds": [row for row in stored["seconds"] if not row[1]]},
        "negative": {**stored, "seconds": [[*row[:3], -row[3]] for row in stored["seconds"]]},
        "no number": {**stored, "seconds": [[*row[:3], "fast"] for row in stored["seconds"]]},
    }
    path.write_text(json.dumps(damages[content]) if content in damages else content, encoding="utf-8")
    costs = calibrated(model)
    assert measured == [1, 1]
    assert calibrated(model).measured == costs.measured and measured == [1, 1]


def test_a_folder_that_cannot_be_written_is_no_error(
    measured: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv(calibration.FOLDER_VARIABLE, str(tmp_path / "file" / "cache"))
    model = tiny_model("llama", 2)
    calibrate(model, DecodingOptions())
    calibrate(model, DecodingOptions())
    assert measured == [1]  # kept in memory
    calibrated(model)
    assert measured == [1, 1]


def test_another_process_that_was_faster_is_believed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(calibration.FOLDER_VARIABLE, str(tmp_path))
    model, other = tiny_model("llama", 2), tiny_model("llama", 2)

    def slow(*args: Any) -> dict[Plan, float]:
        monkeypatch.setattr(calibration, "measure", measure)
        calibrated(other)
        return {plan: 1.0 for plan in measure(*args)}

    monkeypatch.setattr(calibration, "measure", slow)
    assert calibrated(model).measured == calibrated(other).measured


def test_the_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/c")
    monkeypatch.setenv(calibration.FOLDER_VARIABLE, "/given")
    assert calibration.folder() == Path("/given")
    monkeypatch.setenv(calibration.FOLDER_VARIABLE, "~/given")
    assert calibration.folder() == Path.home() / "given"
    monkeypatch.delenv(calibration.FOLDER_VARIABLE)
    assert calibration.folder() == Path("/c/mtp-lightning")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/h")
    assert calibration.folder() == Path("/h/.cache/mtp-lightning")


@pytest.mark.parametrize("num_masks", [1, 2, 5])
def test_whole_steps_are_measured(num_masks: int) -> None:
    model = tiny_model("mistral-window", num_masks, sampler_head=GRUSamplerHead())
    decode_cache(model).prepare(model)
    for options in (
        DecodingOptions(),
        DecodingOptions(decoding="linear", temperature=1.0, verification="rejection", seed=1),
    ):
        found = measure(model, options, 2)
        assert {PLAIN, Plan(0, 1, "last"), Plan(0, num_masks, "last")} <= set(found) and min(found.values()) > 0
        StepCosts(found)
    assert CONTEXT < calibration.CONTEXT + (num_masks + 1) ** 2  # the context is no limit


@pytest.mark.parametrize(("num_rounds", "period"), [(1, 23), (9, 37)])
def test_a_machine_whose_speed_changes_is_measured_right(
    num_rounds: int, period: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock of 1 s for a plain step and 2 s with masks, times 3 every other period of steps.

    A change within the only round makes a ratio wrong: then the first runs count, which came before it.
    """
    model = tiny_model("llama", 2)
    decode_cache(model).prepare(model)
    clock, steps, run = [0.0], [0], EagerExecutor.run

    def timed(executor: EagerExecutor, plan: Plan, state: Any) -> Any:
        steps[0] += 1
        slow = steps[0] // period % 2
        clock[0] += (2.0 if plan.masks else 1.0) * (3 if slow else 1)
        return run(executor, plan, state)

    monkeypatch.setattr(EagerExecutor, "run", timed)
    monkeypatch.setattr(calibration.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(calibration, "ROUNDS", num_rounds)
    monkeypatch.setattr(calibration, "SECONDS", 1e9)
    found = measure(model, DecodingOptions(), 1)
    assert found == pytest.approx({plan: 2.0 if plan.masks else 1.0 for plan in found})


def test_steps_that_will_not_be_compiled_are_not_measured_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama", 2)
    decode_cache(model).prepare(model)
    monkeypatch.setattr(calibration, "CompiledExecutor", lambda *args: pytest.fail("compiled"))
    options = DecodingOptions(compile=True, repetition_penalty=1.2)
    assert list(measure(model, options, 1))[:2] == measured_plans(model, options)[:2]


def positions_of(plan: Plan) -> int:
    return 1 + plan.num_drafts + sum(masks for _, masks in plan.blocks())


def test_costs_of_other_plans_follow_from_those_measured() -> None:
    def seconds(plan: Plan) -> float:
        return positions_of(plan) + (4.0 if plan.masks else 0.0) + 0.5 * plan.masks

    plans = [PLAIN, Plan(8, 0, "last"), Plan(0, 1, "last"), Plan(7, 1, "all"), Plan(7, 8, "last"), Plan(8, 8, "all")]
    costs = StepCosts({plan: seconds(plan) for plan in plans})
    for plan in [*plans, Plan(3, 0, "last"), Plan(2, 3, "all"), Plan(0, 6, "last"), Plan(6, 4, "last")]:
        assert costs.seconds(plan) == pytest.approx(seconds(plan))
    noisy = StepCosts({PLAIN: 3.0, Plan(1, 0, "last"): 9.0, Plan(8, 0, "last"): 5.0, Plan(0, 1, "last"): 1.0})
    nearest = (1 / 9 + 1 / 5) / (1 / 81 + 1 / 25)  # to 9 and 5, by relative errors
    # None falls with more positions.
    assert [noisy.seconds(Plan(c, 0, "last")) for c in (0, 1, 2, 7)] == pytest.approx([3.0, nearest, nearest, nearest])
    alike = StepCosts({PLAIN: 1.0, Plan(7, 1, "all"): 9.0, Plan(7, 8, "last"): 5.0})
    assert alike.seconds(Plan(7, 1, "all")) == pytest.approx(nearest)  # 16 positions, both
    assert noisy.seconds(Plan(8, 8, "all")) == pytest.approx(81 / 2)  # far beyond the 2 positions that were measured
    assert StepCosts({PLAIN: 20.0, Plan(0, 1, "last"): 19.0}).seconds(Plan(0, 1, "last")) == 20.0


def test_noise_of_one_measurement_counts_less_than_by_itself() -> None:
    """Steps that take the same up to 8 positions, 0.02 more for each one after these and 0.05 for a further draft."""

    def seconds(plan: Plan) -> float:
        return 1.3 + 0.02 * max(0, positions_of(plan) - 8) + 0.05 * (plan.masks - 1)

    sizes = ((0, 1, "last"), (0, 4, "last"), (3, 1, "all"), (3, 4, "last"), (1, 1, "all"), (2, 2, "all"), (4, 4, "all"))
    plans = [Plan(*size) for size in sizes]
    for noisy in plans[:-1]:  # nothing else says what the largest step takes
        measured = {plan: seconds(plan) * (1.12 if plan == noisy else 1.0) for plan in plans}
        costs = StepCosts({PLAIN: 1.0, **measured})
        errors = {plan: costs.seconds(plan) / seconds(plan) - 1 for plan in plans}
        assert max(map(abs, errors.values())) < 0.08  # of 0.12, where each measurement counts by itself


def test_costs_rise_evenly_with_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama", 2)
    monkeypatch.setattr(calibration, "measure", lambda model, options, rows: {PLAIN: rows, Plan(0, 1, "last"): 2.0 * rows})
    monkeypatch.setenv(calibration.FOLDER_VARIABLE, "/dev/null/none")
    seconds = step_seconds(model, DecodingOptions(), 5)
    assert [seconds(PLAIN, rows) for rows in (1, 3, 5)] == pytest.approx([1, 3, 5])
    assert seconds(Plan(0, 1, "last"), 4) == pytest.approx(8)
    assert step_costs(model, DecodingOptions(), 8).measured[PLAIN] == 8
