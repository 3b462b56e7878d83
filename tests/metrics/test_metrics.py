# SPDX-License-Identifier: Apache-2.0
"""Each metric against a plain Python loop, in one process and in two."""

from __future__ import annotations

import doctest
import importlib
import math
import random
from pathlib import Path

import pytest
import torch
import two_processes
from metric_data import CASES, DENOMINATORS, K, batches, computed

from mtp_lightning.metrics import AcceptanceLength, ForcedAcceptance, TermMean
from mtp_lightning.metrics.functional import repeated_ngrams, share_of_reference, survival_counts


def blocks() -> list[tuple[list[bool], list[bool]]]:
    """Hits and counted labels of each block of the forced acceptance."""
    hits, valid = (torch.cat(parts, dim=1).reshape(-1, K).tolist() for parts in zip(*batches("forced"), strict=True))
    return list(zip(hits, valid, strict=True))


def by_loop(case: str) -> float:
    """The value over both batches, from the words of docs/glossary.md and docs/method.md §5."""
    if case == "acceptance":
        tokens, steps = (sum(sum(batch[part].tolist()) for batch in batches(case)) for part in (0, 1))
        return tokens / steps
    if case == "forced":
        runs = [1 + [*hit, False].index(False) for hit, counted in blocks() if all(counted)]
        return sum(runs) / len(runs)
    used = [batch for batch in batches(case) if batch is not None]
    counts = [sum(batch[1][i].item() for batch in used) for i in range(3)]
    value = 0.0
    for part, denominator in enumerate(DENOMINATORS[case]):
        divisor = counts[denominator] if isinstance(denominator, int) else sum(counts[i] for i in denominator)
        value += sum(batch[0][part].total.item() for batch in used) / divisor
    return value


@pytest.mark.parametrize("case", CASES)
def test_against_a_loop(case: str) -> None:
    # The totals are float32 in, summed in float64 on both sides.
    assert computed(None)[case].item() == pytest.approx(by_loop(case), rel=1e-12)


def test_accuracy_against_a_loop() -> None:
    for j in range(K):
        num_hits = sum(hit[j] and counted[j] for hit, counted in blocks())
        assert computed(None)["accuracy"][j].item() == num_hits / sum(counted[j] for _, counted in blocks())


def test_two_processes_equal_one(tmp_path: Path) -> None:
    expected = computed(None)
    for values in two_processes.run(computed, tmp_path):
        assert values.keys() == expected.keys()
        for name, value in values.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-12, atol=0)  # sums in another order


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric")
@pytest.mark.parametrize("metric", [AcceptanceLength(), ForcedAcceptance(2), TermMean()])
def test_before_any_update_the_value_is_nan(metric: torch.nn.Module) -> None:
    assert math.isnan(metric.compute())


@pytest.mark.parametrize("name", ["acceptance_length", "forced_acceptance", "term_mean"])
def test_examples_in_docstrings(name: str) -> None:
    results = doctest.testmod(importlib.import_module(f"mtp_lightning.metrics.{name}"), extraglobs={"torch": torch})
    assert results.attempted and not results.failed


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
