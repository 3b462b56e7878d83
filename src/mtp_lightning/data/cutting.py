# SPDX-License-Identifier: Apache-2.0
"""Cutting: encoded rows -> documents of at most ``max_length`` tokens. Array arithmetic, no tokenizer, no files.

A document is what a row of fields became. A plain text that is too long becomes several documents, one after another;
the end of a prompt or chat that is too long is dropped.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

FITS, CUT, TRUNCATED, PIECE, SHORT, NO_LOSS = range(6)
"""What became of a row: it fits; it was cut (its first piece) or truncated; a further piece of a row that was cut; left
out, because it has fewer than two tokens, or because no token after the first carries loss."""


class Tokens(NamedTuple):
    """Rows as flat arrays.

    Attributes:
        ids: token ids of all rows, one after another, [T] int.
        loss: which carry loss, [T] bool.
        lengths: tokens of each row, [n] int64.
        cuttable: which rows may be cut into pieces, [n] bool.
    """

    ids: np.ndarray
    loss: np.ndarray
    lengths: np.ndarray
    cuttable: np.ndarray


class Documents(NamedTuple):
    """Documents as flat arrays.

    Attributes:
        ids: token ids of all documents, one after another, [T] int.
        loss: which carry loss, [T] bool.
        lengths: tokens of each document, [m] int64.
        rows: number of the row that each comes from, [m] int64.
        outcomes: ``FITS``, ``CUT``, .., [m] int8.
        lost: tokens of the row that are in no document, counted at its first one, [m] int64.
        carried: tokens that carry loss, [m] int64.
        starts: tokens after the first that carry loss: each makes the token before it an eligible start, [m] int64.
    """

    ids: np.ndarray
    loss: np.ndarray
    lengths: np.ndarray
    rows: np.ndarray
    outcomes: np.ndarray
    lost: np.ndarray
    carried: np.ndarray
    starts: np.ndarray


def cut_rows(tokens: Tokens, max_length: int) -> Documents:
    """Rows cut to documents; a row that is left out stays as a document with its outcome, so that it can be counted.

    With max_length 4 a text of 9 tokens gives documents of 4 and 4, and loses one token: alone it predicts nothing.

    Args:
        tokens: the rows.
        max_length: most tokens in a document, 2 or more.

    Returns:
        The documents, in the order of the rows.
    """
    lengths, M = tokens.lengths, max_length
    # ceil((length - 1) / M): a tail of one token makes no piece.
    pieces = np.where(tokens.cuttable, np.maximum(1, -(-(lengths - 1) // M)), 1)
    rows = np.repeat(np.arange(len(lengths)), pieces)
    number = np.arange(len(rows)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    kept = np.minimum(lengths[rows] - number * M, M)
    begins = (np.cumsum(lengths) - lengths)[rows] + number * M
    first = np.cumsum(kept) - kept
    index = np.arange(kept.sum()) + np.repeat(begins - first, kept)
    ids, loss = tokens.ids[index], tokens.loss[index]

    counted = np.concatenate([[0], np.cumsum(loss)])
    total = counted[first + kept] - counted[first]
    starts = counted[first + kept] - counted[np.minimum(first + 1, first + kept)]
    outcomes = np.full(len(rows), FITS, np.int8)
    longer = lengths[rows] > M
    outcomes[longer] = np.where(tokens.cuttable[rows[longer]], CUT, TRUNCATED)
    outcomes[number > 0] = PIECE
    outcomes[starts == 0] = NO_LOSS
    outcomes[kept < 2] = SHORT
    covered = np.bincount(rows, kept, minlength=len(lengths)).astype(np.int64)
    lost = np.where(number == 0, (lengths - covered)[rows], 0)
    return Documents(ids, loss, kept, rows, outcomes, lost, total, starts)
