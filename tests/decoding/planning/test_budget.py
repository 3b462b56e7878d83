# SPDX-License-Identifier: Apache-2.0
"""The plans chosen are those that pay, by the costs and drafts that the planner is given."""

from __future__ import annotations

import random

import pytest
import torch
from bigram import bigram_base, bigram_text, planted_drafts
from step_cost_examples import FREE, GENTLE, MIDDLING, STEEP, make_budget

from mtp_lightning.decoding import planner
from mtp_lightning.decoding.execution import step as decoding_step
from mtp_lightning.decoding.loop import decode
from mtp_lightning.decoding.options import DecodingOptions
from mtp_lightning.decoding.planning import plan_costs
from mtp_lightning.decoding.planning.budget import Budget
from mtp_lightning.decoding.planning.draft_plan import PLAIN, Plan, draft_sizes, few_sizes
from mtp_lightning.decoding.planning.draft_stats import DraftStats, RowOutcome
from mtp_lightning.decoding.planning.plan_costs import PlanCosts
from mtp_lightning.decoding.planning.step_costs import StepCosts
from mtp_lightning.decoding.planning.text_lookup import MAX_MATCH, TextLookup
from mtp_lightning.model import MTPModel
from mtp_lightning.modeling.gated_lora import LoRA


def run_steps(budget: Budget, probability: float, num_right: int, steps: int = 60) -> list[Plan]:
    """Plans of a text whose head gives its drafts this probability and of which the first ``num_right`` are right."""
    plans, waiting = [], [0] * len(budget.rows)
    for _ in range(steps):
        plan = budget.choose(8, waiting)
        plans.append(plan)
        verified = [min(count, plan.num_drafts) for count in waiting]
        accepted = [min(num_right, count) for count in verified]
        depth = dict(plan.blocks())
        waiting = [depth.get(a, 0) for a in accepted]
        budget.learn([RowOutcome(a, c, n, [probability] * 8) for a, c, n in zip(accepted, verified, waiting, strict=True)])
    return plans


def test_sizes_and_blocks_of_plans() -> None:
    assert draft_sizes(6) == (0, 1, 2, 4, 6) and few_sizes(3) == (0, 2, 3)
    assert draft_sizes(40) == (0, 1, 2, 4, 8, 12, 16, 24, 32, 40)
    assert Plan(3, 2, "last").blocks() == ((3, 2),) and Plan(3, 2, "last").blocks(1) == ((1, 2),)
    assert Plan(3, 2, "ends").blocks() == ((0, 2), (3, 2)) and Plan(0, 2, "ends").blocks() == ((0, 2),)
    assert Plan(2, 1, "all").blocks() == ((0, 1), (1, 1), (2, 1)) and Plan(2, 0, "all").blocks() == ()


def test_where_positions_are_free_everything_is_drafted() -> None:
    for num_rows in (1, 4):
        plans = run_steps(make_budget(FREE, num_rows), 0.9, 8)[20:]
        assert {(plan.num_drafts, plan.masks) for plan in plans} == {(8, 8)}
        assert run_steps(make_budget(FREE, num_rows), 0.6, 2)[-1].where == "all"
    assert {plan.where for plan in run_steps(make_budget(FREE, anywhere=False), 0.6, 2)} == {"last"}


@pytest.mark.parametrize("coupled", [True, False])
def test_where_drafts_are_never_accepted_steps_are_plain(coupled: bool) -> None:
    budget = make_budget(STEEP, coupled=coupled)
    plans = run_steps(budget, 0.3, 0, 3000)
    assert plans[100:200].count(PLAIN) >= 95
    assert any(plan != PLAIN for plan in plans[1000:])  # probes, which cost little:
    assert sum(budget.costs.plan(plan, plan.masks) for plan in plans) < 1.03 * len(plans)


@pytest.mark.parametrize("num_rows", [1, 4])
def test_drafts_that_are_often_right_are_verified(num_rows: int) -> None:
    budget = make_budget(GENTLE, num_rows)
    plans = run_steps(budget, 0.9, 8)[20:]
    assert sum(plan.num_drafts for plan in plans) > 2 * len(plans)


def test_drafting_is_resumed_when_it_pays_again() -> None:
    budget = make_budget(MIDDLING)
    assert run_steps(budget, 0.1, 0, 300)[-1] == PLAIN
    assert run_steps(budget, 0.98, 8, 600)[-1].num_drafts >= 2


def test_the_heads_probabilities_decide_what_is_verified() -> None:
    budget = make_budget(MIDDLING)
    run_steps(budget, 0.95, 8, 100)
    budget.learn([RowOutcome(0, 0, 8, [0.97, 0.97, 0.97, 0.03, 0.9, 0.9, 0.9, 0.9])])
    assert budget.choose(8, [8]).num_drafts in (2, 4)  # the sizes next to 3
    budget.learn([RowOutcome(0, 0, 8, [0.03] * 8)])
    assert budget.choose(8, [8]).num_drafts == 0


def test_plans_of_the_rejection_rule_do_not_see_the_drafts() -> None:
    plans = [run_steps(make_budget(GENTLE, coupled=False), probability, 3) for probability in (0.02, 0.98)]
    assert plans[0] == plans[1] and max(plan.num_drafts for plan in plans[0]) > 1


def test_plans_keep_to_the_masks_and_drafts_that_are_of_use() -> None:
    budget = make_budget(FREE, 2)
    run_steps(budget, 0.9, 8)
    for max_masks in range(9):
        for waiting in ([0, 0], [1, 0], [3, 8]):
            plan = budget.choose(max_masks, waiting)
            assert plan.masks <= max_masks and plan.num_drafts <= next(n for n in budget.sizes if n >= max(waiting))
            assert {plan.masks, plan.num_drafts} <= set(budget.sizes)


