# SPDX-License-Identifier: Apache-2.0
"""Documents: the rows of a part, encoded and cut to length, in memory or in a file of the cache that is mapped."""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from tqdm.auto import tqdm

from mtp_lightning.data import chat, cutting, encoding, formats, messages, tables, tokenizing
from mtp_lightning.data.cache import cache_folder, cached_file
from mtp_lightning.data.chat import RefusedByTemplate
from mtp_lightning.data.cutting import NULL, REFUSED, Tokens, cut_rows
from mtp_lightning.data.encoding import EncodedRow, encode_row
from mtp_lightning.data.formats import Part, Row
from mtp_lightning.data.messages import NullContent
from mtp_lightning.data.tokenizing import is_utf8
from mtp_lightning.errors import RunError, UsageError, one_line

if TYPE_CHECKING:
    import pyarrow as pa
    from transformers import PreTrainedTokenizerBase

_BATCH_ROWS = 1000
_PARALLEL_FROM = 20
"""Batches after which several processes are started, where they are asked for."""


class Encoder(NamedTuple):
    """How rows become documents."""

    tokenizer: PreTrainedTokenizerBase  # the base's tokenizer
    max_length: int  # maximum tokens in a document
    chat_template: str | None = None  # source of a chat template, or None for the base's own
    vocab_size: int | None = None  # number of token ids that the base has; None: as many as the tokenizer

    def digest(self) -> str:
        """A digest of all that decides what rows become, the code included: a change never meets older documents."""
        modules = (encoding, chat, messages, tokenizing, cutting, formats, tables)
        code = [Path(str(module.__file__)).read_text(encoding="utf-8") for module in modules]
        code.append(Path(__file__).read_text(encoding="utf-8"))
        return _digest(tokenizer_digest(self.tokenizer), self.chat_template, self.max_length, self.vocab_size, *code)


class Documents:
    """Encoded documents, given as record batches in memory or the cache files that hold them, one after another.

    The columns are ``input_ids``, ``loss``, ``domain``, ``row`` (index among the rows that were read), ``note`` (why the
    row was refused, or null) and the counts of ``cutting.CutDocuments``.
    """

    def __init__(self, sources: Sequence[pa.RecordBatch | Path]) -> None:
        self.sources = list(sources)
        self._batches = [
            batch for source in sources for batch in (_mapped(source) if isinstance(source, Path) else [source])
        ]
        self._starts = np.cumsum([0] + [len(batch) for batch in self._batches], dtype=np.int64)

    def __reduce__(self) -> tuple[Any, ...]:
        return Documents, (self.sources,)  # a worker process maps the files itself

    def __len__(self) -> int:
        return int(self._starts[-1])

    def column(self, name: str) -> np.ndarray:
        """A column of numbers, [n]."""
        return np.concatenate([batch.column(name).to_numpy() for batch in self._batches] or [np.zeros(0, np.int64)])

    def notes(self, chosen: np.ndarray, limit: int) -> list[str]:
        """The notes of the first ``limit`` chosen documents that have one."""
        return [self._at(int(index), "note").as_py() for index in chosen[:limit]]

    def document(self, index: int) -> tuple[np.ndarray, np.ndarray, str]:
        """Token ids [n] int32, loss [n] bool and domain of a document."""
        ids, loss, domain = (self._at(index, name) for name in ("input_ids", "loss", "domain"))
        return ids.values.to_numpy(), loss.values.to_numpy(zero_copy_only=False), domain.as_py()

    def _at(self, index: int, name: str) -> Any:
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self._batches[number].column(name)[index - int(self._starts[number])]


def _mapped(path: Path) -> list[pa.RecordBatch]:
    import pyarrow as pa

    file = pa.ipc.open_file(pa.memory_map(str(path)))
    return [file.get_batch(number) for number in range(file.num_record_batches)]


def encode_part(
    part: Part, encoder: Encoder, encoder_digest: str, wanted: np.ndarray | None = None, workers: int = 0
) -> Path:
    """The cache file with the documents of a part, or of its ``wanted`` rows; written if they were not encoded before.

    ``workers`` processes encode a large part. Raises a RunError that names the part and the row if one cannot be encoded.
    """
    import pyarrow as pa

    key = _digest(part.identity(), None if wanted is None else wanted.tolist(), encoder_digest)
    path = cache_folder() / "mtp_lightning" / f"{key}.arrow"
    if not path.is_file():
        rows = tqdm(part.rows(wanted=wanted), f"Encoding {part.name}", unit=" rows", delay=3, disable=None)
        with cached_file(path) as file, pa.ipc.new_file(file, _schema()) as writer:
            for batch in _encode_batches(iter(rows), part, encoder, workers):
                writer.write_batch(batch)
    return path


def _encode_batches(rows: Iterator[Row], part: Part, encoder: Encoder, workers: int) -> Iterator[pa.RecordBatch]:
    """The documents of the rows in batches, in order; those of a large part on several processes."""
    batches = iter(lambda: list(islice(rows, _BATCH_ROWS)), [])
    numbered = ((number * _BATCH_ROWS, batch) for number, batch in enumerate(batches))
    for first, batch in islice(numbered, _PARALLEL_FROM if workers > 1 else None):
        yield encode_batch(batch, first, part.name, part.unit, encoder)
    if (next_batch := next(numbered, None)) is None:
        return
    with ProcessPoolExecutor(workers, initializer=_start_worker, initargs=(encoder,)) as pool:
        pending: deque[Future[pa.RecordBatch]] = deque()
        for first, batch in chain([next_batch], numbered):
            pending.append(pool.submit(_encode_in_worker, batch, first, part.name, part.unit))
            if len(pending) > 2 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


