# SPDX-License-Identifier: Apache-2.0
"""Streaming: an endless stream of token rows, encoded as they are read, never all of them in memory or on disk.

The stream reads rows in batches of ``READ_ROWS`` and turns each batch into token rows on its own, so its position is small:
the sources' positions before the batch, and how many of its token rows are used.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from mtp_lightning.data.cutting import SHORT
from mtp_lightning.data.documents import Documents, Encoder, encode_batch
from mtp_lightning.data.formats import Part, Row
from mtp_lightning.data.loader import ROWS_IN_A_BATCH, WindowedLoader, batches_delivered
from mtp_lightning.data.packing import WINDOW
from mtp_lightning.data.preparing import USABLE_ROWS, Prepared, Sources, arrange, report_on, sources_of, weights_of
from mtp_lightning.data.reading import open_sources
from mtp_lightning.data.rows import TokenRows
from mtp_lightning.data.tables import HubStream
from mtp_lightning.errors import RunError
from mtp_lightning.types import MaskedInput

READ_ROWS = WINDOW
"""Rows that are read, encoded and packed together."""
_CHANGED = "resume with the same, or start a new run"


class _Source:
    """Rows of one source, from the beginning again when they end."""

    def __init__(self, name: str, parts: list[Part]) -> None:
        self.name = name
        self.parts = parts
        self.part = 0  # index of the part that is read
        self.row = 0  # index of the next row in it
        self.cycle = 0  # how many times the source began again
        self._rows: Iterator[Row] | None = None  # rows from there on, once some were read
        self._inside: dict[str, Any] | None = None  # where to begin in a stream of the hub, which keeps its own position
        # The first rows of all files are read now, so that errors show at the start.
        if not any([isinstance(part, HubStream) or next(part.rows(), None) is not None for part in parts]):
            raise RunError(f"{name}: expected at least one row, it is empty.")

    def read(self, count: int) -> tuple[list[Row], Part, int]:
        """The next rows, fewer at the end of a part; their part, and the index of the first in it."""
        part, first = self.parts[self.part], self.row
        if self._rows is None:
            if isinstance(part, HubStream):
                part.stream.load_state_dict(copy.deepcopy(self._inside))
            self._rows = part.rows(first)
        rows = list(islice(self._rows, count))
        self.row += len(rows)
        if len(rows) < count:  # the end of the part
            self._rows, self._inside, self.row, self.part = None, None, 0, (self.part + 1) % len(self.parts)
            self.cycle += self.part == 0
        return rows, part, first

    def whole_cycle(self) -> int:
        """Number of the next cycle that is read from its beginning to its end."""
        return self.cycle + (self.part > 0 or self.row > 0)

    def state(self) -> dict[str, Any]:
        """The position, plain values."""
        part = self.parts[self.part]
        inside = self._inside
        if isinstance(part, HubStream) and self._rows is not None:
            inside = copy.deepcopy(part.stream.state_dict())
        return {"part": self.part, "parts": len(self.parts), "row": self.row, "cycle": self.cycle, "inside": inside}

    def load(self, state: dict[str, Any]) -> None:
        """Continue from a position."""
        if "row" not in state:
            raise RunError(f"{self.name}: the checkpoint's position in the stream is an earlier version's: start a new run.")
        if (before := state.get("parts", len(self.parts))) != len(self.parts):
            raise RunError(f"{self.name} had {before} files at the checkpoint and has {len(self.parts)} now: {_CHANGED}.")
        self.part, self.row, self.cycle, self._rows = state["part"], state["row"], state["cycle"], None
        self._inside = state["inside"]


class _Batch(NamedTuple):
    """Rows that were read together, encoded."""

    position: dict[str, Any]  # the stream's position before them
    documents: Documents  # their documents
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
        opened = open_sources(sources_of(sources), name, streaming=True)
        self.sources = [_Source(source, parts) for source, parts in opened.items()]
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
        if (before := len(position["sources"])) != len(self.sources):
            raise RunError(
                f"{self.name} had {before} sources at the checkpoint and has {len(self.sources)} now: {_CHANGED}."
            )
        self.taken = list(position["taken"])
        for source, inside in zip(self.sources, position["sources"], strict=True):
            source.load(inside)
        self._batch = self._next_batch() if state["used"] else None
        self._used = state["used"]

    def take(self, count: int) -> Prepared:
        """The next ``count`` token rows, and what became of the rows read for them."""
        batches: list[Documents] = []
        is_new: list[np.ndarray] = []  # a batch that spans two epochs is reported in the first
        rows: list[np.ndarray] = []
        num_read = num_documents = num_unusable = 0
        cycles = self._whole_cycles()
        while len(rows) < count:
            if starts_batch := self._batch is None:
                self._batch, self._used = self._next_batch(), 0
                num_read += self._batch.num_read
            batch = self._batch
            assert batch is not None
            if batch.rows:
                cycles, num_unusable = self._whole_cycles(), 0
            else:
                num_unusable += batch.num_read
            if num_unusable and len(self._read_whole(cycles)) == len(self.sources):
                raise RunError(f"{self.name}: none of the last {num_unusable} rows can be used. {USABLE_ROWS}")
            chosen = batch.rows[self._used : self._used + count - len(rows)]
            rows += [num_documents + row for row in chosen]
            batches.append(batch.documents)
            is_new.append(np.full(len(batch.documents), starts_batch))
            num_documents += len(batch.documents)
            self._used += len(chosen)
            if self._used == len(batch.rows):
                self._batch = None
        documents = Documents([source for batch in batches for source in batch.sources])
        offsets = np.cumsum([0] + [len(row) for row in rows]) if self.packing else None
        token_rows = TokenRows(documents, np.concatenate(rows), offsets)
        return report_on(token_rows, documents, np.concatenate(is_new), num_read)

    def _position(self) -> dict[str, Any]:
        return {"sources": [source.state() for source in self.sources], "taken": list(self.taken)}

    def _whole_cycles(self) -> list[int]:
        return [source.whole_cycle() for source in self.sources]

    def _read_whole(self, cycles: list[int]) -> list[str]:
        """Names of the sources that have been read from beginning to end since ``_whole_cycles`` gave these."""
        return [source.name for source, cycle in zip(self.sources, cycles, strict=True) if source.cycle > cycle]

    def _next_batch(self) -> _Batch:
        position, num_read, cycles = self._position(), 0, self._whole_cycles()
        encoded: list[Any] = []
        while not encoded:  # a part may just have ended, or hold nothing
            position = self._position()
            for number, wanted in self._wanted():
                rows, part, first = self.sources[number].read(wanted)
                self.taken[number] += len(rows)
                num_read += len(rows)
                if rows:
                    encoded.append(encode_batch(rows, first, part.name, part.unit, self.encoder))
            if not encoded and (empty := self._read_whole(cycles)):
                raise RunError(f"{self.name}: no rows in {', '.join(empty)}.")
        documents = Documents(encoded)
        usable = np.flatnonzero(documents.column("outcome") < SHORT)
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

    An epoch has ``rows`` token rows, ``batch_rows`` in a batch over all ranks; ``open_epoch`` makes its loader from its
    number and its rows.
    """

    def __init__(
        self, stream: RowStream, rows: int, batch_rows: int, open_epoch: Callable[[int, Prepared], WindowedLoader]
    ) -> None:
        self.stream = stream
        self.rows = rows
        self.length = -(-rows // batch_rows)
        self._order = {"data.streaming_rows": rows, ROWS_IN_A_BATCH: batch_rows}
        self.open_epoch = open_epoch
        self._epoch_begin = stream.state()
        self._begin = 0, 0  # epoch, and batches of it delivered before
        self._windows: WindowedLoader | None = None  # the loader of the epoch from there on, once its rows are read

    def __len__(self) -> int:
        return self.length

    def state_dict(self) -> dict[str, Any]:
        """Epoch, number of batches delivered, and the stream's position at the epoch's beginning."""
        (epoch, delivered), num_batches = self._begin, self.length
        if self._windows is not None:  # under ``limit_train_batches`` an epoch has fewer batches than its length
            epoch, delivered, num_batches = self._windows.epoch, self._windows.delivered, self._windows.num_batches
        state = {"epoch": epoch, "delivered": delivered, "stream": copy.deepcopy(self._epoch_begin)}
        return state | {"order": self._order, "batches": num_batches}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state, taken on any rank; UsageError if an epoch that had begun would have other batches."""
        self._begin = state["epoch"], batches_delivered(state, self._order, self.length)
        self._epoch_begin = copy.deepcopy(state["stream"])
        self.stream.load(self._epoch_begin)
        self._windows = None

    def __iter__(self) -> Iterator[MaskedInput]:
        windows = self._open()
        if windows.is_over:
            self._begin, self._epoch_begin, self._windows = (windows.epoch + 1, 0), self.stream.state(), None
            windows = self._open()
        return iter(windows)

    def _open(self) -> WindowedLoader:
        if self._windows is None:
            epoch, delivered = self._begin
            self._windows = self.open_epoch(epoch, self.stream.take(self.rows))
            self._windows.load_state_dict({"epoch": epoch, "delivered": delivered})
        return self._windows
