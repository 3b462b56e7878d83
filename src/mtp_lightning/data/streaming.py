# SPDX-License-Identifier: Apache-2.0
"""Streaming: rows of sources one after another for ever, encoded as they come, never all of them in memory or on disk.

The stream reads rows in batches of ``READ`` and makes token rows of each batch apart, so its position is small: where the
sources stood before the batch, and how many of its token rows are used.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mtp_lightning.data.cutting import SHORT
from mtp_lightning.data.documents import encode_fields
from mtp_lightning.data.loader import WindowedLoader
from mtp_lightning.data.packing import WINDOW, pack
from mtp_lightning.data.preparing import Prepared, Sources, report_of, weights_of
from mtp_lightning.data.reading import FIELDS, open_parts
from mtp_lightning.data.rows import TokenRows, column
from mtp_lightning.errors import RunError
from mtp_lightning.types import MaskedInput

if TYPE_CHECKING:
    from datasets import Dataset
    from torch.utils.data import DataLoader
    from transformers import PreTrainedTokenizerBase

READ = WINDOW
"""Rows that are read, encoded and packed together."""


class _Source:
    """Rows of one source, from the beginning again when they end.

    Args:
        name: the source.

    Attributes:
        number: rows read since the beginning.
        cycle: how often it began again.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.parts = open_parts(name)
        self.part = self.number = self.cycle = 0
        self._rows: Iterator[dict[str, Any]] | None = None

    def read(self, count: int) -> tuple[list[dict[str, Any]], list[int]]:
        """The next rows and their numbers; fewer at the end of a part, none only where the source is empty."""
        part = self.parts[self.part]
        if self._rows is None:
            self._rows = iter(part.rows)
        found: list[dict[str, Any]] = []
        try:
            while len(found) < count and (row := next(self._rows, None)) is not None:
                found.append({field: row.get(field) for field in FIELDS})
        except RunError:
            raise
        except Exception as error:  # Arrow, datasets and the hub's client raise many kinds
            part.explain(error)
        numbers = list(range(self.number, self.number + len(found)))
        self.number += len(found)
        if len(found) < count:  # the part is at its end
            self.parts[self.part].rewind()
            self.part, self._rows = self.part + 1, None
            if self.part == len(self.parts):
                self.part, self.number, self.cycle = 0, 0, self.cycle + 1
        return found, numbers

    def state(self) -> dict[str, Any]:
        """Where it stands, plain values."""
        inside = None if self._rows is None else copy.deepcopy(self.parts[self.part].rows.state_dict())
        return {"part": self.part, "number": self.number, "cycle": self.cycle, "inside": inside}

    def load(self, state: dict[str, Any]) -> None:
        """Go to where a state was taken."""
        self.part, self.number, self.cycle = state["part"], state["number"], state["cycle"]
        self._rows = None
        self.parts[self.part].rewind()
        if state["inside"] is not None:
            self.parts[self.part].rows.load_state_dict(copy.deepcopy(state["inside"]))
            self._rows = iter(self.parts[self.part].rows)


class _Batch(NamedTuple):
    """Rows that were read together, encoded.

    Attributes:
        before: the stream's position before them.
        documents: their documents.
        rows: the documents of each token row.
        read: how many rows were read.
    """

    before: dict[str, Any]
    documents: Dataset
    rows: list[np.ndarray]
    read: int


