# SPDX-License-Identifier: Apache-2.0
"""Whatever is planned, the text is the same: plans and lookup drafts are drawn at random."""

from __future__ import annotations

import random

import pytest
from sampled_rows import LENGTHS, SEED, SETTINGS, TESTS, G, fitted, p_value, padded, prompts, reference, rows_of
from step_cost_examples import GENTLE
from tiny import CONTEXT, VOCAB, greedy_text, tiny_base, tiny_model, token_row

from mtp_lightning.decoding import planner
from mtp_lightning.decoding.noise import row_seeds
from mtp_lightning.decoding.planning.budget import Budget
from mtp_lightning.decoding.planning.draft_plan import Plan
from mtp_lightning.decoding.planning.text_lookup import LookupDraft
from mtp_lightning.sampler_heads import GRUSamplerHead


def use_random_plans(monkeypatch: pytest.MonkeyPatch, seed: int) -> list[Plan]:
    """Draw plans at random; returns the list that they are appended to."""
    generator, plans = random.Random(seed), []

    def choose(self: Budget, max_masks: int, num_waiting: list[int], offers: list[LookupDraft | None]) -> Plan:
        sizes = [size for size in self.sizes if size <= max_masks]
        for row, offer in zip(self.rows, offers, strict=True):
            # Drafts of the text, and some that are nonsense, in place of the block's.
            row.lookup_draft = offer
            if offer and generator.random() < 0.2:
                row.lookup_draft = LookupDraft([generator.randrange(VOCAB) for _ in offer.tokens], 3)
            row.chosen_lookup = row.lookup_draft if generator.random() < 0.5 else None
        # Also more drafts than there are: those beyond are not verified.
        most = max([*num_waiting, *(len(row.chosen_lookup.tokens) for row in self.rows if row.chosen_lookup)], default=0)
        c, m = generator.choice([size for size in self.sizes if size <= most + 2]), generator.choice(sizes)
        self.min_path_prob = generator.choice([0.0, 0.05, 0.5]) if self.coupled else 0.0  # drafts also end early
        plans.append(Plan(c, m, generator.choice(self.placements)))
        return plans[-1]

    monkeypatch.setattr(Budget, "choose", choose)
    monkeypatch.setattr(planner, "measure_step_costs", lambda *args: GENTLE)
    return plans


@pytest.mark.parametrize("setting", [0, 1])
@pytest.mark.parametrize("kind", ["quadratic", "linear"])
def test_any_plan_draws_the_same_text(kind: str, setting: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, expected, seeds = fitted("gru"), [list(text) for text in reference(setting)], row_seeds(SEED, len(LENGTHS))
    accepted: set[int] = set()
    for seed in range(3):
        plans = use_random_plans(monkeypatch, seed)
        options = {"decoding": kind, "max_new_tokens": G, **SETTINGS[setting]}
        out = model.generate(*padded(prompts()), seed=SEED, **options)
        assert rows_of(out) == expected
        accepted |= {count for row in out.accepted_per_step for count in row}
        assert len(set(plans)) > 5
        alone = model.generate(prompts()[3][None], seed=seeds[3], **options)
        assert alone.sequences[0, LENGTHS[3] :].tolist() == expected[3]
    assert {0, 1, 2} <= accepted


@pytest.mark.parametrize("architecture", ["gemma3", "mistral-window", "qwen3_moe"])
@pytest.mark.parametrize("kind", ["quadratic", "linear"])
def test_any_plan_writes_the_greedy_text(architecture: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, base = tiny_model(architecture, 5, sampler_head=GRUSamplerHead()), tiny_base(architecture)
    rows = [token_row([n], seed=n).input_ids for n in (6, 1, 12, CONTEXT - 7)]
    texts = [greedy_text(base, row, min(20, CONTEXT - len(row))) for row in rows]
    for seed in range(2):
        use_random_plans(monkeypatch, seed)
        out = model.generate(*padded(rows), decoding=kind, max_new_tokens=20)
        for r, (row, text) in enumerate(zip(rows, texts, strict=True)):
            assert out.sequences[r, len(row) : len(row) + len(text)].tolist() == text


@pytest.mark.slow
def test_the_rejection_rule_keeps_its_distribution_under_any_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    use_random_plans(monkeypatch, 0)
    p, share = p_value(40_000, 5_000, verification="rejection")
    assert p > 0.01 / TESTS and 0.1 < share < 0.9
