# SPDX-License-Identifier: Apache-2.0
"""Streaming: an endless stream of token rows, encoded as they are read, never all of them in memory or on disk.

The stream reads rows in batches of ``READ_ROWS`` and turns each batch into token rows on its own, so its position is small:
the sources' positions before the batch, and how many of its token rows are used.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mtp_lightning.data.cutting import SHORT
from mtp_lightning.data.documents import Encoder, encode_batch
from mtp_lightning.data.loader import WindowedLoader
from mtp_lightning.data.packing import WINDOW
from mtp_lightning.data.preparing import USABLE_ROWS, Prepared, Sources, arrange, report_on, weights_of
from mtp_lightning.data.reading import FIELDS, file_groups, open_stream, raise_unreadable
from mtp_lightning.data.rows import TokenRows, column
from mtp_lightning.errors import RunError
from mtp_lightning.types import MaskedInput

if TYPE_CHECKING:
    from datasets import Dataset

READ_ROWS = WINDOW
"""Rows that are read, encoded and packed together."""


class _Source:
    """Rows of one source, from the beginning again when they end."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.parts = file_groups(name)
        self.index = 0  # rows read since the beginning
        self.cycle = 0  # how many times it began again
        for part in reversed(range(len(self.parts))):  # all are opened once, so that errors show at the start
            self._open(part)

    def _open(self, part: int) -> None:
        self.part = part
        self._stream = open_stream(self.name, self.parts[part])
        self._rows: Iterator[dict[str, Any]] | None = None

    def read(self, count: int) -> tuple[list[dict[str, Any]], list[int]]:
        """The next rows and their indices; fewer at the end of a part."""
        if self._rows is None:
            self._rows = iter(self._stream)
        rows: list[dict[str, Any]] = []
        try:
            while len(rows) < count and (row := next(self._rows, None)) is not None:
                rows.append({field: row.get(field) for field in FIELDS})
        except RunError:
            raise
        except Exception as error:  # Arrow, datasets and the hub's client raise many types
            raise_unreadable(self.name, self.parts[self.part], error)
        indices = list(range(self.index, self.index + len(rows)))
        self.index += len(rows)
        if len(rows) < count:  # the end of the part
            if self.part + 1 == len(self.parts):
                self.index, self.cycle = 0, self.cycle + 1
            self._open((self.part + 1) % len(self.parts))
        return rows, indices

    def state(self) -> dict[str, Any]:
        """The position, plain values."""
        inside = None if self._rows is None else copy.deepcopy(self._stream.state_dict())
        return {"part": self.part, "number": self.index, "cycle": self.cycle, "inside": inside}

    def load(self, state: dict[str, Any]) -> None:
        """Continue from a position."""
        self._open(state["part"])
        self.index, self.cycle = state["number"], state["cycle"]
        if state["inside"] is not None:
            self._stream.load_state_dict(copy.deepcopy(state["inside"]))
            self._rows = iter(self._stream)


class _Batch(NamedTuple):
    """Rows that were read together, encoded."""

    position: dict[str, Any]  # the stream's position before them
    documents: Dataset  # their documents
    rows: list[np.ndarray]  # the documents of each token row
    num_read: int  # rows read