_worker_encoder: Encoder  # of a worker process


def _start_worker(encoder: Encoder) -> None:
    global _worker_encoder
    _worker_encoder = encoder


def _encode_in_worker(rows: list[Row], first: int, name: str, unit: str) -> pa.RecordBatch:
    return encode_batch(rows, first, name, unit, _worker_encoder)


def encode_batch(rows: Sequence[Row], first: int, name: str, unit: str, encoder: Encoder) -> pa.RecordBatch:
    """The documents of some rows, the first of which has index ``first``; ``name`` and ``unit`` are those of the part."""
    encoded, outcomes = [], np.zeros(len(rows), np.int8)
    notes: list[str | None] = [None] * len(rows)
    for index, row in enumerate(rows):
        where, result = f"{name}, {unit} {row.place}", None
        try:
            if not isinstance(domain := row.fields.get("domain") or "", str) or not is_utf8(domain):
                raise RunError(f"domain must be UTF-8 text, got {one_line(repr(domain), 60)}.")
            result = encode_row(row.fields, encoder.tokenizer, encoder.chat_template)
            outcomes[index] = NULL if result is None else 0
        except RefusedByTemplate as error:
            outcomes[index], notes[index] = REFUSED, f"{where}: {error}".encode(errors="replace").decode()
        except NullContent:
            outcomes[index] = NULL
        except (RunError, UsageError) as error:
            raise type(error)(f"{where}: {error}") from error
        encoded.append(result or EncodedRow([], [], splittable=False))
    tokens = Tokens(
        ids=np.concatenate([np.asarray(row.input_ids, np.int64) for row in encoded]),
        loss=np.concatenate([np.asarray(row.loss, bool) for row in encoded]),
        lengths=np.array([len(row.input_ids) for row in encoded], np.int64),
        splittable=np.array([row.splittable for row in encoded], bool),
    )
    _check_ids(tokens, rows, f"{name}, {unit}", encoder)
    documents = cut_rows(tokens, encoder.max_length)
    skipped = outcomes[documents.rows]
    documents = documents._replace(outcomes=np.where(skipped, skipped, documents.outcomes))
    domains = [row.fields.get("domain") or "" for row in rows]
    return _record_batch(documents, first, domains, notes)


def _check_ids(tokens: Tokens, rows: Sequence[Row], where: str, encoder: Encoder) -> None:
    vocab_size = encoder.vocab_size or len(encoder.tokenizer)
    outside = np.flatnonzero((tokens.ids < 0) | (tokens.ids >= vocab_size))
    if len(outside):
        row = int(np.searchsorted(np.cumsum(tokens.lengths), outside[0], side="right"))
        raise RunError(
            f"{where} {rows[row].place}: expected token ids from 0 to {vocab_size - 1}, the base's vocabulary, got"
            f" {tokens.ids[outside[0]]}. The row was encoded with another tokenizer, or the tokenizer has tokens that the"
            " base has no embedding for."
        )


def _record_batch(
    documents: cutting.CutDocuments, first: int, domains: list[str], notes: list[str | None]
) -> pa.RecordBatch:
    import pyarrow as pa

    offsets = pa.array(np.concatenate([[0], np.cumsum(documents.lengths)]).astype(np.int32))
    columns = {
        "input_ids": pa.ListArray.from_arrays(offsets, pa.array(documents.ids.astype(np.int32))),
        "loss": pa.ListArray.from_arrays(offsets, pa.array(documents.loss)),
        "domain": pa.array([domains[row] for row in documents.rows], pa.string()),
        "note": pa.array([notes[row] for row in documents.rows], pa.string()),
        "row": first + documents.rows,
        "outcome": documents.outcomes.astype(np.int8),
        "length": documents.lengths,
        "tokens_lost": documents.tokens_lost,
        "loss_tokens": documents.loss_tokens,
        "eligible_starts": documents.eligible_starts,
    }
    return pa.RecordBatch.from_pydict({name: pa.array(values) for name, values in columns.items()}, schema=_schema())


def _schema() -> pa.Schema:
    import pyarrow as pa

    lists = [("input_ids", pa.list_(pa.int32())), ("loss", pa.list_(pa.bool_()))]
    texts = [(name, pa.string()) for name in ("domain", "note")]
    numbers = [(name, pa.int64()) for name in ("row", "length", "tokens_lost", "loss_tokens", "eligible_starts")]
    return pa.schema([*lists, *texts, ("outcome", pa.int8()), *numbers])


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """A digest of everything that decides how a tokenizer encodes; equal for equal tokenizers, wherever they are saved."""
    if tokenizer.is_fast:
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        state.pop("truncation", None)  # left over from the last call
        state.pop("padding", None)
    else:
        state = sorted(tokenizer.get_vocab().items())
    return _digest(type(tokenizer).__name__, state, tokenizer.special_tokens_map, tokenizer.chat_template)


def _digest(*values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:32]
