# SPDX-License-Identifier: Apache-2.0
"""Prompt lookup finds what an exhaustive search finds, and its acceptance rates are those observed."""

from __future__ import annotations

import random
from typing import Any

import pytest

from mtp_lightning.decoding.planning.text_lookup import (
    MAX_MATCH,
    NGRAM_SIZES,
    LookupDraft,
    TextLookup,
)


def search(text: list[int], num_tokens: int) -> LookupDraft | None:
    """The same by trying every position: the longest n-gram first, the last position first."""
    end = len(text)
    for size in reversed(NGRAM_SIZES):
        for at in range(end - 1, size - 1, -1):
            if text[at - size : at] == text[end - size :]:
                matched = max(n for n in range(size, min(at, MAX_MATCH) + 1) if text[at - n : at] == text[end - n :])
                extended = list(text)
                for j in range(num_tokens):
                    extended.append(extended[at + j])
                return LookupDraft(extended[end:], matched)
    return None


@pytest.mark.parametrize("vocab", [1, 3, 50])
def test_lookup_finds_what_a_search_finds(vocab: int) -> None:
    generator, num_found = random.Random(vocab), 0
    for _ in range(40):
        text = [generator.randrange(vocab) for _ in range(generator.randrange(60))]
        text += text[10 : 10 + generator.randrange(30)]
        cut = generator.randrange(len(text) + 1)
        lookup = TextLookup(text[:cut])
        for token in text[cut:]:
            lookup.extend([token])
            if generator.random() < 0.2:
                lookup.draft(9)  # changes nothing
        expected = search(text, 9)
        assert lookup.draft(9) == expected
        num_found += expected is not None
    assert num_found > 5


def test_a_repetition_is_continued() -> None:
    assert TextLookup([]).draft(3) is None and TextLookup([7]).draft(3) is None
    assert TextLookup([1, 2, 3, 4, 1, 2]).draft(6) == LookupDraft([3, 4, 1, 2, 3, 4], 2)
    assert TextLookup([5] * 40).draft(4) == LookupDraft([5] * 4, MAX_MATCH)
    assert TextLookup([1, 2, 3, 9, 2, 3, 4, 1, 2, 3]).draft(1) == LookupDraft([4], 2)  # the last of equally long matches


def test_hash_collisions_are_detected() -> None:
    lookup = TextLookup([1, 2, 3])
    lookup._next[NGRAM_SIZES.index(2)][hash((2, 3))] = 1
    assert lookup.draft(2) is None


def test_the_cost_per_token_does_not_grow_with_the_text() -> None:
    class Counting(dict[int, int]):
        calls = 0

        def get(self, *key: Any) -> Any:
            Counting.calls += 1
            return super().get(*key)

        def __setitem__(self, *item: Any) -> None:
            Counting.calls += 1
            super().__setitem__(*item)

    lookup = TextLookup()
    lookup._next = tuple(Counting() for _ in NGRAM_SIZES)
    for token in range(1500):
        lookup.extend([token % 97])
        lookup.draft(4)
    assert Counting.calls <= 1500 * 2 * len(NGRAM_SIZES)
