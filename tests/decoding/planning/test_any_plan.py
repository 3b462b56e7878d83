# SPDX-License-Identifier: Apache-2.0
"""Whatever is planned, the text is the same: plans and lookup drafts are drawn at random."""

from __future__ import annotations

import pytest
from random_plans import use_random_plans
from sampled_rows import LENGTHS, SEED, SETTINGS, TESTS, G, fitted, p_value, padded, prompts, reference, rows_of
from tiny import CONTEXT, greedy_text, tiny_base, tiny_model, token_row

from mtp_lightning.decoding.noise import row_seeds
from mtp_lightning.sampler_heads import GRUSamplerHead


@pytest.mark.parametrize(("kind", "setting"), [("quadratic", 0), ("linear", 1)])
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


@pytest.mark.parametrize(
    ("architecture", "kind"), [("gemma3", "quadratic"), ("mistral-window", "linear"), ("qwen3_moe", "quadratic")]
)
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
