# SPDX-License-Identifier: Apache-2.0
"""Counts behind the metrics, each against a plain Python loop."""

from __future__ import annotations

import math
import random

import pytest
import torch

from mtp_lightning.metrics.functional import draft_runs, offset_hits, repeated_ngrams, share_of_reference, survival_counts


def random_hits(seed: int, *shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hits, valid = (torch.rand(shape, generator=generator) < share for share in (0.6, 0.8))
    return hits, valid


@pytest.mark.parametrize("shape", [(1, 3), (7, 1), (2, 5, 4)])
def test_draft_runs_and_offset_hits_against_a_loop(shape: tuple[int, ...]) -> None:
    hits, valid = random_hits(len(shape), *shape)
    K = shape[-1]
    length, starts, right, labels = 0, 0, [0] * K, [0] * K
    for hit, counted in zip(hits.reshape(-1, K).tolist(), valid.reshape(-1, K).tolist(), strict=True):
        for j in range(K):
            labels[j] += counted[j]
            right[j] += counted[j] and hit[j]
        if all(counted):
            starts += 1
            length += 1 + (hit.index(False) if False in hit else K)
    assert [part.item() for part in draft_runs(hits, valid)] == [length, starts]
    assert [part.tolist() for part in offset_hits(hits, valid)] == [right, labels]


def test_no_block_counts_nothing() -> None:
    none = torch.zeros(0, 3, dtype=torch.bool)
    assert [part.item() for part in draft_runs(none, none)] == [0, 0]
    hits, valid = torch.ones(1, 2, dtype=torch.bool), torch.tensor([[True, False]])
    assert [part.item() for part in draft_runs(hits, valid)] == [0, 0]  # one label is missing


def test_share_of_reference() -> None:
    assert share_of_reference(1.905, 2.81) == pytest.approx(0.5)
    assert share_of_reference(1.0, 2.81) == 0.0
    assert math.isnan(share_of_reference(1.0, 1.0))


@pytest.mark.parametrize("n", [1, 2, 8])
@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 60])
def test_repeated_ngrams_against_a_loop(length: int, n: int) -> None:
    tokens = random.Random(length).choices(range(2), k=length)
    grams = [tokens[i : i + n] for i in range(length) if i + n <= length]
    before = sum(grams[i] in grams[:i] for i in range(len(grams)))
    assert repeated_ngrams(tokens, n) == (before / len(grams) if grams else 0.0)


def test_repeated_ngrams_of_a_loop_and_of_distinct_tokens() -> None:
    assert repeated_ngrams([1, 2, 1, 2, 1], 2) == 0.5
    assert repeated_ngrams([5] * 17) == 0.9  # ten 8-grams, the first is new
    assert repeated_ngrams(range(17)) == 0.0


def test_kept_by_position_against_a_loop() -> None:
    accepted = random.Random(0).choices(range(5), k=30)
    assert survival_counts(accepted, 4).tolist() == [sum(a >= j for a in accepted) for j in (1, 2, 3, 4)]
    assert survival_counts([], 3).tolist() == [0, 0, 0]
