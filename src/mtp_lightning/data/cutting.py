# SPDX-License-Identifier: Apache-2.0
"""Cutting: encoded rows -> documents of at most ``max_length`` tokens. Array arithmetic, no tokenizer, no files.

A document is what a row of fields becomes. A plain text that is too long is split into several documents, one after
another; a prompt or chat that is too long loses its end.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

FITS, SPLIT, TRUNCATED, PIECE, SHORT, NO_LOSS, LOSS_CUT, NULL, REFUSED = range(9)
"""Outcome of a row: it fits; it was split (its first piece) or truncated; a further piece of a row that was split; skipped,
because it has fewer than two tokens, no token after the first carries loss or all that do were cut off, its fields are null,
or the chat template refuses it. All from ``SHORT`` on are skipped."""


class Tokens(NamedTuple):
    """Rows as flat arrays."""

    ids: np.ndarray  # token ids of all rows, one after another, [T] int
    loss: np.ndarray  # True where a token carries loss, [T] bool
    lengths: np.ndarray  # tokens of each row, [n] int64
    splittable: np.ndarray  # rows that may be split into pieces, [n] bool


class CutDocuments(NamedTuple):
    """Documents as flat arrays."""

    ids: np.ndarray  # token ids of all documents, one after another, [T] int
    loss: np.ndarray  # True where a token carries loss, [T] bool
    lengths: np.ndarray  # tokens of each document, [m] int64
    rows: np.ndarray  # index of the row that each comes from, [m] int64
    outcomes: np.ndarray  # ``FITS``, ``SPLIT``, .., [m] int8
    tokens_lost: np.ndarray  # tokens of the row that are in no document, counted at its first one, [m] int64
    loss_tokens: np.ndarray  # tokens that carry loss, [m] int64
    eligible_starts: np.ndarray  # tokens whose next token carries loss, [m] int64


def cut_rows(tokens: Tokens, max_length: int) -> CutDocuments:
    """Rows cut into documents, in order; a skipped row stays a document with its outcome, so that it can be counted.

    With max_length 4 a text of 9 tokens gives documents of 4 and 4 and loses one token: alone it predicts nothing.
    """
    lengths = tokens.lengths

    # Which pieces there are. ceil((length - 1) / max_length): a last token alone makes no piece.
    num_pieces = np.where(tokens.splittable, np.maximum(1, -(-(lengths - 1) // max_length)), 1)
    rows = np.repeat(np.arange(len(lengths)), num_pieces)
    piece = np.arange(len(rows)) - np.repeat(np.cumsum(num_pieces) - num_pieces, num_pieces)  # index within its row

    # Their tokens.
    kept = np.minimum(lengths[rows] - piece * max_length, max_length)
    source = (np.cumsum(lengths) - lengths)[rows] + piece * max_length
    first = np.cumsum(kept) - kept
    index = np.arange(kept.sum()) + np.repeat(source - first, kept)
    ids, loss = tokens.ids[index], tokens.loss[index]

    # Counts, as differences of a running sum.
    running = np.concatenate([[0], np.cumsum(loss)])
    loss_tokens = running[first + kept] - running[first]
    eligible_starts = running[first + kept] - running[np.minimum(first + 1, first + kept)]
    covered = np.bincount(rows, kept, minlength=len(lengths)).astype(np.int64)
    tokens_lost = np.where(piece == 0, (lengths - covered)[rows], 0)

    # Outcomes; a later line overrides an earlier one.
    outcomes = np.full(len(rows), FITS, np.int8)
    too_long = lengths[rows] > max_length
    outcomes[too_long] = np.where(tokens.splittable[rows[too_long]], SPLIT, TRUNCATED)
    outcomes[piece > 0] = PIECE
    outcomes[eligible_starts == 0] = NO_LOSS
    whole = np.concatenate([[0], np.cumsum(tokens.loss)])[np.cumsum(lengths)]  # tokens with loss up to each row's end
    is_cut = np.diff(whole, prepend=0)[rows] > loss_tokens
    outcomes[(eligible_starts == 0) & is_cut & ~tokens.splittable[rows]] = LOSS_CUT
    outcomes[kept < 2] = SHORT
    return CutDocuments(ids, loss, kept, rows, outcomes, tokens_lost, loss_tokens, eligible_starts)
