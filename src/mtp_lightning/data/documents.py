# SPDX-License-Identifier: Apache-2.0
"""Documents: datasets of rows, encoded, cut to length and kept in the ``datasets`` cache."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import numpy as np

from mtp_lightning.data import chat, cutting, encoding
from mtp_lightning.data.cache import cache_errors, cache_folder
from mtp_lightning.data.cutting import Tokens, cut_rows
from mtp_lightning.data.encoding import encode_row, wrong_label
from mtp_lightning.data.reading import row_type
from mtp_lightning.errors import RunError, one_line
from mtp_lightning.types import IGNORE_INDEX

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

_PARALLEL_FROM = 20_000
"""Rows from which on several processes are worth starting."""


class Encoder(NamedTuple):
    """How rows become documents."""

    tokenizer: PreTrainedTokenizerBase  # the base's tokenizer
    max_length: int  # maximum tokens in a document
    chat_template: str | None = None  # source of a chat template, or None for the base's own


def encode_dataset(rows: Dataset, source: str, encoder: Encoder, workers: int = 0) -> Dataset:
    """The documents of a dataset of rows, from the cache if they were encoded before.

    The result has one document per row: ``input_ids``, ``loss``, ``domain``, ``row`` and the counts of ``Documents``. The
    cache key is the rows, the tokenizer, the template, ``max_length`` and the code that encodes. Raises a
    RunError that names the source and the row if a row cannot be encoded.
    """
    tokenizer, max_length, chat_template = encoder
    is_tokenized = row_type(set(rows.column_names)) == "input_ids"
    encode: Callable[..., pa.Table] = _encode_token_batch if is_tokenized else encode_batch
    key = _digest(rows._fingerprint, tokenizer_digest(tokenizer), chat_template, max_length, _code_digest())
    folder = cache_folder() / "mtp_lightning"
    try:
        with cache_errors():
            folder.mkdir(parents=True, exist_ok=True)
            return rows.with_format("arrow" if is_tokenized else None).map(
                encode,
                batched=True,
                with_indices=True,
                remove_columns=rows.column_names,
                fn_kwargs={"source": source, "encoder": encoder},
                num_proc=workers if workers > 1 and len(rows) >= _PARALLEL_FROM else None,
                load_from_cache_file=True,
                cache_file_name=str(folder / f"{key}.arrow"),
                new_fingerprint=key,
                desc=f"Encoding {source}",
            )
    except UnicodeDecodeError as error:
        _fail(source, _first_undecodable(rows), f"expected UTF-8 text, {one_line(error)}.", error)


def encode_batch(batch: dict[str, list[Any]], indices: Sequence[int], source: str, encoder: Encoder) -> pa.Table:
    """The documents of some rows, given as field -> values and their indices in the source, as in ``encode_dataset``."""
    encoded = []
    for place, index in enumerate(indices):
        row = {field: values[place] for field, values in batch.items()}
        try:
            encoded.append(encode_row(row, encoder.tokenizer, encoder.chat_template))
        except RunError as error:
            _fail(source, index, str(error), error)
    lengths = np.array([len(row.input_ids) for row in encoded], np.int64)
    tokens = Tokens(
        ids=np.fromiter((token for row in encoded for token in row.input_ids), np.int64, lengths.sum()),
        loss=np.fromiter((flag for row in encoded for flag in row.loss), bool, lengths.sum()),
        lengths=lengths,
        splittable=np.array([row.splittable for row in encoded], bool),
    )
    return _document_table(tokens, indices, source, encoder, batch.get("domain"))


def _encode_token_batch(batch: pa.Table, indices: Sequence[int], source: str, encoder: Encoder) -> pa.Table:
    """``encode_batch`` for rows that are tokens already, without a Python object per token."""
    lengths, ids = _flatten(batch, "input_ids", indices, source)
    loss = np.ones(len(ids), bool)
    has_labels = "labels" in batch.column_names and batch["labels"].null_count < len(batch)
    if has_labels:
        label_lengths, labels = _flatten(batch, "labels", indices, source)
        unequal = np.flatnonzero(label_lengths != lengths)
        if len(unequal):
            _fail(source, indices[unequal[0]], "labels must be as long as input_ids.")
        wrong = np.flatnonzero((labels != ids) & (labels != IGNORE_INDEX))
        if len(wrong):
            row = _row_of(wrong[0], lengths)
            position = int(wrong[0] - lengths[:row].sum())
            _fail(source, indices[row], wrong_label(position, int(ids[wrong[0]]), int(labels[wrong[0]])))
        loss = labels != IGNORE_INDEX
    tokens = Tokens(ids, loss, lengths, np.full(len(lengths), not has_labels))
    domains = batch["domain"].to_pylist() if "domain" in batch.column_names else None
    return _document_table(tokens, indices, source, encoder, domains)


def _flatten(batch: pa.Table, field: str, indices: Sequence[int], source: str) -> tuple[np.ndarray, np.ndarray]:
    """Lengths of the lists in a column, and their values one after another."""
    import pyarrow as pa

    lists = batch[field].combine_chunks()
    lists = lists.combine_chunks() if isinstance(lists, pa.ChunkedArray) else lists
    missing = np.flatnonzero(lists.is_null().to_numpy(zero_copy_only=False))
    if len(missing):
        _fail(source, indices[missing[0]], f"expected a list of token ids in {field}, got nothing.")
    try:
        lists = lists.cast(pa.large_list(pa.int64()))
        lengths = lists.value_lengths().to_numpy(zero_copy_only=False).astype(np.int64)
        return lengths, lists.flatten().to_numpy(zero_copy_only=False).astype(np.int64)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, ValueError) as error:
        raise RunError(f"{source}: {field} must be lists of token ids, got {batch[field].type}.") from error


def _document_table(
    tokens: Tokens, indices: Sequence[int], source: str, encoder: Encoder, domains: list[Any] | None
) -> pa.Table:
    """Check ids and domains, and cut the rows into documents."""
    import pyarrow as pa

    vocab_size = len(encoder.tokenizer)
    outside = np.flatnonzero((tokens.ids < 0) | (tokens.ids >= vocab_size))
    if len(outside):
        _fail(
            source,
            indices[_row_of(outside[0], tokens.lengths)],
            f"expected token ids from 0 to {vocab_size - 1}, the base's vocabulary, got {tokens.ids[outside[0]]}."
            " The rows were encoded with another tokenizer.",
        )
    for index, domain in zip(indices, domains or [], strict=False):
        if not isinstance(domain, str | None):
            _fail(source, index, f"domain must be text, got {type(domain).__name__}.")
    documents = cut_rows(tokens, encoder.max_length)
    offsets = np.concatenate([[0], np.cumsum(documents.lengths)]).astype(np.int32)
    domain_of = [""] * len(documents.rows) if domains is None else [domains[row] or "" for row in documents.rows]
    return pa.table(
        {
            "input_ids": pa.ListArray.from_arrays(offsets, pa.array(documents.ids.astype(np.int32))),
            "loss": pa.ListArray.from_arrays(offsets, pa.array(documents.loss)),
            "domain": pa.array(domain_of, pa.string()),
            "row": np.asarray(indices, np.int64)[documents.rows],
            "outcome": documents.outcomes,
            "length": documents.lengths,
            "tokens_lost": documents.tokens_lost,
            "loss_tokens": documents.loss_tokens,
            "eligible_starts": documents.eligible_starts,
        }
    )


def _row_of(token: int, lengths: np.ndarray) -> int:
    """The row that holds a token of the flat array."""
    return int(np.searchsorted(np.cumsum(lengths), token, side="right"))


def _fail(source: str, index: int, message: str, cause: Exception | None = None) -> NoReturn:
    raise RunError(f"{source}, row {index + 1}: {message}") from cause


def _first_undecodable(rows: Dataset) -> int:
    """Index of the first row that is not UTF-8: JSON and Parquet files are read without checking their bytes."""
    for index in range(len(rows)):
        try:
            rows[index]
        except UnicodeDecodeError:
            return index
    raise AssertionError("one of the rows could not be decoded before")


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """A digest of everything that decides how a tokenizer encodes; equal for equal tokenizers, wherever they are saved."""
    if tokenizer.is_fast:
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        state.pop("truncation", None)  # left over from the last call
        state.pop("padding", None)
    else:
        state = sorted(tokenizer.get_vocab().items())
    return _digest(type(tokenizer).__name__, state, tokenizer.special_tokens_map, tokenizer.chat_template)


def _code_digest() -> str:
    """A digest of the code that encodes, so that a change to it never meets documents encoded before the change."""
    files = (encoding.__file__, chat.__file__, cutting.__file__, __file__)
    return _digest(*(Path(str(file)).read_text(encoding="utf-8") for file in files))


def _digest(*values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:32]
