# SPDX-License-Identifier: Apache-2.0
"""Documents: whole data sets of rows, encoded, cut to length and kept in the ``datasets`` cache."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mtp_lightning.data import chat, cutting, encoding
from mtp_lightning.data.cache import cache_errors, cache_folder
from mtp_lightning.data.cutting import Documents, Tokens, cut_rows
from mtp_lightning.data.encoding import encode_row, label_message
from mtp_lightning.data.reading import row_kind
from mtp_lightning.errors import RunError, one_line
from mtp_lightning.types import IGNORE_INDEX

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

_PARALLEL_FROM = 20_000
"""Rows from which on several processes are worth their start."""


def encode_rows(
    rows: Dataset,
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    chat_template: str | None = None,
    workers: int = 0,
) -> Dataset:
    """The documents of a data set of rows, from the cache if they were made before.

    The cache's key is the rows, the tokenizer, the template, ``max_length`` and the code that encodes.

    Args:
        rows: rows of fields.
        name: where they come from, for messages.
        tokenizer: the base's tokenizer.
        max_length: most tokens in a document.
        chat_template: text of a chat template, or None for the base's own.
        workers: processes that encode a large data set.

    Returns:
        A data set with a document a row: ``input_ids``, ``loss``, ``domain``, and the numbers of ``Documents``.

    Raises:
        RunError: a row cannot be encoded; the message names it.
    """
    tokenized = row_kind(set(rows.column_names)) == "input_ids"
    key = _digest(rows._fingerprint, tokenizer_digest(tokenizer), chat_template, max_length, _code_digest())
    folder = cache_folder() / "mtp_lightning"
    try:
        with cache_errors():
            folder.mkdir(parents=True, exist_ok=True)
            return rows.with_format("arrow" if tokenized else None).map(
                _encode_table if tokenized else encode_fields,
                batched=True,
                with_indices=True,
                remove_columns=rows.column_names,
                fn_kwargs={"name": name, "tokenizer": tokenizer, "max_length": max_length, "chat_template": chat_template},
                num_proc=workers if workers > 1 and len(rows) >= _PARALLEL_FROM else None,
                load_from_cache_file=True,
                cache_file_name=str(folder / f"{key}.arrow"),
                new_fingerprint=key,
                desc=f"Encoding {name}",
            )
    except UnicodeDecodeError as error:
        raise RunError(f"{name}, row {_undecodable(rows) + 1}: expected UTF-8 text, {one_line(error)}.") from error


def _undecodable(rows: Dataset) -> int:
    """Number of the first row that is no UTF-8: JSON and Parquet files are read without a look at their bytes."""
    for number in range(len(rows)):
        try:
            rows[number]
        except UnicodeDecodeError:
            return number
    raise AssertionError("one of the rows was not decoded before")


def encode_fields(
    batch: dict[str, list[Any]],
    indices: Sequence[int],
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    chat_template: str | None,
) -> pa.Table:
    """The documents of some rows of fields.

    Args:
        batch: field -> its value in each row.
        indices: numbers of the rows, for messages and for the column ``row``.
        name: where they come from, for messages.
        tokenizer: the base's tokenizer.
        max_length: most tokens in a document.
        chat_template: text of a chat template, or None for the base's own.

    Returns:
        A table with a document a row, as ``encode_rows`` says.

    Raises:
        RunError: a row cannot be encoded; the message names it.
    """
    encoded = []
    for place, number in enumerate(indices):
        try:
            encoded.append(encode_row({field: values[place] for field, values in batch.items()}, tokenizer, chat_template))
        except RunError as error:
            raise RunError(f"{name}, row {number + 1}: {error}") from error
    lengths = np.array([len(row.input_ids) for row in encoded], np.int64)
    tokens = Tokens(
        ids=np.fromiter((token for row in encoded for token in row.input_ids), np.int64, lengths.sum()),
        loss=np.fromiter((flag for row in encoded for flag in row.loss), bool, lengths.sum()),
        lengths=lengths,
        cuttable=np.array([row.cuttable for row in encoded], bool),
    )
    _check_ids(tokens, indices, name, len(tokenizer))
    return _table(cut_rows(tokens, max_length), indices, name, batch.get("domain"))


def _encode_table(
    batch: pa.Table,
    indices: Sequence[int],
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    chat_template: str | None,
) -> pa.Table:
    """The same for rows that are tokens already, without a Python object a token."""
    lengths, ids = _flat(batch, "input_ids", indices, name)
    labelled = "labels" in batch.column_names and batch["labels"].null_count < len(batch)
    loss = np.ones(len(ids), bool)
    if labelled:
        label_lengths, labels = _flat(batch, "labels", indices, name)
        _refuse(label_lengths != lengths, indices, name, "labels must be as long as input_ids.")
        wrong = np.flatnonzero((labels != ids) & (labels != IGNORE_INDEX))
        if len(wrong):
            row = int(np.searchsorted(np.cumsum(lengths), wrong[0], side="right"))
            position = int(wrong[0] - lengths[:row].sum())
            message = label_message(position, int(ids[wrong[0]]), int(labels[wrong[0]]))
            raise RunError(f"{name}, row {indices[row] + 1}: {message}")
        loss = labels != IGNORE_INDEX
    tokens = Tokens(ids, loss, lengths, np.full(len(lengths), not labelled))
    _check_ids(tokens, indices, name, len(tokenizer))
    return _table(
        cut_rows(tokens, max_length), indices, name, batch["domain"].to_pylist() if "domain" in batch.column_names else None
    )


def _flat(batch: pa.Table, field: str, indices: Sequence[int], name: str) -> tuple[np.ndarray, np.ndarray]:
    import pyarrow as pa

    column = batch[field].combine_chunks()
    column = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    _refuse(
        column.is_null().to_numpy(zero_copy_only=False),
        indices,
        name,
        f"expected a list of token ids in {field}, got nothing.",
    )
    try:
        column = column.cast(pa.large_list(pa.int64()))
        lengths = column.value_lengths().to_numpy(zero_copy_only=False).astype(np.int64)
        return lengths, column.flatten().to_numpy(zero_copy_only=False).astype(np.int64)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, ValueError) as error:
        raise RunError(f"{name}: {field} must be lists of token ids, got {batch[field].type}.") from error


def _refuse(wrong: np.ndarray, indices: Sequence[int], name: str, message: str) -> None:
    if wrong.any():
        raise RunError(f"{name}, row {indices[int(wrong.argmax())] + 1}: {message}")


def _check_ids(tokens: Tokens, indices: Sequence[int], name: str, vocabulary: int) -> None:
    wrong = np.flatnonzero((tokens.ids < 0) | (tokens.ids >= vocabulary))
    if len(wrong):
        row = int(np.searchsorted(np.cumsum(tokens.lengths), wrong[0], side="right"))
        raise RunError(
            f"{name}, row {indices[row] + 1}: expected token ids from 0 to {vocabulary - 1}, the base's vocabulary, got"
            f" {tokens.ids[wrong[0]]}. The rows were encoded with another tokenizer."
        )


def _table(documents: Documents, indices: Sequence[int], name: str, domains: list[Any] | None) -> pa.Table:
    import pyarrow as pa

    for row, domain in zip(indices, domains or [], strict=False):
        if not isinstance(domain, str | None):
            raise RunError(f"{name}, row {row + 1}: domain must be text, got {type(domain).__name__}.")
    offsets = np.concatenate([[0], np.cumsum(documents.lengths)]).astype(np.int32)
    named = [""] * len(documents.rows) if domains is None else [domains[row] or "" for row in documents.rows]
    return pa.table(
        {
            "input_ids": pa.ListArray.from_arrays(offsets, pa.array(documents.ids.astype(np.int32))),
            "loss": pa.ListArray.from_arrays(offsets, pa.array(documents.loss)),
            "domain": pa.array(named, pa.string()),
            "row": np.asarray(indices, np.int64)[documents.rows],
            "outcome": documents.outcomes,
            "lost": documents.lost,
            "length": documents.lengths,
            "carried": documents.carried,
            "starts": documents.starts,
        }
    )


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """A digest of all that decides how a tokenizer encodes; equal for equal tokenizers, wherever they lie.

    Args:
        tokenizer: the base's tokenizer.

    Returns:
        Hexadecimal digits.
    """
    if tokenizer.is_fast:
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        state.pop("truncation", None)  # what the last call left behind
        state.pop("padding", None)
    else:
        state = sorted(tokenizer.get_vocab().items())
    return _digest(type(tokenizer).__name__, state, tokenizer.special_tokens_map, tokenizer.chat_template)


def _code_digest() -> str:
    """A digest of the code that encodes, so that a change of it never meets documents made before the change."""
    return _digest(
        *(
            Path(str(file)).read_text(encoding="utf-8")
            for file in (encoding.__file__, chat.__file__, cutting.__file__, __file__)
        )
    )


def _digest(*values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:32]
