# SPDX-License-Identifier: Apache-2.0
"""Prompt lookup: found is what a plain search finds, chances are what was seen, and drafts are verified where that pays."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from bigram import bigram_base, bigram_text
from plan_costs import FREE, GENTLE, MIDDLING, STEEP, make

from mtp_lightning.decoding import loop as decoding
from mtp_lightning.decoding.loop import decode
from mtp_lightning.decoding.options import DecodingOptions
from mtp_lightning.decoding.planning import budget
from mtp_lightning.decoding.planning.budget import Budget
from mtp_lightning.decoding.planning.draft_plan import PLAIN, Plan
from mtp_lightning.decoding.planning.text_lookup import GRAMS, LONGEST, FoundDraft, LookupRecord, TextLookup
from mtp_lightning.model import MTPModel
from mtp_lightning.modeling.gated_lora import LoRA


def searched(text: list[int], most: int) -> FoundDraft | None:
    """The same by looking at every place, the longest run first, the last place first."""
    end = len(text)
    for size in reversed(GRAMS):
        for at in range(end - 1, size - 1, -1):
            if text[at - size : at] == text[end - size :]:
                matched = max(n for n in range(size, min(at, LONGEST) + 1) if text[at - n : at] == text[end - n :])
                grown = list(text)
                for j in range(most):
                    grown.append(grown[at + j])
                return FoundDraft(grown[end:], matched)
    return None


@pytest.mark.parametrize("vocab", [1, 2, 5, 50])
def test_what_is_found_is_what_a_search_finds(vocab: int) -> None:
    generator, texts, found = random.Random(vocab), 40, 0
    for _ in range(texts):
        text = [generator.randrange(vocab) for _ in range(generator.randrange(60))]
        text += text[10 : 10 + generator.randrange(30)]
        cut = generator.randrange(len(text) + 1)
        lookup = TextLookup(text[:cut])
        for token in text[cut:]:
            lookup.extend([token])
            if generator.random() < 0.2:
                lookup.draft(9)  # asking changes nothing
        expected = searched(text, 9)
        assert lookup.draft(9) == expected
        found += expected is not None
    assert found > 5


def test_a_text_that_repeats_itself_goes_on() -> None:
    assert TextLookup([]).draft(3) is None and TextLookup([7]).draft(3) is None
    assert TextLookup([1, 2, 3, 4, 1, 2]).draft(6) == FoundDraft([3, 4, 1, 2, 3, 4], 2)
    assert TextLookup([5] * 40).draft(4) == FoundDraft([5] * 4, LONGEST)
    assert TextLookup([1, 2, 3, 9, 2, 3, 4, 1, 2, 3]).draft(1) == FoundDraft([4], 2)  # of as long runs the last


def test_equal_hashes_of_other_tokens_are_seen_through() -> None:
    lookup = TextLookup([1, 2, 3])
    lookup._behind[GRAMS.index(2)][hash((2, 3))] = 1  # stands for the hash of (2, 3), but there stand others
    assert lookup.draft(2) is None


def test_a_long_text_takes_no_more_lookups_a_token() -> None:
    """Counts runs that are written and looked up: as many for each token, whatever stands before it."""

    class Counting(dict[int, int]):
        calls = 0

        def get(self, *key: Any) -> Any:
            Counting.calls += 1
            return super().get(*key)

        def __setitem__(self, *item: Any) -> None:
            Counting.calls += 1
            super().__setitem__(*item)

    lookup, counts = TextLookup(), []
    lookup._behind = tuple(Counting() for _ in GRAMS)
    for _ in range(3):
        before = Counting.calls
        for token in range(500):
            lookup.extend([token % 97])
            lookup.draft(4)
        counts.append(Counting.calls - before)
    assert max(counts) <= 500 * 2 * len(GRAMS)


def test_chances_are_what_was_seen() -> None:
    record, generator = LookupRecord(), np.random.default_rng(0)
    first = record.chances(FoundDraft([1] * 20, 1))
    assert (
        (np.diff(record.mean) > 0).all() and record.mean[0] == pytest.approx(0.2) and first[LONGEST - 1 :] == first[-1:] * 5
    )
    for _ in range(2000):  # after 3 tokens texts go on in 70 of 100 cases, after 4 in 20
        same = int(generator.uniform() < 0.7)
        record.learn(FoundDraft([5, 6, 7], 3), [5, 6 if generator.uniform() < 0.2 else 0] if same else [4, 6])
    # A hundred to two hundred continuations are remembered: three standard errors are 0.12.
    np.testing.assert_allclose(record.mean[2:4], [0.7, 0.2], atol=0.12)
    assert record.chances(FoundDraft([1], 2)) == first[1:2] and record.chances(FoundDraft([1], 5)) == first[4:5]
    before = record.chances(FoundDraft([1] * 8, 2))
    record.learn(FoundDraft([1, 2], 2), [])
    assert record.chances(FoundDraft([1] * 8, 2)) == before


def test_little_seen_is_doubted() -> None:
    record = LookupRecord([0.7] * LONGEST, 1000.0)
    for count in (0, 20, 200):
        for number in range(count):
            record.learn(FoundDraft([5], 3), [5 if number % 10 < 7 else 4])
        seen = 4.0 + (220 if count == 200 else count)  # the guess counts for four
        assert record.mean[2] == pytest.approx(0.7)
        assert record.table[2] == pytest.approx(0.7 - np.sqrt(0.7 * 0.3 / seen))
    own = LookupRecord(record.mean, 30)  # a text begins with what others did, and soon knows better
    assert own.mean == record.mean and own.table[2] < record.table[2]
    for _ in range(20):
        own.learn(FoundDraft([5], 3), [4])
    assert own.mean[2] < 0.2 and own.table[2] < 0.1 and own.mean[3] == record.mean[3]


def written(planner: Budget, text: list[int], new: list[int], waiting: float = 0.0) -> list[Plan]:
    """Plans while a text goes on with these tokens, whose blocks' drafts are never right or, with a probability, always."""
    plans, at, drafts = [], 0, 0
    planner.read([text])
    while at < len(new):
        plan = planner.choose(8, [drafts], [min(8, len(new) - at - 1)])
        plans.append(plan)
        row = planner.rows[0]
        if row.found is not None:
            tokens = row.found.tokens[: plan.num_drafts]
            kept = next((j for j, token in enumerate(tokens) if new[at + j] != token), len(tokens))
            drafted = len(tokens)
        else:
            drafted = min(drafts, plan.num_drafts)
            kept = drafted if waiting else 0
        drafts = dict(plan.blocks(drafted)).get(kept, 0)
        gained = new[at : at + kept + 1]
        at += len(gained)
        planner.learn(plan, plan.masks, [kept], [drafted], [drafts], [[waiting or 0.05] * 8], [gained])
    return plans


