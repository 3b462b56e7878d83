# SPDX-License-Identifier: Apache-2.0
"""Budgeted drafting: any plan gives the same text, and the plans chosen are those that pay by the costs they are given."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from plan_costs import FREE, GENTLE, MIDDLING, STEEP, make
from sampled_rows import LENGTHS, SEED, SETTINGS, TESTS, G, fitted, p_value, padded, prompts, reference, rows_of
from tiny import CONTEXT, VOCAB, greedy_text, tiny_base, tiny_model, token_row

from mtp_lightning.decoding import loop as decoding
from mtp_lightning.decoding.execution.decode_cache import decode_cache
from mtp_lightning.decoding.execution.step import draft_block
from mtp_lightning.decoding.noise import row_seeds
from mtp_lightning.decoding.options import DecodingOptions
from mtp_lightning.decoding.planning import budget as budget_file
from mtp_lightning.decoding.planning import draft_stats
from mtp_lightning.decoding.planning.budget import Budget
from mtp_lightning.decoding.planning.draft_plan import PLAIN, Plan
from mtp_lightning.decoding.planning.draft_stats import DraftStats
from mtp_lightning.decoding.planning.step_costs import StepCosts
from mtp_lightning.decoding.planning.text_lookup import FoundDraft
from mtp_lightning.decoding.token_choice import Prefixes, TokenChoice
from mtp_lightning.model import MTPModel
from mtp_lightning.sampler_heads import GRUSamplerHead


def use_plans(monkeypatch: pytest.MonkeyPatch, seed: int, costs: StepCosts = GENTLE) -> list[Plan]:
    """Plans drawn at random, whatever pays; gives the list that they are noted in."""
    generator, seen = random.Random(seed), []

    def choose(self: Budget, room: int, limits: list[int], spare: list[int]) -> Plan:
        sizes = [size for size in self.sizes if size <= room]
        for row, most in zip(self.rows, spare, strict=True):
            # Drafts of the text, and some that are nonsense, in place of the block's.
            row.offered = row.text.draft(min(most, 8)) if row.text and most > 0 else None
            if row.text and most > 0 and generator.random() < 0.2:
                row.offered = FoundDraft([generator.randrange(VOCAB) for _ in range(generator.randint(1, most))], 3)
            row.found = row.offered if generator.random() < 0.5 else None
        # Also more drafts than there are: none of those is verified.
        most = max([*limits, *(len(row.found.tokens) for row in self.rows if row.found)], default=0)
        c, m = generator.choice([size for size in self.sizes if size <= most + 2]), generator.choice(sizes)
        self.least = generator.choice([0.0, 0.05, 0.5]) if self.coupled else 0.0  # drafts also end early
        seen.append(Plan(c, m, generator.choice(self.places)))
        return seen[-1]

    monkeypatch.setattr(Budget, "choose", choose)
    monkeypatch.setattr(decoding, "measure_step_costs", lambda *args: costs)
    return seen


@pytest.mark.parametrize("setting", [0, 1])
@pytest.mark.parametrize("kind", ["quadratic", "linear"])
@pytest.mark.parametrize("head", ["mlp", "gru"])
def test_any_plan_draws_the_same_text(head: str, kind: str, setting: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, expected, seeds = fitted(head), [list(text) for text in reference(setting)], row_seeds(SEED, len(LENGTHS))
    kept: set[int] = set()
    for seed in range(4):
        seen = use_plans(monkeypatch, seed)
        options = {"decoding": kind, "max_new_tokens": G, **SETTINGS[setting]}
        out = model.generate(*padded(prompts()), seed=SEED, **options)
        assert rows_of(out) == expected
        kept |= {count for row in out.accepted_per_step for count in row}
        assert len(set(seen)) > 5
        for r in (3, 10):
            alone = model.generate(prompts()[r][None], seed=seeds[r], **options)
            assert alone.sequences[0, LENGTHS[r] :].tolist() == expected[r]
    assert {0, 1, 2} <= kept


@pytest.mark.parametrize("architecture", ["gemma3", "mistral-window", "qwen3_moe"])
@pytest.mark.parametrize("kind", ["quadratic", "linear"])
def test_any_plan_writes_the_greedy_text(architecture: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, base = tiny_model(architecture, 5, sampler_head=GRUSamplerHead()), tiny_base(architecture)
    rows = [token_row([n], seed=n).input_ids for n in (6, 1, 12, CONTEXT - 7)]
    ids, mask = padded(rows)
    for seed in range(3):
        use_plans(monkeypatch, seed)
        out = model.generate(ids, mask, decoding=kind, max_new_tokens=20)
        for r, row in enumerate(rows):
            text = greedy_text(base, row, min(20, CONTEXT - len(row)))
            assert out.sequences[r, len(row) : len(row) + len(text)].tolist() == text


def test_processors_see_text_and_drafts_alone() -> None:
    """A plan may feed more drafts than a row has; what stands in their place is shown to nobody."""
    seen: list[list[int]] = []

    def processor(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        seen.append(ids[0].tolist())
        return scores + 1.0

    choice = TokenChoice(DecodingOptions(logits_processor=[processor]), [0, 0], torch.device("cpu"))
    tokens, logits = torch.arange(20).view(2, 10), torch.zeros(2, 4, 5)
    scores = choice.target(logits, Prefixes(tokens, [3, 2], [1, 3]))
    assert scores[:, :, 0].tolist() == [[1.0, 1.0, 0.0, 0.0], [1.0] * 4]
    assert [len(ids) for ids in seen] == [3, 4, 2, 3, 4, 5] and seen[1] == [0, 1, 2, 3]


def test_the_rejection_rule_keeps_its_distribution_under_any_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    use_plans(monkeypatch, 0)
    p, share = p_value(40_000, 5_000, verification="rejection")
    assert p > 0.01 / TESTS and 0.1 < share < 0.9


def settled(budget: Budget, probability: float, kept: int, steps: int = 60) -> list[Plan]:
    """Plans of a text whose drafts always have a probability and of which so many are kept."""
    plans, drafts = [], [0] * len(budget.rows)
    for _ in range(steps):
        plan = budget.choose(8, drafts)
        plans.append(plan)
        drafted = [min(count, plan.num_drafts) for count in drafts]
        run = [min(kept, count) for count in drafted]
        depth = dict(plan.blocks())
        drafts = [depth.get(a, 0) for a in run]
        budget.learn(plan, plan.masks, run, drafted, drafts, [[probability] * 8 for _ in drafts])
    return plans


def test_where_positions_are_free_everything_is_drafted() -> None:
    for num_rows in (1, 4):
        assert set(settled(make(FREE, num_rows), 0.9, 8)[20:]) <= {Plan(8, 8, "all"), Plan(8, 8, "ends"), Plan(8, 8, "last")}
        assert settled(make(FREE, num_rows), 0.6, 2)[-1].where == "all"
    assert {plan.where for plan in settled(make(FREE, anywhere=False), 0.6, 2)} == {"last"}


@pytest.mark.parametrize("coupled", [True, False])
def test_where_drafts_are_never_kept_steps_are_plain(coupled: bool) -> None:
    budget = make(STEEP, coupled=coupled)
    plans = settled(budget, 0.3, 0, 3000)
    assert plans[100:200].count(PLAIN) >= 95
    # Looking whether it pays by now costs little.
    spent = sum(budget.costs.spent(p, p.masks) for p in plans)
    assert spent < 1.03 * len(plans) * 1.0
    assert any(plan != PLAIN for plan in plans[1000:])


@pytest.mark.parametrize("num_rows", [1, 4, 16])
def test_rates_are_those_of_the_whole_batch(num_rows: int) -> None:
    budget = make(STEEP, num_rows)
    for row in budget.rows:
        row.mean[:] = 0.01
    assert budget._prices()[1] == pytest.approx(num_rows / budget.costs.spent(PLAIN, 0))
    drafting = make(GENTLE, num_rows)
    drafting.stops_early = True
    plans = settled(drafting, 0.9, 8)
    if num_rows <= 4:
        assert sum(plan.num_drafts for plan in plans[20:]) > 2 * len(plans[20:])
        assert drafting.least < 0.1


def test_beginning_a_draft_has_its_price() -> None:
    dear = make(GENTLE._replace(begun=2.0))
    assert dear.costs.spent(Plan(0, 2, "last"), 2) == pytest.approx(make(GENTLE).costs.spent(Plan(0, 2, "last"), 2) + 2.0)
    assert settled(make(GENTLE), 0.9, 8)[-1] != PLAIN and settled(dear, 0.5, 1)[-1] == PLAIN


def test_drafting_is_taken_up_again_when_it_pays_by_now() -> None:
    budget = make(MIDDLING)
    assert settled(budget, 0.1, 0, 300)[-1] == PLAIN
    assert settled(budget, 0.98, 8, 600)[-1].num_drafts >= 2


def test_confidence_decides_what_is_verified() -> None:
    budget = make(MIDDLING)
    settled(budget, 0.95, 8, 100)
    budget.learn(PLAIN, 0, [0], [0], [8], [[0.97, 0.97, 0.97, 0.03, 0.9, 0.9, 0.9, 0.9]])
    assert budget.choose(8, [8]).num_drafts in (2, 4)  # the sizes about the three that are sure
    budget.learn(PLAIN, 0, [0], [0], [8], [[0.03] * 8])
    assert budget.choose(8, [8]).num_drafts == 0


def test_plans_of_the_rejection_rule_do_not_see_the_drafts() -> None:
    plans = []
    for probability in (0.02, 0.98):
        budget = make(GENTLE, coupled=False)
        plans.append(settled(budget, probability, 3))
    assert plans[0] == plans[1] and max(plan.num_drafts for plan in plans[0]) > 1


def test_what_is_little_known_is_hoped_for() -> None:
    """By half a standard error of what was seen: little where much was."""
    record, at = DraftStats(4), np.array([0.525])
    differences = []
    for count in (0, 50, 500):
        for number in range(count):
            record.learn([0.525], number % 2, 1)
        verified, kept = record._verified[10], record._kept[10]
        differences.append(float(record.chance(at)[0]) - kept / verified)
        assert differences[-1] == pytest.approx(0.5 * np.sqrt(kept / verified * (1 - kept / verified) / verified))
    assert differences[0] > 0.08 > 0.04 > differences[1] > 0.02 > differences[2] > 0


def test_chances_are_corrected_by_what_was_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draft_stats, "HOPE", 0.0)
    record, generator = DraftStats(4), np.random.default_rng(0)
    before = record.chance(np.array([0.1, 0.5, 0.9]))
    np.testing.assert_allclose(before, [0.1, 0.5, 0.9], atol=0.03)
    for _ in range(4000):
        probability = float(generator.uniform())
        record.learn([probability], int(generator.uniform() < probability**2), 1)
    found = record.chance(np.array([0.2, 0.5, 0.8]))
    np.testing.assert_allclose(found, [0.04, 0.25, 0.64], atol=0.12)  # bins hold a hundred draws or so
    assert (np.diff(record.chance(np.linspace(0, 1, 50))) > -0.2).all()


def test_blocks_of_plans() -> None:
    assert Plan(3, 2, "last").blocks() == ((3, 2),)
    assert Plan(3, 2, "ends").blocks() == ((0, 2), (3, 2)) and Plan(0, 2, "ends").blocks() == ((0, 2),)
    assert Plan(2, 1, "all").blocks() == ((0, 1), (1, 1), (2, 1)) and Plan(2, 0, "all").blocks() == ()


def test_room_and_limits_are_kept_to() -> None:
    budget = make(FREE, 2)
    settled(budget, 0.9, 8)
    for room in range(9):
        for limits in ([0, 0], [1, 0], [3, 8]):
            plan = budget.choose(room, limits)
            assert plan.masks <= room and plan.num_drafts <= next(n for n in budget.sizes if n >= max(limits))
            assert {plan.masks, plan.num_drafts} <= set(budget.sizes)


def test_drafts_end_early_where_going_on_does_not_pay() -> None:
    model = tiny_model("llama", 8, sampler_head=GRUSamplerHead())
    choice = TokenChoice(DecodingOptions(), [0, 0], torch.device("cpu"))
    choice.confident = True
    hidden = torch.randn(2, 8, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    arguments = (model, hidden, torch.tensor([3, 4]), torch.tensor([9, 9]), choice, True)
    with torch.inference_mode():
        whole = draft_block(*arguments)
        assert whole.tokens.shape == (2, 8) and whole.probabilities is not None
        chance = whole.probabilities.cumprod(1).max(0).values  # of the row that goes on longest
        for count in (1, 3, 7):
            choice.least = float(chance[count - 1]) * 1.0001
            part = draft_block(*arguments)
            length = int((chance >= choice.least).sum()) + 1
            assert 1 <= length <= count and torch.equal(part.tokens, whole.tokens[:, :length])
    assert make(GENTLE).least == 0
    budget = make(GENTLE)
    budget.stops_early = True
    budget.choose(8, [0])
    assert 0 < budget.least < 0.1


def plan_counts(model: MTPModel, monkeypatch: pytest.MonkeyPatch, costs: StepCosts, **options: Any) -> list[int]:
    monkeypatch.setattr(decoding, "measure_step_costs", lambda *args: costs)
    monkeypatch.setattr(Budget, "observe", lambda *args: None)
    monkeypatch.setattr(budget_file, "PLAIN_FIRST", 0)
    decode_cache(model).calibrations.clear()
    out = model.generate(*padded(prompts()), seed=SEED, max_new_tokens=G, **options)
    assert rows_of(out) == [list(text) for text in reference(0)]
    return out.num_steps.tolist()


def test_free_positions_take_fewer_steps_than_steep_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    model = fitted("gru")
    free = plan_counts(model, monkeypatch, FREE, **SETTINGS[0])
    steep = plan_counts(model, monkeypatch, STEEP, **SETTINGS[0])
    assert sum(free) < sum(steep) <= G * len(LENGTHS)
    decode_cache(model).calibrations.clear()


def test_plain_steps_are_measured_again_across_short_texts() -> None:
    """Two slow plain steps at the beginning must not make drafting look good for ever, however short texts are."""
    record = DraftStats(8)
    plain, steps = 0, 0
    for _text in range(40):
        budget = Budget(FREE, record, 8, 1, True, True)
        drafts = [0]
        for _ in range(20):
            plan = budget.choose(8, drafts)
            steps += 1
            slow = plan == PLAIN and plain < 4
            plain += plan == PLAIN
            budget.observe(plan, plan.masks, 10.0 if slow else 1.0)
            kept = min(drafts[0], plan.num_drafts)
            drafted, drafts = kept, [dict(plan.blocks()).get(kept, 0)]
            budget.learn(plan, plan.masks, [kept], [drafted], drafts, [[0.9] * 8])
    assert 6 < plain < 0.05 * steps
    assert record.pace.factors(1)[0, 1] < 3.5  # was 10, of which a log is an average


def test_the_look_beside_the_prompt_has_its_price() -> None:
    """Where drafting does not pay, a text begins in debt for it, and where it does the block is no look."""
    budget = make(STEEP)
    for row in budget.rows:
        row.mean[:] = 0.01
    assert budget.first(8) == Plan(0, 2, "last")
    price = budget.costs.spent(Plan(0, 2, "last"), 2) - budget.costs.spent(PLAIN, 0)
    assert budget._owed == pytest.approx(-price)
    free = make(FREE)
    assert free.first(8).masks >= 2 and free._owed == 0
    # A plain step that is due is not taken for the prompt's, which is none.
    timed = Budget(FREE, DraftStats(8), 8, 1, True, True)
    assert timed.first(8).masks >= 2 and timed._owed == 0 and timed.choose(8, [2]) == PLAIN


def test_only_blocks_tell_of_blocks() -> None:
    budget = make(GENTLE)
    usual = budget.record.usual.copy()
    budget.rows[0].mean[:] = 0.01
    for _ in range(50):
        budget.learn(PLAIN, 0, [0], [0], [0], [[]])
    assert (budget.record.usual == usual).all()
    budget.learn(Plan(0, 2, "last"), 2, [0], [0], [2], [[0.1, 0.1]])
    assert (budget.record.usual < usual).all()


def test_drafts_of_the_text_do_not_make_looks_frequent() -> None:
    budget = make(STEEP)
    budget._looks = 4
    budget.rows[0].found = FoundDraft([5], 3)
    budget.learn(Plan(1, 0, "last"), 0, [1], [1], [0], [[]])
    assert budget._looks == 4
    budget.rows[0].found = None
    budget.rows[0].probabilities = [0.5]
    budget.learn(Plan(1, 0, "last"), 0, [1], [1], [0], [[]])
    assert budget._looks == 1