class RowStream:
    """Token rows of the sources, for ever.

    Args:
        sources: a source, several one after another, or a weighted mix.
        tokenizer: the base's tokenizer.
        max_length: most tokens in a row.
        name: the config key, for messages.
        chat_template: text of a chat template, or None for the base's own.
        packing: put several documents in a row.
    """

    def __init__(
        self,
        sources: Sources,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int,
        name: str = "data.train",
        chat_template: str | None = None,
        packing: bool = False,
    ) -> None:
        weights = weights_of(sources, name)
        self.name = name
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.chat_template = chat_template
        self.packing = packing
        self.mixed = isinstance(sources, dict)
        self.shares = [weight / sum(weights.values()) for weight in weights.values()]
        self.sources = [_Source(source) for source in weights]
        self.taken = [0] * len(self.sources)
        self._batch: _Batch | None = None  # the one that the next row comes from, and how much of it is used
        self._used = 0

    def state(self) -> dict[str, Any]:
        """The position, plain values, the same on all ranks."""
        if self._batch is None:
            return {"sources": self._position(), "used": 0}
        return {"sources": self._batch.before, "used": self._used}

    def load(self, state: dict[str, Any]) -> None:
        """Go to a position.

        Args:
            state: what ``state`` gave.
        """
        position = state["sources"]
        self.taken = list(position["taken"])
        for source, inside in zip(self.sources, position["sources"], strict=True):
            source.load(inside)
        self._batch, self._used = None, 0
        if state["used"]:
            self._batch, self._used = self._next_batch(), state["used"]

    def take(self, count: int) -> Prepared:
        """The next token rows.

        Args:
            count: how many.

        Returns:
            The rows, and what became of the rows of fields that were read for them.

        Raises:
            RunError: a row cannot be encoded, or none of a source can be used.
        """
        from datasets import concatenate_datasets

        parts: list[Dataset] = []
        fresh: list[np.ndarray] = []  # a batch that goes over from one epoch to the next is reported once
        rows: list[np.ndarray] = []
        read = documents = barren = 0
        while len(rows) < count:
            if new := self._batch is None:
                self._batch, self._used = self._next_batch(), 0
                read += self._batch.read
            batch = self._batch
            assert batch is not None
            barren = 0 if batch.rows else barren + batch.read
            if barren and min(source.cycle for source in self.sources) > 0:
                raise RunError(
                    f"{self.name}: none of the last {barren} rows can be used, and the sources have come to their end."
                    " Expected rows of two tokens or more with loss after the first; check the fields, max_length and the"
                    " chat template."
                )
            chosen = batch.rows[self._used : self._used + count - len(rows)]
            rows += [documents + row for row in chosen]
            parts.append(batch.documents)
            fresh.append(np.full(len(batch.documents), new))
            documents += len(batch.documents)
            self._used += len(chosen)
            if self._used == len(batch.rows):
                self._batch = None
        order = np.concatenate(rows)
        offsets = np.cumsum([0] + [len(row) for row in rows])
        table = concatenate_datasets(parts)
        token_rows = TokenRows(table, order, offsets if self.packing else None)
        side = np.concatenate(fresh)
        return Prepared(token_rows, report_of(table, column(table, "outcome"), side, read, order, len(token_rows)))

    def _position(self) -> dict[str, Any]:
        return {"sources": [source.state() for source in self.sources], "taken": list(self.taken)}

    def _next_batch(self) -> _Batch:
        import datasets
        import pyarrow as pa

        before, tables, read = self._position(), [], 0
        for number, wanted in self._wanted():
            source = self.sources[number]
            rows, numbers = source.read(wanted)
            self.taken[number] += len(rows)
            read += len(rows)
            if rows:
                fields = {field: [row[field] for row in rows] for field in FIELDS}
                tables.append(
                    encode_fields(fields, numbers, source.name, self.tokenizer, self.max_length, self.chat_template)
                )
        if not tables:
            names = ", ".join(source.name for source in self.sources)
            if all(source.cycle > 0 for source in self.sources):
                raise RunError(f"{self.name}: expected rows in {names}, there are none.")
            return self._next_batch()  # a part ended just there
        documents = datasets.Dataset(pa.concat_tables(tables))
        usable = np.flatnonzero(column(documents, "outcome") < SHORT)
        if self.packing:
            order, offsets = pack(column(documents, "length")[usable], self.max_length)
            rows_of = [usable[order[begin:end]] for begin, end in zip(offsets[:-1], offsets[1:], strict=True)]
        else:
            rows_of = [usable[place : place + 1] for place in range(len(usable))]
        return _Batch(before, documents, rows_of, read)

    def _wanted(self) -> list[tuple[int, int]]:
        """Number of each source to read from now, and how many rows of it."""
        if not self.mixed:
            cycles = [source.cycle for source in self.sources]
            return [(cycles.index(min(cycles)), READ)]
        total = sum(self.taken) + READ
        wanted = [max(0, round(total * share) - taken) for share, taken in zip(self.shares, self.taken, strict=True)]
        return [(number, count) for number, count in enumerate(wanted) if count]


class StreamedLoader:
    """Batches of a stream for Lightning, in epochs of a fixed number of rows; exact resume within an epoch.

    The rows of an epoch are read and encoded at its beginning and shuffled among themselves. The state is the epoch, the
    number of batches delivered and the stream's position at the epoch's beginning, the same on all ranks.

    Args:
        stream: the stream.
        rows: token rows of an epoch.
        windowed: makes the loader of an epoch's rows.
        length: batches of an epoch.
        started: called with the epoch and what was prepared for it.
    """

    def __init__(
        self,
        stream: RowStream,
        rows: int,
        windowed: Callable[[TokenRows], WindowedLoader],
        length: int,
        started: Callable[[int, Prepared, DataLoader[Any]], None],
    ) -> None:
        self.stream = stream
        self.rows = rows
        self.windowed = windowed
        self.length = length
        self.started = started
        self.epoch = self.delivered = 0
        self._begin = stream.state()
        self._windows: WindowedLoader | None = None
        self._moved = False

    def __len__(self) -> int:
        return self.length

    def state_dict(self) -> dict[str, Any]:
        """Epoch, number of batches delivered, and the stream's position at the epoch's beginning."""
        return {"epoch": self.epoch, "delivered": self.delivered, "stream": copy.deepcopy(self._begin)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where the state was taken.

        Args:
            state: what ``state_dict`` gave, on any rank.
        """
        self.epoch, self.delivered, self._begin = state["epoch"], state["delivered"], copy.deepcopy(state["stream"])
        self.stream.load(self._begin)
        self._windows, self._moved = None, False

    def __iter__(self) -> Iterator[MaskedInput]:
        windows = self._open()
        if self._moved or self.delivered >= windows.used:
            self.epoch, self.delivered, self._windows = self.epoch + 1, 0, None
            self._begin = self.stream.state()
            windows = self._open()
        self._moved = False
        windows.load_state_dict({"epoch": self.epoch, "delivered": self.delivered})
        return self._deliver(windows)

    def _open(self) -> WindowedLoader:
        if self._windows is None:
            prepared = self.stream.take(self.rows)
            self._windows = self.windowed(prepared.rows)
            self.started(self.epoch, prepared, self._windows.loader)
        return self._windows

    def _deliver(self, windows: WindowedLoader) -> Iterator[MaskedInput]:
        for batch in windows:
            self.delivered, self._moved = self.delivered + 1, True
            yield batch
