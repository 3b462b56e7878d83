# SPDX-License-Identifier: Apache-2.0
"""The values of waiting drafts are those of the best of all fixed policies, found by trying every one."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from mtp_lightning.decoding.planning.draft_values import SETTLE, DraftValues, availability

SIZES = (0, 1, 2)
RNG = np.random.default_rng(0)
CASES = [(RNG.uniform(0.1, 0.99, 2), RNG.uniform(0.1, 1.0, 3)) for _ in range(6)]


def seconds_of(costs: np.ndarray, places: int) -> np.ndarray:
    """What plans take: a plain step 1, more for drafts, masks and blocks."""
    c, m = np.array(SIZES)[:, None, None], np.array(SIZES)[None, :, None]
    blocks = np.stack([np.ones(3), 1 + (np.arange(3) > 0), 1 + np.arange(3)], axis=1)[:, None, :places]
    return 1 + costs[0] * c + costs[1] * m + 0.2 * costs[2] * blocks * m


def policy_rate(plans: dict[int, tuple[int, int, int]], chances: np.ndarray, seconds: np.ndarray) -> float:
    """Tokens a second of a policy: the stationary shares of the states, by powers of its transitions."""
    moves, tokens, times = np.zeros((3, 3)), np.zeros(3), np.zeros(3)
    reached = [1.0, chances[0], chances[0] * chances[1]]
    for state, (c, m, place) in plans.items():
        times[state] = seconds[c, m, place]
        for a in range(c + 1):
            probability = reached[a] - (reached[a + 1] if a < c else 0.0)
            tokens[state] += probability * (1 + a)
            block = (a == c) if place == 0 else (a in (0, c)) if place == 1 else True
            moves[state, m if block else 0] += probability
    shares = np.linalg.matrix_power(0.5 * moves + 0.5 * np.eye(3), 4096)[0]
    return float(shares @ tokens / (shares @ times))


@pytest.mark.parametrize("places", [1, 3])
@pytest.mark.parametrize("case", range(len(CASES)))
def test_the_rate_is_the_best_policys(case: int, places: int) -> None:
    chances, costs = CASES[case]
    seconds = seconds_of(0.3 * costs, places)
    options = [[(c, m, place) for c in range(state + 1) for m in range(3) for place in range(places)] for state in range(3)]
    best = max(policy_rate(dict(enumerate(plans)), chances, seconds) for plans in itertools.product(*options))
    values = DraftValues(SIZES)
    values.sweep(chances, seconds, SETTLE)
    assert values.rate == pytest.approx(best, rel=0.02)
    values.sweep(chances, seconds, 1000)
    assert values.rate == pytest.approx(best, rel=1e-6)
    assert values.worth[0] == 0 and (np.diff(values.worth) >= 0).all()


def test_values_settle_where_steps_that_draft_and_steps_that_verify_take_turns() -> None:
    """Doing both in one step is dear, so the best policy alternates; values must not."""
    chances, seconds = np.array([0.95, 0.95]), seconds_of(np.array([0.02, 0.2, 0.0]), 1)
    seconds[1:, 1:] += 1.0
    best = max(
        policy_rate(dict(enumerate(plans)), chances, seconds)
        for plans in itertools.product(*[[(c, m, 0) for c in range(n + 1) for m in range(3)] for n in range(3)])
    )
    alternating = policy_rate({0: (0, 2, 0), 1: (1, 0, 0), 2: (2, 0, 0)}, chances, seconds)
    assert best == pytest.approx(alternating)
    values = DraftValues(SIZES)
    values.sweep(chances, seconds, SETTLE)
    for sweeps in (1, 1, 2, 3):
        values.sweep(chances, seconds, sweeps)
        assert values.rate == pytest.approx(best, rel=0.01)


def test_where_drafts_never_pay_the_rate_is_that_of_plain_steps() -> None:
    values = DraftValues(SIZES)
    values.sweep(np.array([0.05, 0.05]), seconds_of(np.ones(3), 3) * 0.5, 1000)
    assert values.rate == pytest.approx(2.0)


def test_availability() -> None:
    reached, whole = np.array([1.0, 0.5, 0.0]), np.array([1.0, 0.5, 0.5])
    np.testing.assert_allclose(availability(reached, whole, 0.5, 3), [[1.0, 1.0, 1.0], [0.5, 1.0, 1.0], [0.5, 0.5, 1.0]])
    np.testing.assert_allclose(availability(reached, whole, 0.5, 1), whole[:, None])