class RowStream:
    """An endless stream of token rows of the sources; ``name`` is the config key, for messages."""

    def __init__(self, sources: Sources, encoder: Encoder, *, name: str = "data.train", packing: bool = False) -> None:
        weights = weights_of(sources, name)
        self.name = name
        self.encoder = encoder
        self.packing = packing
        self.is_mix = isinstance(sources, dict)
        self.shares = [weight / sum(weights.values()) for weight in weights.values()]
        self.sources = [_Source(source) for source in weights]
        self.taken = [0] * len(self.sources)
        self._batch: _Batch | None = None  # the batch that the next token row comes from
        self._used = 0  # token rows of it already used

    def state(self) -> dict[str, Any]:
        """The position, plain values, the same on all ranks."""
        if self._batch is None:
            return {"sources": self._position(), "used": 0}
        return {"sources": self._batch.position, "used": self._used}

    def load(self, state: dict[str, Any]) -> None:
        """Continue from a position that ``state`` gave."""
        position = state["sources"]
        self.taken = list(position["taken"])
        for source, inside in zip(self.sources, position["sources"], strict=True):
            source.load(inside)
        self._batch = self._next_batch() if state["used"] else None
        self._used = state["used"]

    def take(self, count: int) -> Prepared:
        """The next ``count`` token rows, and what became of the rows read for them."""
        from datasets import concatenate_datasets

        tables: list[Dataset] = []
        is_new: list[np.ndarray] = []  # a batch that spans two epochs is reported in the first
        rows: list[np.ndarray] = []
        num_read = num_documents = num_unusable = 0
        while len(rows) < count:
            if starts_batch := self._batch is None:
                self._batch, self._used = self._next_batch(), 0
                num_read += self._batch.num_read
            batch = self._batch
            assert batch is not None
            num_unusable = 0 if batch.rows else num_unusable + batch.num_read
            if num_unusable and min(source.cycle for source in self.sources) > 0:
                raise RunError(f"{self.name}: none of the last {num_unusable} rows can be used. {USABLE_ROWS}")
            chosen = batch.rows[self._used : self._used + count - len(rows)]
            rows += [num_documents + row for row in chosen]
            tables.append(batch.documents)
            is_new.append(np.full(len(batch.documents), starts_batch))
            num_documents += len(batch.documents)
            self._used += len(chosen)
            if self._used == len(batch.rows):
                self._batch = None
        documents = concatenate_datasets(tables)
        offsets = np.cumsum([0] + [len(row) for row in rows]) if self.packing else None
        token_rows = TokenRows(documents, np.concatenate(rows), offsets)
        return report_on(token_rows, documents, np.concatenate(is_new), num_read)

    def _position(self) -> dict[str, Any]:
        return {"sources": [source.state() for source in self.sources], "taken": list(self.taken)}

    def _next_batch(self) -> _Batch:
        import datasets
        import pyarrow as pa

        position, tables, num_read = self._position(), [], 0
        for number, wanted in self._wanted():
            source = self.sources[number]
            rows, indices = source.read(wanted)
            self.taken[number] += len(rows)
            num_read += len(rows)
            if rows:
                fields = {field: [row[field] for row in rows] for field in FIELDS}
                tables.append(encode_batch(fields, indices, source.name, self.encoder))
        if not tables:
            if all(source.cycle > 0 for source in self.sources):
                raise RunError(f"{self.name}: no rows in {', '.join(source.name for source in self.sources)}.")
            return self._next_batch()  # a part had just ended
        documents = datasets.Dataset(pa.concat_tables(tables))
        usable = np.flatnonzero(column(documents, "outcome") < SHORT)
        order, offsets = arrange(documents, usable, self.packing, self.encoder.max_length)
        token_rows = np.split(order, np.arange(1, len(order)) if offsets is None else offsets[1:-1])
        return _Batch(position, documents, [row for row in token_rows if len(row)], num_read)

    def _wanted(self) -> list[tuple[int, int]]:
        """Index of each source to read from next, and how many rows of it."""
        if not self.is_mix:
            cycles = [source.cycle for source in self.sources]
            return [(cycles.index(min(cycles)), READ_ROWS)]
        total = sum(self.taken) + READ_ROWS
        wanted = [max(0, round(total * share) - taken) for share, taken in zip(self.shares, self.taken, strict=True)]
        return [(number, count) for number, count in enumerate(wanted) if count]


class StreamingLoader:
    """Batches of a stream for Lightning, in epochs of a fixed number of rows; exact resume within an epoch.

    The rows of an epoch are read and encoded at its beginning and shuffled among themselves. The state is the epoch, the
    number of batches delivered and the stream's position at the epoch's beginning, the same on all ranks.

    An epoch has ``rows`` token rows in ``length`` batches; ``open_epoch`` makes its loader from its number and its rows.
    """

    def __init__(
        self, stream: RowStream, rows: int, length: int, open_epoch: Callable[[int, Prepared], WindowedLoader]
    ) -> None:
        self.stream = stream
        self.rows = rows
        self.length = length
        self.open_epoch = open_epoch
        self.epoch = self.delivered = 0
        self._epoch_begin = stream.state()
        self._windows: WindowedLoader | None = None
        self._advanced = False  # True once a batch has been delivered since the position was last set

    def __len__(self) -> int:
        return self.length

    def state_dict(self) -> dict[str, Any]:
        """Epoch, number of batches delivered, and the stream's position at the epoch's beginning."""
        return {"epoch": self.epoch, "delivered": self.delivered, "stream": copy.deepcopy(self._epoch_begin)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state, taken on any rank."""
        self.epoch, self.delivered, self._epoch_begin = state["epoch"], state["delivered"], copy.deepcopy(state["stream"])
        self.stream.load(self._epoch_begin)
        self._windows, self._advanced = None, False

    def __iter__(self) -> Iterator[MaskedInput]:
        windows = self._open()
        if self._advanced or self.delivered >= windows.num_batches:
            self.epoch, self.delivered, self._windows = self.epoch + 1, 0, None
            self._epoch_begin = self.stream.state()
            windows = self._open()
        self._advanced = False
        windows.load_state_dict({"epoch": self.epoch, "delivered": self.delivered})
        return self._deliver(windows)

    def _open(self) -> WindowedLoader:
        if self._windows is None:
            self._windows = self.open_epoch(self.epoch, self.stream.take(self.rows))
        return self._windows

    def _deliver(self, windows: WindowedLoader) -> Iterator[MaskedInput]:
        for batch in windows:
            self.delivered, self._advanced = self.delivered + 1, True
            yield batch
