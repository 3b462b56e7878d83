# SPDX-License-Identifier: Apache-2.0
"""Tables: the rows of Parquet files and of datasets of the ``datasets`` library, of which only our fields are read.

A table gives each object the fields of all others, as nulls; below the top level of a row they are dropped.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mtp_lightning.data.formats import FIELDS, ROW_TYPES, File, Part, Row, select_rows
from mtp_lightning.errors import RunError, one_line

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

_BATCH_ROWS = 1000


class ParquetFile(File):
    """A Parquet file, of which only our fields and ``more_fields`` are read."""

    def __init__(self, path: Path, more_fields: Sequence[str] = ()) -> None:
        super().__init__(path)
        self._more_fields = more_fields

    def rows(self, start: int = 0, wanted: np.ndarray | None = None) -> Iterator[Row]:
        """See ``Part``."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            if not self.path.stat().st_size:
                return
            with pq.ParquetFile(self.path) as file:
                if not file.metadata.num_rows:
                    return
                columns = file.schema_arrow.names
                names = known_fields(columns, self.name, self._more_fields)
                first = 0
                for group in range(file.num_row_groups):
                    rows = file.metadata.row_group(group).num_rows
                    if first + rows > start and (wanted is None or np.any((wanted >= first) & (wanted < first + rows))):
                        batches = file.iter_batches(_BATCH_ROWS, row_groups=[group], columns=names)
                        for index, fields in select_rows(_table_rows(batches, self.name, first), start, wanted, first):
                            yield Row(index + 1, fields)
                    first += rows
        except (OSError, pa.ArrowException) as error:
            raise RunError(f"{self.name}: it cannot be read: {one_line(error)}.") from error

    def count(self) -> int:
        """Number of rows, from the file's end."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            return int(pq.read_metadata(self.path).num_rows) if self.path.stat().st_size else 0
        except (OSError, pa.ArrowException) as error:
            raise RunError(f"{self.name}: it cannot be read: {one_line(error)}.") from error


class DatasetPart(Part):
    """A dataset of the ``datasets`` library: a split of the hub, or a folder that ``save_to_disk`` wrote."""

    def __init__(self, name: str, dataset: Dataset) -> None:
        super().__init__(name)
        # A format, which save_to_disk keeps, may hide columns and return tensors.
        self.dataset = dataset.with_format(None).select_columns(known_fields(dataset.column_names, name))

    def rows(self, start: int = 0, wanted: np.ndarray | None = None) -> Iterator[Row]:
        """See ``Part``."""
        indices = range(start, len(self.dataset)) if wanted is None else wanted
        index = iter(indices)
        for batch in self.dataset.select(indices).iter(_BATCH_ROWS):
            for values in zip(*batch.values(), strict=True):
                yield Row(next(index) + 1, _without_nulls(dict(zip(batch, values, strict=True))))

    def count(self) -> int:
        """Number of rows."""
        return len(self.dataset)

    def identity(self) -> list[Any]:
        """The fingerprint by which ``datasets`` itself knows a dataset again."""
        return [self.dataset._fingerprint]


class HubStream(Part):
    """A split of the hub as a stream, which keeps its own position."""

    def __init__(self, name: str, stream: Any) -> None:
        super().__init__(name)
        if stream.column_names is not None:
            stream = stream.select_columns(known_fields(stream.column_names, name))
        self.stream = stream

    def rows(self, start: int = 0, wanted: np.ndarray | None = None) -> Iterator[Row]:
        """The rows from the stream's own position on, which is at ``start`` after ``load_state_dict`` if not 0."""
        place = start
        try:
            for place, fields in enumerate(self.stream, start + 1):
                yield Row(place, _without_nulls(fields))
        except Exception as error:  # Arrow, datasets and the hub's client raise many types
            where = f"{self.name}, after row {place}"
            raise RunError(f"{where}: it cannot be read: {one_line(error.__cause__ or error)}.") from error


def known_fields(names: list[str], source: str, more: Sequence[str] = ()) -> list[str]:
    """Those of the columns that are ours, or named in ``more``; a RunError if there are none of a row's content."""
    known = [name for name in (*FIELDS, *more) if name in names]
    if not set(known) - {"domain", "category", "id", "raw"}:
        raise RunError(f"{source}: expected rows with {ROW_TYPES}, got the fields {one_line(', '.join(names), 120)}.")
    return known


def _without_nulls(value: Any) -> Any:
    """The value without null fields of its objects below the top level, where a table adds each row's fields to all."""
    return {name: _nested(field) for name, field in value.items()}


def _nested(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _nested(field) for name, field in value.items() if field is not None}
    return [_nested(item) for item in value] if isinstance(value, list) else value


def _table_rows(batches: Iterable[pa.RecordBatch], name: str, first: int) -> Iterator[dict[str, Any]]:
    """The rows of a table, of which the first has index ``first``."""
    for batch in batches:
        columns = {field: _column(batch.column(field), name, first) for field in batch.schema.names}
        yield from (dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True))
        first += len(batch)


def _column(column: pa.Array, name: str, first: int) -> list[Any]:
    """The values of a column; lists of whole numbers as arrays, [n] int, without a Python object for each number."""
    import pyarrow as pa
    import pyarrow.compute as pc

    kind = column.type
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        column = column.cast(pa.large_string(), safe=False)
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    if is_list and pa.types.is_integer(kind.value_type) and not column.flatten().null_count:
        ends = np.cumsum(pc.list_value_length(column).fill_null(0).to_numpy(zero_copy_only=False))
        lists = np.split(column.flatten().to_numpy(zero_copy_only=False), ends[:-1])
        return [values if valid else None for values, valid in zip(lists, column.is_valid().to_pylist(), strict=True)]
    try:
        values = column.to_pylist(maps_as_pydicts="lossy")
    except UnicodeDecodeError as error:
        row = next(row for row in range(len(column)) if not _is_text(column[row]))
        raise RunError(f"{name}, row {first + row + 1}: expected UTF-8 text, {one_line(error)}.") from error
    return [_nested(value) for value in values] if pa.types.is_nested(kind) else values


def _is_text(value: pa.Scalar) -> bool:
    try:
        value.as_py()
    except UnicodeDecodeError:
        return False
    return True
