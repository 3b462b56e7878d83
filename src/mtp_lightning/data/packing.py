# SPDX-License-Identifier: Apache-2.0
"""Packing: which documents share a row. Works on lengths alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mtp_lightning.modeling.masking import ROW_MULTIPLE, round_up

WINDOW = 1024
"""Documents that are packed together: with lengths spread evenly up to ``max_length`` they fill 97 % of their rows."""


def pack(lengths: np.ndarray, max_length: int, window: int = WINDOW) -> tuple[np.ndarray, np.ndarray]:
    """Rows of whole documents, at most ``max_length`` tokens each: first-fit decreasing within windows of documents.

    ``lengths [3, 5, 2, 4], max_length 7 -> order [1, 2, 0, 3], offsets [0, 2, 4]``: documents 1 and 2, then 0 and 3.

    Returns the documents in the order of the rows, [n] int64, and where each row begins and the last one ends,
    [rows + 1] int64. Documents of a row keep their order.
    """
    order: list[int] = []
    offsets = [0]
    for begin in range(0, len(lengths), window):
        chunk = lengths[begin : begin + window]
        space = np.full(len(chunk), max_length)
        rows: list[list[int]] = [[] for _ in chunk]
        for document in np.argsort(-chunk, kind="stable"):
            row = int(np.argmax(space >= chunk[document]))  # there are as many rows as documents, so one always fits
            space[row] -= chunk[document]
            rows[row].append(begin + int(document))
        for documents in filter(None, rows):
            order += sorted(documents)
            offsets.append(len(order))
    return np.array(order, np.int64), np.array(offsets, np.int64)


def padding_share(batches: Sequence[np.ndarray]) -> float:
    """The share of positions that is padding, from the row lengths of each batch: ``[[32, 16], [32, 32]] -> 0.125``."""
    tokens = sum(int(lengths.sum()) for lengths in batches)
    positions = sum(round_up(int(lengths.max()), ROW_MULTIPLE) * len(lengths) for lengths in batches)
    return 1 - tokens / positions if positions else 0.0
