# SPDX-License-Identifier: Apache-2.0
"""The values of drafts are those of the best of all fixed policies, found by trying every one."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from mtp_lightning.decoding.planning.draft_values import WARMUP_SWEEPS, DraftValues

SIZES = (0, 1, 2)
RNG = np.random.default_rng(0)
CASES = [(RNG.uniform(0.1, 0.99, 2), RNG.uniform(0.1, 1.0, 3)) for _ in range(3)]


def plan_seconds(costs: np.ndarray, num_placements: int) -> np.ndarray:
    """What plans take: a plain step 1, more for drafts, masks and blocks."""
    c, m = np.array(SIZES)[:, None, None], np.array(SIZES)[None, :, None]
    blocks = np.stack([np.ones(3), 1 + (np.arange(3) > 0), 1 + np.arange(3)], axis=1)[:, None, :num_placements]
    return 1 + costs[0] * c + costs[1] * m + 0.2 * costs[2] * blocks * m


def policy_rate(plans: dict[int, tuple[int, int, int]], accept_prob: np.ndarray, seconds: np.ndarray) -> float:
    """Tokens a second of a policy: the stationary distribution of the states, by powers of its transitions."""
    transitions, tokens, times = np.zeros((3, 3)), np.zeros(3), np.zeros(3)
    path_prob = [1.0, accept_prob[0], accept_prob[0] * accept_prob[1]]
    for state, (c, m, where) in plans.items():
        times[state] = seconds[c, m, where]
        for a in range(c + 1):
            probability = path_prob[a] - (path_prob[a + 1] if a < c else 0.0)
            tokens[state] += probability * (1 + a)
            has_block = (a == c) if where == 0 else (a in (0, c)) if where == 1 else True
            transitions[state, m if has_block else 0] += probability
    stationary = np.linalg.matrix_power(0.5 * transitions + 0.5 * np.eye(3), 4096)[0]
    return float(stationary @ tokens / (stationary @ times))


def best_rate(accept_prob: np.ndarray, seconds: np.ndarray) -> float:
    placements = range(seconds.shape[2])
    options = [[(c, m, where) for c in range(state + 1) for m in range(3) for where in placements] for state in range(3)]
    return max(policy_rate(dict(enumerate(plans)), accept_prob, seconds) for plans in itertools.product(*options))


@pytest.mark.parametrize(("case", "num_placements"), [(0, 1), (1, 1), (2, 1), (0, 3), (1, 3)])
def test_the_rate_is_that_of_the_best_policy(case: int, num_placements: int) -> None:
    accept_prob, costs = CASES[case]
    seconds = plan_seconds(0.3 * costs, num_placements)
    best, values = best_rate(accept_prob, seconds), DraftValues(SIZES)
    values.sweep(accept_prob, seconds, WARMUP_SWEEPS)
    assert values.rate == pytest.approx(best, rel=0.02)
    values.sweep(accept_prob, seconds, 1000)
    assert values.rate == pytest.approx(best, rel=1e-6)
    assert values.draft_value[0] == 0 and (np.diff(values.draft_value) >= 0).all()


def test_values_do_not_oscillate_where_the_best_policy_alternates() -> None:
    """Drafting and verifying in one step is expensive here."""
    accept_prob, seconds = np.array([0.95, 0.95]), plan_seconds(np.array([0.02, 0.2, 0.0]), 1)
    seconds[1:, 1:] += 1.0
    best = best_rate(accept_prob, seconds)
    assert best == pytest.approx(policy_rate({0: (0, 2, 0), 1: (1, 0, 0), 2: (2, 0, 0)}, accept_prob, seconds))
    values = DraftValues(SIZES)
    values.sweep(accept_prob, seconds, WARMUP_SWEEPS)
    for sweeps in (1, 1, 2, 3):
        values.sweep(accept_prob, seconds, sweeps)
        assert values.rate == pytest.approx(best, rel=0.01)
