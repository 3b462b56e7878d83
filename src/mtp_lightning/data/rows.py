# SPDX-License-Identifier: Apache-2.0
"""Rows: the dataset that a loader draws from, each row one document or several packed ones."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset as TorchDataset

from mtp_lightning.data.documents import Documents
from mtp_lightning.types import IGNORE_INDEX, TokenRow

FINGERPRINT_ROWS = 64
"""Rows whose tokens enter the fingerprint, evenly spaced; the lengths of all rows do."""


class Draw(NamedTuple):
    """What a sampler asks for. It carries the epoch, because worker processes have no other way to learn it."""

    row: int  # index of the row
    epoch: int = 0  # the epoch in which it is drawn
    blank: bool = False  # without any loss: gives a rank a batch when there are no rows left for it


class DrawnRow(NamedTuple):
    """A row and the epoch in which it was drawn."""

    row: TokenRow
    epoch: int


class TokenRows(TorchDataset[DrawnRow]):
    """Rows of tokens, with their ``lengths``, [rows] int64, made of encoded documents.

    ``order`` are the documents of all rows, one row after another, [n] int64; ``offsets`` say where each row begins in it
    and the last one ends, [rows + 1] int64; None: one document per row.
    """

    def __init__(self, documents: Documents, order: np.ndarray, offsets: np.ndarray | None = None) -> None:
        self.documents = documents
        self.order = order
        self.offsets = offsets
        lengths = documents.column("length")[order]
        self.lengths = lengths if offsets is None else np.add.reduceat(lengths, offsets[:-1])

    def __len__(self) -> int:
        return len(self.lengths)

    def documents_of(self, index: int) -> np.ndarray:
        """Indices of the documents in a row, [d] int64."""
        if self.offsets is None:
            return self.order[index : index + 1]
        return self.order[self.offsets[index] : self.offsets[index + 1]]

    def row(self, index: int) -> TokenRow:
        """A row; its index is its ``row_id``. Packed documents of different domains give a row without domain."""
        documents = [self.documents.document(int(document)) for document in self.documents_of(index)]
        ids = np.concatenate([ids for ids, _, _ in documents]).astype(np.int64)
        loss = np.concatenate([loss for _, loss, _ in documents])
        domains = {domain for _, _, domain in documents}
        return TokenRow(
            input_ids=torch.from_numpy(ids),
            labels=torch.from_numpy(np.where(loss, ids, IGNORE_INDEX)),
            document_ids=torch.from_numpy(np.repeat(np.arange(len(documents)), [len(ids) for ids, _, _ in documents])),
            row_id=index,
            domain=domains.pop() if len(domains) == 1 else "",
        )

    def __getitem__(self, draw: Draw) -> DrawnRow:
        row = self.row(draw.row)
        if draw.blank:
            row = row._replace(labels=torch.full_like(row.labels, IGNORE_INDEX))
        return DrawnRow(row, draw.epoch)


def fingerprint(rows: TokenRows) -> str:
    """Number of rows and tokens, and a hash: equal in every process that read the same data."""
    digest = hashlib.sha256(np.asarray(rows.lengths, np.int64).tobytes())
    for index in np.unique(np.linspace(0, len(rows) - 1, FINGERPRINT_ROWS).astype(np.int64)):
        row = rows.row(int(index))
        digest.update(row.input_ids.numpy().tobytes())
        digest.update(row.labels.numpy().tobytes())
    return f"{len(rows)} rows, {int(np.sum(rows.lengths))} tokens, hash {digest.hexdigest()[:12]}"


def weighted_mix(sizes: Sequence[int], weights: Sequence[float], seed: int) -> np.ndarray:
    """Indices of the items of a weighted mix that holds every item at least once, [n] int64, source after source.

    ``sizes`` are the items of each source, numbered source after source; ``weights`` may have any sum. Sources with fewer
    items than their share are repeated, whole copies first and then a seeded draw.

    ``sizes [2, 3], weights [1, 1] -> [0, 1, x, 2, 3, 4]`` with x one of 0 and 1.
    """
    shares = np.asarray(weights, float) / sum(weights)
    counts = np.round(shares * (np.asarray(sizes) / shares).max()).astype(np.int64)
    firsts = np.cumsum(sizes) - sizes
    drawn = []
    for source, (first, size, count) in enumerate(zip(firsts, sizes, counts, strict=True)):
        rest = np.sort(np.random.default_rng([seed, source]).permutation(size)[: count % size])
        drawn.append(first + np.concatenate([np.tile(np.arange(size), count // size), rest]))
    return np.concatenate(drawn).astype(np.int64)