@pytest.fixture
def untimed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans in a decoding loop that do not depend on the clock."""
    monkeypatch.setattr(PlanCosts, "observe", lambda *args: None)
    monkeypatch.setattr(plan_costs, "PLAIN_FIRST", 0)


def test_plain_steps_are_measured_again_across_short_texts() -> None:
    """Two slow plain steps at the beginning must not make drafting look good for ever, however short texts are."""
    stats = DraftStats(8)
    plain, steps = 0, 0
    for _text in range(40):
        budget = Budget(FREE, stats, 8, 1, True, True)
        waiting = [0]
        for _ in range(20):
            plan = budget.choose(8, waiting)
            steps += 1
            slow = plan == PLAIN and plain < 4
            plain += plan == PLAIN
            budget.costs.observe(plan, plan.masks, 10.0 if slow else 1.0)
            accepted = min(waiting[0], plan.num_drafts)
            verified, waiting = accepted, [dict(plan.blocks()).get(accepted, 0)]
            budget.learn([RowOutcome(accepted, verified, waiting[0], [0.9] * 8)])
    assert 6 < plain < 0.05 * steps
    assert stats.correction.factors(1)[0, 1] < 3.5  # was 10, of which a log is an average


def run_text(budget: Budget, text: list[int], new: list[int], head_prob: float = 0.0) -> list[Plan]:
    """Plans while ``new`` is appended to ``text``. Drafts of blocks are always right, or never if ``head_prob`` is 0."""
    plans, at, waiting = [], 0, 0
    budget.use_lookup()
    lookup = TextLookup(text)
    while at < len(new):
        most = min(8, len(new) - at - 1)
        plan = budget.choose(8, [waiting], [lookup.draft(most) if most else None])
        plans.append(plan)
        row = budget.rows[0]
        if row.chosen_lookup is not None:
            tokens = row.chosen_lookup.tokens[: plan.num_drafts]
            accepted = next((j for j, token in enumerate(tokens) if new[at + j] != token), len(tokens))
            verified = len(tokens)
        else:
            verified = min(waiting, plan.num_drafts)
            accepted = verified if head_prob else 0
        waiting = dict(plan.blocks(verified)).get(accepted, 0)
        gained = new[at : at + accepted + 1]
        at += len(gained)
        lookup.extend(gained)
        budget.learn([RowOutcome(accepted, verified, waiting, [head_prob or 0.05] * 8, gained)])
    return plans


@pytest.mark.parametrize("costs", [FREE, GENTLE, MIDDLING, STEEP])
def test_lookup_drafts_are_verified_where_a_text_quotes_itself(costs: StepCosts) -> None:
    generator = random.Random(0)
    page = [generator.randrange(1000) for _ in range(200)]
    budget = make_budget(costs)
    plans = run_text(budget, page, page + page)
    assert len(plans) < 70  # of 400 tokens; where positions are expensive, without masks, while drafting is paused
    lookup = budget.rows[0].lookup
    assert lookup is not None and min(lookup.mean[MAX_MATCH - 1], budget.stats.lookup.mean[MAX_MATCH - 1]) > 0.95
    if costs is not FREE:  # masks would bring little in addition
        assert Plan(8, 0, "last") in plans and sum(plan.masks for plan in plans[20:]) < len(plans[20:])
    if costs is not STEEP:  # where even certain drafts of blocks do not pay
        rest = [generator.randrange(1000) for _ in range(400)]
        assert len(run_text(make_budget(costs), page, rest, 0.99)) < 150  # better drafts of blocks are preferred


def test_a_text_that_never_repeats_costs_nothing() -> None:
    plans = run_text(make_budget(STEEP), list(range(50)), list(range(100, 1100)))
    assert plans[100:].count(PLAIN) >= 0.95 * len(plans[100:])
    # Nor does one whose tokens recur by chance.
    generator = random.Random(1)
    plans = run_text(make_budget(STEEP), list(range(20)), [generator.randrange(20) for _ in range(1000)])
    assert plans[200:].count(PLAIN) >= 0.95 * len(plans[200:])


@pytest.mark.usefixtures("untimed")
def test_costs_decide_how_much_is_drafted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding_step, "draft_block", planted_drafts(60, 12))
    num_steps = []
    for costs in (FREE, STEEP):
        monkeypatch.setattr(planner, "measure_step_costs", lambda *args, costs=costs: costs)
        model = MTPModel(bigram_base(60, 12), 3, LoRA(rank=2)).eval()
        out = model.generate(torch.tensor([[11]]), max_new_tokens=40, prompt_lookup=False)
        assert out.sequences[0, 1:].tolist() == bigram_text(11, 40, 60, 12)
        num_steps.append(int(out.num_steps[0]))
    assert num_steps[0] < num_steps[1] <= 40


@pytest.mark.usefixtures("untimed")
def test_prompt_lookup_saves_steps_and_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = MTPModel(bigram_base(21, 7), 3, LoRA(rank=2)).eval()
    monkeypatch.setattr(planner, "measure_step_costs", lambda *args: FREE)
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
    assert found == text and 17 <= steps < 25 and max(calls) <= 3  # the first cycle is new; a step verifies three drafts
    found, steps = run(prompt_lookup=False)
    assert found == text and steps > 30 and not calls
    run(num_masks=2)
    assert not calls
    run(temperature=1.0, seed=1, verification="rejection")
    assert not calls
