# SPDX-License-Identifier: Apache-2.0
"""A fingerprint of token rows, by which processes see whether they read the same data."""

from __future__ import annotations

import hashlib

import numpy as np

from mtp_lightning.data.rows import TokenRows

LOOKED_AT = 64
"""Rows whose tokens are looked at, evenly spaced; the lengths of all rows are."""


def fingerprint(rows: TokenRows) -> str:
    """Number of rows, number of tokens, and a hash of all lengths and of some rows' tokens and labels.

    Args:
        rows: the rows.

    Returns:
        A short text, the same in every process that read the same.
    """
    digest = hashlib.sha256(np.asarray(rows.lengths, np.int64).tobytes())
    for index in np.unique(np.linspace(0, len(rows) - 1, LOOKED_AT).astype(np.int64)):
        row = rows.row(int(index))
        digest.update(row.input_ids.numpy().tobytes())
        digest.update(row.labels.numpy().tobytes())
    return f"{len(rows)} rows, {int(np.sum(rows.lengths))} tokens, hash {digest.hexdigest()[:12]}"
