# SPDX-License-Identifier: Apache-2.0
"""Acceptance rates by the head's probability: learned from what was accepted, with optimism where little was seen."""

from __future__ import annotations

import numpy as np
import pytest

from mtp_lightning.decoding.planning import draft_stats
from mtp_lightning.decoding.planning.draft_stats import DraftStats


def test_rates_are_raised_by_half_a_standard_error() -> None:
    stats, head_prob, differences = DraftStats(4), 0.525, []
    for count in (0, 50, 500):
        for i in range(count):
            stats.learn([head_prob], i % 2, 1)
        verified = stats._verified[10]
        rate = stats._accepted[10] / verified
        differences.append(float(stats.accept_prob(np.array([head_prob]))[0]) - rate)
        assert differences[-1] == pytest.approx(0.5 * np.sqrt(rate * (1 - rate) / verified))
    assert differences[0] > 0.08 > 0.04 > differences[1] > 0.02 > differences[2] > 0


def test_the_heads_probabilities_are_corrected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draft_stats, "OPTIMISM_STDERR", 0.0)
    stats, generator = DraftStats(4), np.random.default_rng(0)
    np.testing.assert_allclose(stats.accept_prob(np.array([0.1, 0.5, 0.9])), [0.1, 0.5, 0.9], atol=0.03)
    for _ in range(4000):
        probability = float(generator.uniform())
        stats.learn([probability], int(generator.uniform() < probability**2), 1)
    # Bins contain a hundred draws or so.
    np.testing.assert_allclose(stats.accept_prob(np.array([0.2, 0.5, 0.8])), [0.04, 0.25, 0.64], atol=0.12)
    assert (np.diff(stats.accept_prob(np.linspace(0, 1, 50))) > -0.2).all()
