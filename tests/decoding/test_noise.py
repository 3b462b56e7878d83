# SPDX-License-Identifier: Apache-2.0
"""Keyed noise equals the documented formula in Python's integers, and looks like what it should."""

from __future__ import annotations

import math

import pytest
import reference_sampling
import torch

from mtp_lightning.decoding.noise import gumbel_noise, noise_keys, row_seeds, uniform_noise

SEEDS = [0, 1, -1, 2**63 - 1, -(2**63), 123456789]


@pytest.mark.parametrize("stream", [0, 1, 2])
def test_noise_is_the_documented_formula(stream: int) -> None:
    positions = torch.tensor([[1, 2, 77, 2**31]]).expand(len(SEEDS), -1)
    keys = noise_keys(torch.tensor(SEEDS), positions, stream)
    found, kept = gumbel_noise(keys, 40), uniform_noise(keys)
    assert found.dtype == torch.float64 and found.shape == (6, 4, 40)
    for r, seed in enumerate(SEEDS):
        for n, position in enumerate(positions[r].tolist()):
            assert kept[r, n] == reference_sampling.uniform(seed, position, 0, stream)
            expected = torch.tensor(reference_sampling.gumbel(seed, position, 40, stream), dtype=torch.float64)
            # 1e-13: two logarithms, by other libraries.
            torch.testing.assert_close(found[r, n], expected, rtol=1e-13, atol=1e-13)


def test_noise_does_not_depend_on_what_else_is_asked_for() -> None:
    positions = torch.arange(5, 15).expand(3, -1)
    whole = gumbel_noise(noise_keys(torch.tensor([4, 5, 6]), positions, 0), 101)
    part = gumbel_noise(noise_keys(torch.tensor([5]), positions[:1, 3:4], 0), 33)
    assert torch.equal(part[0, 0], whole[1, 3, :33])


def test_noise_is_gumbel_and_uncorrelated() -> None:
    keys = noise_keys(torch.tensor(row_seeds(0, 40)), torch.arange(1, 51).expand(40, -1), 0)
    noise = gumbel_noise(keys, 500)
    normal = (noise - 0.5772156649) / (math.pi / 6**0.5)
    assert abs(normal.mean()) < 5 / noise.numel() ** 0.5  # five standard errors, also below
    for dim in range(3):  # neighbours along rows, positions and tokens
        size = normal.shape[dim] - 1
        pairs = normal.narrow(dim, 0, size) * normal.narrow(dim, 1, size)
        assert abs(pairs.mean()) < 5 / pairs.numel() ** 0.5
    uniform = torch.exp(-torch.exp(-noise)).flatten()
    counts, expected = (uniform * 1000).long().bincount(minlength=1000), noise.numel() / 1000
    assert abs(((counts - expected) ** 2 / expected).sum() - 999) < 5 * (2 * 999) ** 0.5


def test_seeds_of_rows() -> None:
    whole = row_seeds(7, 6)
    assert whole[0] == 7 and len(set(whole)) == 6
    assert row_seeds(7, 2, first=3) == whole[3:5] and row_seeds(7, 1) == [7]
    assert row_seeds([4, 4, 2**64 - 1], 3) == [4, 4, -1]
    assert set(row_seeds(8, 6)).isdisjoint(whole)
    torch.manual_seed(5)
    first = row_seeds(None, 3)
    assert first != row_seeds(None, 3)
    torch.manual_seed(5)
    assert row_seeds(None, 3) == first
