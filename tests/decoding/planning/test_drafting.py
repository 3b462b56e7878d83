# SPDX-License-Identifier: Apache-2.0
"""The expected rates of strategies are those of rows that are drafted so."""

from __future__ import annotations

import random

import pytest
from step_cost_examples import MIDDLING

from mtp_lightning.decoding.planning.draft_plan import PLAIN, Plan
from mtp_lightning.decoding.planning.drafting import PLAIN_DECODING, PRIOR, RowStats, strategy_rates
from mtp_lightning.decoding.planning.text_lookup import LookupDraft

ACCEPT = [0.8, 0.6, 0.7, 0.5]


def simulated_rate(num_rows: int, masks: int, where: str, steps: int = 30_000) -> float:
    """Tokens per second of rows that are decoded step by step."""
    generator, has_drafts = random.Random(0), [False] * num_rows
    tokens = seconds = 0.0
    for _ in range(steps):
        verifying = any(has_drafts)
        plan = (Plan(masks, masks, where) if where else Plan(masks, 0, "last")) if verifying else Plan(0, masks, "last")
        seconds += MIDDLING(plan, num_rows)
        for r in range(num_rows):
            accepted = 0
            while has_drafts[r] and accepted < masks and generator.random() < ACCEPT[accepted]:
                accepted += 1
            tokens += 1 + accepted
            has_drafts[r] = dict(plan.blocks(masks if has_drafts[r] else 0)).get(accepted, 0) > 0
    return tokens / seconds


@pytest.mark.parametrize("num_rows", [1, 3])
def test_rates_are_those_of_rows_that_are_drafted_so(num_rows: int) -> None:
    for placement in ("all", "last"):
        rates = strategy_rates(ACCEPT, num_rows, (0, 1, 2, 4), placement, lambda plan: MIDDLING(plan, num_rows))
        assert rates[PLAIN_DECODING] == num_rows / MIDDLING(PLAIN, num_rows) and len(rates) == 7
        for (masks, in_every), rate in rates.items():
            if masks:
                assert rate == pytest.approx(simulated_rate(num_rows, masks, placement if in_every else ""), rel=0.02)


def test_acceptance_is_learned_from_the_text_whether_drafts_are_verified_or_not() -> None:
    text = RowStats(3)
    assert text.accept_probs() == [PRIOR] * 3
    text.learn([1], [2, 3, 4])
    text.learn([9], [])
    first, *others = text.accept_probs()
    assert others == [first] * 2 and first < PRIOR  # what has not been seen is expected to be like what has been
    for _ in range(100):
        text.learn([1], [2, 3, 4])
        text.learn([2], [])  # plain steps
        text.learn([3, 9, 9], [])
    first, second, third = text.accept_probs()
    assert first > 0.9 and second > 0.9 and third < 0.2
    text.learn([1], [2, 3, 4])
    text.learn([5, 3], [])  # what comes after a wrong draft says nothing
    assert text.accept_probs()[0] < first and abs(text.accept_probs()[1] - second) < 0.02


def test_drafts_of_the_text_are_judged_by_their_match() -> None:
    text = RowStats(3)
    for _ in range(50):
        text.last_lookup = LookupDraft([5, 6], 3)
        text.learn([5, 7], [])
    probs = text.lookup.accept_probs(LookupDraft([1, 2, 3], 3))
    assert probs[0] > 0.8 and probs[1] < 0.2 and 0.2 < probs[2] < 0.8
