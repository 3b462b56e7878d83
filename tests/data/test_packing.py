# SPDX-License-Identifier: Apache-2.0
"""Cutting to documents, packing documents to rows, and weighted mixes, against numbers written by hand."""

from __future__ import annotations

import numpy as np
import pytest

from mtp_lightning.data.cutting import FITS, NO_LOSS, PIECE, SHORT, SPLIT, TRUNCATED, Tokens, cut_rows
from mtp_lightning.data.packing import pack, padding_share
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


def test_padding_share() -> None:
    assert padding_share([np.array([3, 1]), np.array([2, 2])]) == pytest.approx(0.2)  # 8 tokens at 10 positions
    assert padding_share([np.array([5])]) == 0
    assert padding_share([]) == 0


def cut(rows: list[list[int]], loss: list[list[bool]] | None, splittable: list[bool], max_length: int):
    loss = loss or [[True] * len(row) for row in rows]
    return cut_rows(
        Tokens(
            np.array([token for row in rows for token in row], int),
            np.array([flag for row in loss for flag in row], bool),
            np.array([len(row) for row in rows], int),
            np.array(splittable, bool),
        ),
        max_length,
    )


def test_text_is_cut_into_pieces() -> None:
    rows = [list(range(10, 14)), list(range(20, 29)), list(range(30, 36)), [40], []]
    documents = cut(rows, None, [True] * 5, 4)
    assert documents.ids.tolist() == [10, 11, 12, 13, 20, 21, 22, 23, 24, 25, 26, 27, 30, 31, 32, 33, 34, 35, 40]
    assert documents.lengths.tolist() == [4, 4, 4, 4, 2, 1, 0]
    assert documents.rows.tolist() == [0, 1, 1, 2, 2, 3, 4]
    assert documents.outcomes.tolist() == [FITS, SPLIT, PIECE, SPLIT, PIECE, SHORT, SHORT]
    assert documents.tokens_lost.tolist() == [0, 1, 0, 0, 0, 0, 0]  # 28 alone would predict nothing
    assert documents.eligible_starts.tolist() == [3, 3, 3, 3, 1, 0, 0]
    assert documents.loss_tokens.tolist() == [4, 4, 4, 4, 2, 1, 0]


def test_the_end_of_other_rows_is_dropped() -> None:
    yes, no = True, False
    rows = [[10, 11, 12, 13, 14, 15], [20, 21, 22, 23, 24, 25], [30, 31, 32], [40, 41]]
    loss = [[no, no, yes, yes, yes, yes], [no, no, no, no, yes, yes], [yes, no, no], [no, yes]]
    documents = cut(rows, loss, [False] * 4, 4)
    assert documents.ids.tolist() == [10, 11, 12, 13, 20, 21, 22, 23, 30, 31, 32, 40, 41]
    assert documents.loss.tolist() == [no, no, yes, yes, no, no, no, no, yes, no, no, no, yes]
    # The second row's answer is past the end; in the third only the first token carries loss, and nothing predicts it.
    assert documents.outcomes.tolist() == [TRUNCATED, NO_LOSS, NO_LOSS, FITS]
    assert documents.tokens_lost.tolist() == [2, 2, 0, 0]
    assert documents.eligible_starts.tolist() == [2, 0, 0, 1]


def test_mix_has_the_shares_and_every_document() -> None:
    drawn = weighted_mix([100, 37, 250], [0.5, 0.3, 0.2], seed=1)
    counts = np.bincount(drawn, minlength=387)
    assert counts.min() == 1  # the third source is used once, the others are repeated evenly
    assert [int(part.sum()) for part in np.split(counts, [100, 137])] == [625, 375, 250]
    assert counts[:100].max() - counts[:100].min() == 1 and counts[100:137].max() - counts[100:137].min() == 1
    assert (weighted_mix([100, 37, 250], [5, 3, 2], seed=1) == drawn).all()
    assert (weighted_mix([100, 37, 250], [5, 3, 2], seed=2) != drawn).any()
