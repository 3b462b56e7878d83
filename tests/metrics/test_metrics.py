# SPDX-License-Identifier: Apache-2.0
"""Each metric against a plain Python loop; two updates, two merged states and two processes against one."""

from __future__ import annotations

import doctest
import importlib
import math
from pathlib import Path

import pytest
import torch
import two_processes
from metric_data import KINDS, K, batches, filled_metrics, new_metric

from mtp_lightning.metrics import AcceptanceLength, ForcedAcceptance, TermMean

SEED = 3


def by_loop(kind: str) -> float:
    """The value over both batches, from the words of docs/method.md §1 and §5."""
    if kind == "acceptance":
        tokens, steps = (sum(sum(batch[part].tolist()) for batch in batches(kind, SEED)) for part in (0, 1))
        return tokens / steps
    if kind == "forced":
        runs = []
        for hits, valid in batches(kind, SEED):
            for hit, counted in zip(hits.reshape(-1, K).tolist(), valid.reshape(-1, K).tolist(), strict=True):
                if all(counted):
                    runs.append(1 + [*hit, False].index(False))
        return sum(runs) / len(runs)
    used = [batch for index, batch in enumerate(batches(kind, SEED)) if kind != "one_sided" or index == 1]
    counts = [sum(batch[1][i].item() for batch in used) for i in range(3)]
    value = 0.0
    for part in range(len(used[0][0])):
        count = used[0][0][part].denominator
        divisor = counts[count] if isinstance(count, int) else sum(counts[i] for i in count)
        value += sum(batch[0][part].total.item() for batch in used) / divisor
    return value


@pytest.mark.parametrize("kind", KINDS)
def test_against_a_loop(kind: str) -> None:
    # The totals are float32 in, summed in float64 on both sides.
    assert dict(filled_metrics(SEED, None))[kind].item() == pytest.approx(by_loop(kind), rel=1e-12)


def test_accuracy_against_a_loop() -> None:
    hits, valid = (torch.cat(parts, dim=1).reshape(-1, K).tolist() for parts in zip(*batches("forced", SEED), strict=True))
    for j in range(K):
        right = sum(hit[j] and counted[j] for hit, counted in zip(hits, valid, strict=True))
        expected = right / sum(counted[j] for counted in valid)
        assert dict(filled_metrics(SEED, None))["accuracy"][j].item() == expected


@pytest.mark.parametrize("kind", ["acceptance", "forced"])
def test_two_updates_equal_one(kind: str) -> None:
    one = new_metric(kind)
    dim = 0 if kind == "acceptance" else 1
    one.update(*(torch.cat(parts, dim=dim) for parts in zip(*batches(kind, SEED), strict=True)))
    assert torch.equal(one.compute(), dict(filled_metrics(SEED, None))[kind])


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric")  # the first of one_sided has no update
@pytest.mark.parametrize("kind", KINDS)
def test_merged_states_equal_one(kind: str) -> None:
    first, second = new_metric(kind), new_metric(kind)
    for metric, batch in zip((first, second), batches(kind, SEED), strict=True):
        if kind != "one_sided" or metric is second:
            metric.update(*batch)
    first.merge_state(second)
    # Sums in another order.
    torch.testing.assert_close(first.compute(), dict(filled_metrics(SEED, None))[kind], rtol=1e-12, atol=0)


def test_two_processes_equal_one(tmp_path: Path) -> None:
    expected = dict(filled_metrics(SEED, None))
    for got in two_processes.run(two_processes.metrics_of_half, tmp_path, SEED):
        assert got.keys() == expected.keys()
        for name, value in got.items():
            # Sums in another order.
            torch.testing.assert_close(value, expected[name], rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_reset_starts_anew(kind: str) -> None:
    metric, (first, second) = new_metric(kind), batches(kind, SEED)
    metric.update(*first)
    metric.reset()
    metric.update(*second)
    alone = new_metric(kind)
    alone.update(*second)
    assert torch.equal(metric.compute(), alone.compute())


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric")
@pytest.mark.parametrize("metric", [AcceptanceLength(), ForcedAcceptance(2), TermMean()])
def test_before_any_update_there_is_no_number(metric: torch.nn.Module) -> None:
    assert math.isnan(metric.compute())


def test_numbers_and_tensors_are_taken() -> None:
    metric = AcceptanceLength()
    metric.update(30, 10)
    metric.update(torch.tensor([4, 6]), torch.tensor([[5], [5]]))
    assert metric.compute().item() == 2.0


@pytest.mark.parametrize("name", ["acceptance_length", "forced_acceptance", "term_mean"])
def test_examples_in_docstrings(name: str) -> None:
    done = doctest.testmod(importlib.import_module(f"mtp_lightning.metrics.{name}"), extraglobs={"torch": torch})
    assert done.attempted and not done.failed