@pytest.mark.parametrize("costs", [FREE, GENTLE, MIDDLING, STEEP])
def test_a_text_that_quotes_is_verified_from_itself(costs: Any) -> None:
    generator = random.Random(0)
    page = [generator.randrange(1000) for _ in range(200)]
    planner = make(costs)
    plans = written(planner, page, page + page)
    assert len(plans) < 70  # of 400 tokens; where positions are dear, without masks and in their own way of planning
    # What was seen is known of this text and of all.
    own = planner.rows[0].lookups
    assert own is not None and min(own.mean[LONGEST - 1], planner.record.lookups.mean[LONGEST - 1]) > 0.95
    if costs is not FREE:  # masks would bring little beside
        assert Plan(8, 0, "last") in plans and sum(plan.masks for plan in plans[20:]) < len(plans[20:])
    # Drafts of blocks that are better still are preferred.
    if costs is STEEP:  # there even sure drafts of blocks do not pay
        return
    rest = [generator.randrange(1000) for _ in range(400)]
    assert len(written(make(costs), page, rest, 0.99)) < 150


def test_a_text_that_never_repeats_costs_nothing() -> None:
    plans = written(make(STEEP), list(range(50)), list(range(100, 1100)))
    assert plans[100:].count(PLAIN) >= 0.95 * len(plans[100:])
    # Nor does one whose tokens recur by chance: what follows them is not believed for long.
    generator = random.Random(1)
    plans = written(make(STEEP), list(range(20)), [generator.randrange(20) for _ in range(1000)])
    assert plans[200:].count(PLAIN) >= 0.95 * len(plans[200:])


def test_looking_goes_on_while_texts_are_read() -> None:
    """Where the text offers drafts at every step, blocks are looked at all the same, the more seldom the more is forgone."""
    generator = random.Random(2)
    words = [[generator.randrange(1000) for _ in range(3)] for _ in range(5)]
    new = [token for _ in range(900) for token in generator.choice(words)]  # within a word all is known, and no more
    plans = written(make(GENTLE), new[:60], new)
    looks = sum(plan.masks > 0 for plan in plans[200:])
    assert 0 < looks < 0.03 * len(plans[200:]) and all(plan.num_drafts or plan.masks for plan in plans[200:])


def decoded(model: MTPModel, **options: Any) -> tuple[list[int], int]:
    steps = list(decode(model, torch.tensor([3]), DecodingOptions(max_new_tokens=50, **options)))
    return [token for step in steps for token in step.tokens], len(steps)


def test_prompt_lookup_saves_steps_and_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = MTPModel(bigram_base(21, 7), 3, LoRA(rank=2)).eval()
    monkeypatch.setattr(decoding, "measure_step_costs", lambda *args: FREE)
    monkeypatch.setattr(Budget, "observe", lambda *args: None)
    monkeypatch.setattr(budget, "PLAIN_FIRST", 0)
    calls: list[int] = []
    original = TextLookup.draft
    monkeypatch.setattr(TextLookup, "draft", lambda self, most: calls.append(most) or original(self, most))
    text = bigram_text(3, 50, 21, 7)
    assert decoded(model, decoding="autoregressive") == (text, 50) and not calls
    found, steps = decoded(model)
    assert found == text and 17 <= steps < 25  # the first cycle is new, and a step verifies three drafts
    assert calls and max(calls) <= 3
    calls.clear()
    found, steps = decoded(model, prompt_lookup=False)
    assert found == text and steps > 30 and not calls
    for options in (
        {"num_masks": 2},
        {"temperature": 1.0, "seed": 1, "verification": "rejection"},
    ):
        decoded(model, **options)
        assert not calls
