# SPDX-License-Identifier: Apache-2.0
"""Plans are those that pay, by the costs and by what the text has shown; the clock and unverified drafts don't matter."""

from __future__ import annotations

import random
import time

import pytest
import torch
from bigram import bigram_base, bigram_text, planted_drafts
from simulated_text import simulate
from step_cost_examples import FREE, GENTLE, MIDDLING, STEEP, auto_planner
from tiny import tiny_model, token_row

from mtp_lightning.decoding import calibration, planner
from mtp_lightning.decoding.calibration import StepSeconds, measured_plans, plan_sizes
from mtp_lightning.decoding.execution import step as decoding_step
from mtp_lightning.decoding.execution.decode_cache import decode_cache
from mtp_lightning.decoding.executor import EagerExecutor
from mtp_lightning.decoding.loop import decode
from mtp_lightning.decoding.options import DecodingOptions
from mtp_lightning.decoding.planner import AutoPlanner
from mtp_lightning.decoding.planning.draft_plan import PLAIN, Plan, draft_sizes
from mtp_lightning.decoding.planning.text_lookup import TextLookup
from mtp_lightning.model import MTPModel
from mtp_lightning.modeling.gated_lora import LoRA
from mtp_lightning.sampler_heads import GRUSamplerHead


def test_where_positions_are_free_everything_is_drafted() -> None:
    for where in ("all", "last"):
        plans, _ = simulate(auto_planner(FREE, where), lambda _: 8, 60)
        assert set(plans[30:]) == {Plan(8, 8, where)}
    plans, _ = simulate(auto_planner(FREE), lambda _: 8, 60, [range(1000 * n, 1000 * n + 600) for n in range(4)])
    assert set(plans[30:]) == {Plan(8, 8, "all")}


def test_where_drafts_are_never_right_steps_are_plain() -> None:
    plans, _ = simulate(auto_planner(STEEP), lambda _: 0, 2000)
    assert plans[100:200].count(PLAIN) >= 95
    assert any(plan != PLAIN for plan in plans[1000:])  # probes, which cost little:
    assert sum(STEEP(plan, 1) for plan in plans) < 1.02 * len(plans)


def test_drafts_that_are_often_right_are_verified_and_others_are_not() -> None:
    for rows in (1, 4):
        texts = [range(10_000 * n, 10_000 * n + 9000) for n in range(rows)]
        plans, tokens = simulate(auto_planner(GENTLE), lambda n: 8 if n % 10 else 0, 100, texts)
        assert tokens / sum(GENTLE(plan, rows) for plan in plans) > 1.5 * rows / GENTLE(PLAIN, rows)
    generator = random.Random(0)
    plans, _ = simulate(auto_planner(GENTLE), lambda _: 2 if generator.random() < 0.9 else 0, 300)
    assert {max(plan.num_drafts, plan.masks) for plan in plans[100:]} <= {0, 2, 3}


def test_drafting_begins_when_it_begins_to_pay() -> None:
    plans, _ = simulate(auto_planner(MIDDLING), lambda n: 8 if n > 12 else 0, 900)
    assert plans[30:60].count(PLAIN) > 25 and all(plan != PLAIN for plan in plans[-20:])


def test_plans_do_not_depend_on_drafts_that_are_not_verified_yet() -> None:
    """As the rejection rule demands: only earlier drafts and the text's tokens count."""

    def run(last: int) -> list[Plan]:
        return simulate(auto_planner(GENTLE), lambda n: last if n >= 40 else 3, 42)[0]

    assert run(0) == run(8) and run(0)[-1].num_drafts


def test_where_steps_are_compiled_only_the_few_measured_shapes_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    assert draft_sizes(7) == (0, 1, 2, 3, 4, 6, 7) and draft_sizes(8, few=True) == (0, 2, 4)
    assert draft_sizes(1, few=True) == (0, 1)
    model, options, generator = tiny_model("llama", 5), DecodingOptions(), random.Random(0)
    monkeypatch.setattr(calibration, "can_compile", lambda *args: True)
    measured = measured_plans(model, options)
    assert len(measured) == 7
    monkeypatch.setattr(calibration, "measure", lambda *args: {plan: GENTLE(plan, 1) for plan in measured})
    monkeypatch.setenv(calibration.FOLDER_VARIABLE, "/dev/null/none")
    seconds = calibration.step_seconds(model, options, 1)
    plans, _ = simulate(AutoPlanner(seconds, 8, plan_sizes(model, options), "all"), lambda _: generator.randrange(9), 300)
    assert len(set(plans)) > 2 and set(plans) <= set(measured)


