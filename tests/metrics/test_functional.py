# SPDX-License-Identifier: Apache-2.0
"""The counts behind the metrics, each against a plain Python loop."""

from __future__ import annotations

import math
import random

import pytest
import torch

from mtp_lightning.metrics.functional import draft_runs, offset_hits, repeated_ngrams, share_of_reference, survival_counts


@pytest.mark.parametrize("shape", [(1, 3), (7, 1), (2, 5, 4)])
def test_draft_runs_and_offset_hits_against_a_loop(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(len(shape))
    hits, valid = (torch.rand(shape, generator=generator) < share for share in (0.6, 0.8))
    K = shape[-1]
    length, starts, num_hits, num_labels = 0, 0, [0] * K, [0] * K
    for hit, counted in zip(hits.reshape(-1, K).tolist(), valid.reshape(-1, K).tolist(), strict=True):
        for j in range(K):
            num_labels[j] += counted[j]
            num_hits[j] += counted[j] and hit[j]
        if all(counted):
            starts += 1
            length += 1 + [*hit, False].index(False)
    assert [part.item() for part in draft_runs(hits, valid)] == [length, starts]
    assert [part.tolist() for part in offset_hits(hits, valid)] == [num_hits, num_labels]


def test_share_of_reference() -> None:
    assert share_of_reference(1.905, 2.81) == pytest.approx(0.5)
    assert share_of_reference(1.0, 2.81) == 0.0
    assert math.isnan(share_of_reference(1.0, 1.0))


@pytest.mark.parametrize(("length", "n"), [(0, 1), (7, 1), (7, 8), (8, 8), (60, 8)])
def test_repeated_ngrams_against_a_loop(length: int, n: int) -> None:
    tokens = random.Random(length).choices(range(2), k=length)
    grams = [tokens[i : i + n] for i in range(length) if i + n <= length]
    num_repeats = sum(grams[i] in grams[:i] for i in range(len(grams)))
    assert repeated_ngrams(tokens, n) == (num_repeats / len(grams) if grams else 0.0)


def test_survival_counts_against_a_loop() -> None:
    accepted = random.Random(0).choices(range(5), k=30)
    assert survival_counts(accepted, 4).tolist() == [sum(a >= j for a in accepted) for j in (1, 2, 3, 4)]
    assert survival_counts([], 3).tolist() == [0, 0, 0]
