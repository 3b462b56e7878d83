# SPDX-License-Identifier: Apache-2.0
"""Packing documents to rows, and weighted mixes, against numbers written by hand."""

from __future__ import annotations

import numpy as np

from mtp_lightning.data.packing import pack
from mtp_lightning.data.rows import weighted_mix


def packed(lengths: list[int], max_length: int, **options: int) -> list[list[int]]:
    order, offsets = pack(np.array(lengths, int), max_length, **options)
    return [order[begin:end].tolist() for begin, end in zip(offsets[:-1], offsets[1:], strict=True)]


def test_first_fit_decreasing_by_hand() -> None:
    # 5 opens row 0; 4 opens row 1; 3 fits row 1 (4 + 3 = 7); 2 fits row 0 (5 + 2 = 7).
    assert packed([3, 5, 2, 4], 7) == [[1, 2], [0, 3]]
    assert packed([3, 5, 2, 4, 6], 7) == [[4], [1, 2], [0, 3]]
    assert packed([2, 2, 2, 2], 4) == [[0, 1], [2, 3]]
    assert packed([7], 7) == [[0]]
    assert packed([], 7) == []


def test_windows_are_packed_separately() -> None:
    assert packed([3, 5, 2, 4], 7, window=2) == [[1], [0], [2, 3]]


def test_every_document_is_whole_and_in_one_row() -> None:
    lengths = np.random.default_rng(0).integers(2, 101, 3000)
    rows = packed(lengths.tolist(), 100)
    assert sorted(document for row in rows for document in row) == list(range(3000))
    sums = [int(lengths[row].sum()) for row in rows]
    assert max(sums) <= 100 and all(row == sorted(row) for row in rows)
    assert sum(sums) / (100 * len(rows)) > 0.97  # the share that packing fills
    assert packed(lengths.tolist(), 100) == rows


def test_mix_has_the_shares_and_every_document() -> None:
    drawn = weighted_mix([100, 37, 250], [0.5, 0.3, 0.2], seed=1)
    counts = np.bincount(drawn, minlength=387)
    assert counts.min() == 1  # the third source is used once, the others are repeated evenly
    assert [int(part.sum()) for part in np.split(counts, [100, 137])] == [625, 375, 250]
    assert counts[:100].max() - counts[:100].min() == 1 and counts[100:137].max() - counts[100:137].min() == 1
    assert (weighted_mix([100, 37, 250], [5, 3, 2], seed=1) == drawn).all()
    assert (weighted_mix([100, 37, 250], [5, 3, 2], seed=2) != drawn).any()