# --- Drafts of the text --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("costs", [FREE, GENTLE, MIDDLING])
def test_drafts_of_the_text_are_verified_where_it_repeats_itself(costs: StepSeconds) -> None:
    generator = random.Random(0)
    page = [generator.randrange(1000) for _ in range(200)]
    plans, tokens = simulate(auto_planner(costs), lambda _: 0, 250, [page * 20])
    assert tokens > 500
    if costs is not FREE:  # masks bring nothing in addition
        assert sum(plan.masks for plan in plans[200:]) < 10
    fresh = [generator.randrange(1000) for _ in range(2000)]
    _, tokens = simulate(auto_planner(costs), lambda _: 8, 200, [fresh])  # better drafts of blocks are preferred
    assert tokens > 600


def test_a_text_that_repeats_by_chance_costs_nothing() -> None:
    generator = random.Random(1)
    plans, _ = simulate(auto_planner(STEEP), lambda _: 0, 1000, [[generator.randrange(20) for _ in range(1100)]])
    assert plans[200:].count(PLAIN) >= 0.95 * len(plans[200:])


@pytest.mark.parametrize("where", ["all", "last"])
@pytest.mark.parametrize("costs", [GENTLE, MIDDLING])
def test_weak_drafts_of_the_text_do_not_displace_blocks(costs: StepSeconds, where: str) -> None:
    generator = random.Random(2)
    text = [generator.randrange(20) for _ in range(4000)]  # its last token has nearly always occurred before
    rates = []
    for lookup in (True, False):
        planner = auto_planner(costs, where)
        plans, tokens = simulate(planner, lambda n: 5 if n % 3 else 1, 200, [text] if lookup else None)
        rates.append(tokens / sum(costs(plan, 1) for plan in plans))
    assert rates[0] > 0.98 * rates[1]


# --- In the decoding loop ------------------------------------------------------------------------------------------------


def test_costs_decide_how_much_is_drafted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding_step, "draft_block", planted_drafts(60, 12))
    num_steps = []
    for costs in (FREE, STEEP):
        monkeypatch.setattr(planner, "step_seconds", lambda *args, costs=costs: costs)
        model = MTPModel(bigram_base(60, 12), 3, LoRA(rank=2)).eval()
        out = model.generate(torch.tensor([[11]]), max_new_tokens=40, prompt_lookup=False)
        assert out.sequences[0, 1:].tolist() == bigram_text(11, 40, 60, 12)
        num_steps.append(int(out.num_steps[0]))
    assert num_steps[0] <= 15 and 35 <= num_steps[1] <= 40


def test_prompt_lookup_saves_steps_and_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = MTPModel(bigram_base(21, 7), 3, LoRA(rank=2)).eval()
    monkeypatch.setattr(planner, "step_seconds", lambda *args: FREE)
    calls: list[int] = []
    lookup = TextLookup.draft
    monkeypatch.setattr(TextLookup, "draft", lambda self, most: calls.append(most) or lookup(self, most))

    def run(**options: object) -> tuple[list[int], int]:
        calls.clear()
        steps = list(decode(model, torch.tensor([3]), DecodingOptions(max_new_tokens=50, **options)))  # type: ignore[arg-type]
        return [token for step in steps for token in step.tokens], len(steps)

    text = bigram_text(3, 50, 21, 7)
    assert run(decoding="autoregressive") == (text, 50) and not calls
    found, steps = run()
    assert found == text and 17 <= steps < 30 and max(calls) <= 3  # the first cycle is new; a step verifies three drafts
    found, steps = run(prompt_lookup=False)
    assert found == text and steps > 30 and not calls
    run(num_masks=2)
    assert not calls
    run(temperature=1.0, seed=1, verification="rejection")
    assert not calls


def test_a_text_repeats_itself_whatever_the_clock_says(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama", 5, sampler_head=GRUSamplerHead()).to(torch.bfloat16)
    prompts = torch.stack([token_row([9], seed=n).input_ids for n in range(3)])
    model.generate(prompts, max_new_tokens=2)  # makes the calibration
    clock, plans = random.Random(0), list[Plan]()
    run = EagerExecutor.run
    monkeypatch.setattr(EagerExecutor, "run", lambda self, plan, state: plans.append(plan) or run(self, plan, state))
    monkeypatch.setattr(calibration, "measure", lambda *args: pytest.fail("measured again"))
    for name in ("perf_counter", "monotonic", "time"):
        monkeypatch.setattr(time, name, lambda: 1e6 * clock.random())
    found = []
    for _ in range(2):
        plans.clear()
        decode_cache(model).calibrations.clear()
        found.append((model.generate(prompts, max_new_tokens=40, eos_token_id=[]).sequences.tolist(), list(plans)))
    assert found[0] == found[1] and len(set(plans)) > 2
