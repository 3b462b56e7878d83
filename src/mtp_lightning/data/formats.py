# SPDX-License-Identifier: Apache-2.0
"""Formats: what a file's rows are read by, and the formats JSON and text; tables are in ``tables.py``. Rows have a place.

A row is a dict of fields. Fields that are not used may hold anything and change from row to row.
"""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import hashlib
import io
import json
import lzma
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar

import numpy as np

from mtp_lightning.errors import RunError, one_line, os_reason
from mtp_lightning.json_text import decode_json, not_json, read_json

T = TypeVar("T")

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".parquet", ".txt")
"""Suffixes of the files that can be read; all but Parquet also with a further ``.gz``, ``.bz2``, ``.xz`` or ``.zst``."""

COMPRESSED = (".gz", ".bz2", ".xz", ".zst")

DOCUMENT_SEPARATOR = "<|endoftext|>"
"""Separates documents in a text file."""

FIELDS = (
    *("messages", "conversations", "conversation", "instruction", "input", "history", "output", "system", "tools"),
    *("response", "question", "answer"),
    *("prompt", "prompt_ids", "completion", "completion_ids", "text", "input_ids", "labels", "domain"),
    *("attention_mask", "position_ids", "seq_lengths", "loss_mask", "completion_mask", "assistant_masks", "prompt_mask"),
)
"""The fields of a row that are read; all others are ignored."""

ROW_TYPES = (
    "messages | prompt + completion (or completion_ids) | text | input_ids (+ labels) | conversations"
    " | instruction + output (or response) | question + answer | prompt + response"
)
"""The types of rows, for error messages."""

_SEPARATORS = {",": "comma", ";": "semicolon", "\t": "tab"}
_MAX_CELL = 1 << 30  # characters
_CHUNK = 1 << 20  # characters read at once from a file that is not read by lines
_BZIP2 = (b"1AY&SY", b"\x17rE8P\x90")  # behind the first four bytes: a block, or the end of an empty file
_UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


class Row(NamedTuple):
    """A row of fields."""

    place: int  # number of its line in the file, or of the row, from 1
    fields: dict[str, Any]


class Part:
    """The rows of one file or dataset. ``name`` and ``unit`` (line or row) are for messages: ``a.jsonl, line 3``."""

    unit = "row"

    def __init__(self, name: str) -> None:
        self.name = name

    def rows(self, start: int = 0, wanted: np.ndarray | None = None) -> Iterator[Row]:
        """The rows from index ``start`` on, or those at the ``wanted`` indices, [w] int, ascending."""
        raise NotImplementedError

    def count(self) -> int:
        """Number of rows."""
        return sum(1 for _ in self.rows())

    def identity(self) -> list[Any]:
        """Plain values that change when the rows change."""
        raise NotImplementedError


class File(Part):
    """A part that is a file."""

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        self.path = path

    def identity(self) -> list[Any]:
        """Where the file is, its size, its time, and its first bytes: a clock may tick too slowly for a quick change."""
        try:
            state = self.path.stat()
            with self.path.open("rb") as file:
                head = hashlib.sha256(file.read(_CHUNK)).hexdigest()
        except OSError as error:
            raise RunError(f"{self.name}: it can't be read: {os_reason(error)}.") from error
        return [str(self.path.resolve()), state.st_size, state.st_mtime_ns, head]

    @contextmanager
    def open(self) -> Iterator[IO[bytes]]:
        """Its bytes, decompressed if its content is compressed; any failure to read them becomes a RunError."""
        try:
            with self.path.open("rb") as file:
                head = file.read(10)
            if head.startswith(_UTF_16):
                raise RunError(f"{self.name}: expected UTF-8 text, it is UTF-16. Convert it.")
            with _opened(self.path, head) as file:
                yield file
        except UnicodeDecodeError as error:
            raise RunError(f"{self.name}: expected UTF-8 text, {one_line(error)}.") from error
        except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
            reason = os_reason(error) if isinstance(error, OSError) else one_line(error)
            raise RunError(f"{self.name}: it can't be read: {reason}.") from error


def _opened(path: Path, head: bytes) -> Any:
    if head.startswith(b"\x1f\x8b"):
        return gzip.open(path)
    if head.startswith(b"\xfd7zXZ\x00"):
        return lzma.open(path)
    if head.startswith(b"BZh") and head[4:] in _BZIP2:
        return bz2.open(path)
    if head.startswith(b"\x28\xb5\x2f\xfd") or (head[1:4] == b"\x2a\x4d\x18" and 0x50 <= head[0] <= 0x5F):  # Zstandard
        import pyarrow as pa

        return io.BufferedReader(pa.CompressedInputStream(pa.OSFile(str(path)), "zstd"))
    return path.open("rb")


class JsonFile(File):
    """JSON lines; or, where the first character or the first line says so, an array or objects over several lines."""

    unit = "line"

    def __init__(self, path: Path, text_field: str | None = None) -> None:
        super().__init__(path)
        self._text_field = text_field  # the field that a row of text alone stands for; None: it is refused
        self._has_lines: bool | None = None  # None: not looked at yet

    def rows(self, start: int = 0, wanted: np.ndarray | None = None) -> Iterator[Row]:
        """See ``Part``."""
        for _, (place, raw) in select_rows(self._values(), start, wanted):
            value = read_json(self._decoded(raw, place), self.name, place) if isinstance(raw, bytes) else raw
            if self._text_field is not None and isinstance(value, str):
                value = {self._text_field: value}
            if not isinstance(value, dict):
                where = f"{self.name}, {self.unit} {place}"
                raise RunError(f"{where}: expected an object ({ROW_TYPES}), got {type(value).__name__}.")
            yield Row(place, value)

    def count(self) -> int:
        """Number of rows; lines are not parsed for it."""
        return sum(1 for _ in self._values())

    def is_single_object(self) -> bool:
        """True if the whole file is one object."""
        try:
            return len(list(islice(self.rows(), 2))) == 1
        except RunError:
            return False

    def _values(self) -> Iterator[tuple[int, Any]]:
        """The values with their places: bytes for a line, which is not parsed yet, the parsed value otherwise."""
        with self.open() as file:
            if self._has_lines is None:
                self._has_lines = self._find_lines(file)
                self.unit = "line" if self._has_lines else "row"
        with self.open() as file:
            if not self._has_lines:
                yield from self._long_values(file)
                return
            for number, line in enumerate(file, 1):
                line = line.removeprefix(codecs.BOM_UTF8)  # of any line: files were joined
                if line and not line.isspace():
                    yield number, line

    def _find_lines(self, file: IO[bytes]) -> bool:
        """False if the file begins with an array, or its first line is not JSON in a ``.json`` file."""
        while line := file.readline(_CHUNK):  # an array may be one line, of any length
            line = line.removeprefix(codecs.BOM_UTF8).strip()
            if line.startswith(b"["):
                return False
            if line and ".json" in (suffix.lower() for suffix in self.path.suffixes):
                try:
                    json.loads(line)
                except (ValueError, RecursionError):
                    return False
            if line:
                return True
        return True

    def _decoded(self, line: bytes, number: int) -> str:
        try:
            return line.decode().rstrip("\r\n")  # or an error at the line's end would be on the next line
        except UnicodeDecodeError as error:
            raise RunError(f"{self.name}, line {number}: expected UTF-8 text, {one_line(error)}.") from error

    def _long_values(self, file: IO[bytes]) -> Iterator[tuple[int, Any]]:
        """The values of an array, or one after another, decoded a chunk of the file at a time."""
        buffer, at, line, number, depth, at_end = "", 0, 1, 0, 0, False
        with io.TextIOWrapper(file, encoding="utf-8-sig") as text:
            while True:
                while at < len(buffer) and buffer[at] in " \t\r\n\ufeff,[]" and not (buffer[at] == "[" and depth):
                    depth += {"[": 1, "]": -1}.get(buffer[at], 0)
                    at += 1
                try:
                    value, end = decode_json(buffer, at)
                except (ValueError, RecursionError) as error:
                    if not at_end and _is_cut_off(error, buffer):
                        line += buffer.count("\n", 0, at)
                        more = text.read(max(_CHUNK, len(buffer)))
                        buffer, at, at_end = buffer[at:] + more, 0, not more
                        continue
                    if at_end and at == len(buffer) and depth == 0:
                        return
                    lines_before = 0 if isinstance(error, json.JSONDecodeError) else buffer.count("\n", 0, at)
                    raise not_json(error, self.name, line + lines_before) from error
                at, number = end, number + 1
                yield number, value


def _is_cut_off(error: Exception, buffer: str) -> bool:
    """True if more text could fix the error: a string that does not end, or anything at the end of the text."""
    return isinstance(error, json.JSONDecodeError) and (
        error.msg.startswith("Unterminated string") or error.pos >= len(buffer) - 10
    )


class TextFile(File):
    """Documents separated by ``DOCUMENT_SEPARATOR``; without it the whole file is one."""

    def rows(self, start: int = 0, wanted: np.ndarray | None = None) -> Iterator[Row]:
        """See ``Part``."""
        for index, document in select_rows(self._documents(), start, wanted):
            yield Row(index + 1, {"text": document})

    def _documents(self) -> Iterator[str]:
        with self.open() as file, io.TextIOWrapper(file, encoding="utf-8-sig") as text:
            rest = ""
            while more := text.read(max(_CHUNK, len(rest))):
                *pieces, rest = (rest + more).split(DOCUMENT_SEPARATOR)
                yield from filter(None, map(_document, pieces))
            if document := _document(rest):
                yield document


class CsvFile(File):
    """A table of text with the names of the fields in its first line, read in lower case. An empty cell is null.

    The first line also says what separates values: a comma; semicolons or tabs, which Excel writes in some languages.
    """

    def rows(self, start: int = 0, wanted: np.ndarray | None = None) -> Iterator[Row]:
        """See ``Part``."""
        with self._reader() as reader:
            for index, fields in select_rows(reader, start, wanted):
                if None in fields:
                    where = f"{self.name}, row {index + 1}"
                    separator = _SEPARATORS[reader.reader.dialect.delimiter]
                    problem = f"more values than names in the first line; a text with a {separator} needs quotes"
                    raise RunError(f"{where}: {problem}.")
                yield Row(index + 1, {name.strip().lower(): value or None for name, value in fields.items()})

    def names(self) -> set[str]:
        """The names of the fields; none in an empty file. Bytes that are not UTF-8 are an error of the rows only."""
        with self._reader(errors="replace") as reader:
            return {name.strip().lower() for name in reader.fieldnames or ()}

    @contextmanager
    def _reader(self, errors: str = "strict") -> Iterator[csv.DictReader[str]]:
        with self.open() as file, io.TextIOWrapper(file, encoding="utf-8-sig", errors=errors, newline="") as text:
            csv.field_size_limit(_MAX_CELL)
            table = None
            try:
                first_line = text.readline()  # a compressed file can't be rewound
                names = {separator: next(csv.reader([first_line], delimiter=separator), []) for separator in _SEPARATORS}
                separator = max(names, key=lambda separator: len(names[separator]))  # the comma if there is one name
                # Strict: a stray quote would otherwise change a text, or swallow the rows up to the next quote.
                table = csv.DictReader(chain([first_line], text), delimiter=separator, strict=True)
                yield table
            except csv.Error as error:
                where = "" if table is None else f", line {table.line_num + 1}"  # where the row begins
                is_quote = "expected after" in str(error) or "end of data" in str(error)
                hint = ": a text that begins with a quote ends with one, and quotes in it are doubled" if is_quote else ""
                raise RunError(f"{self.name}{where}: {one_line(error)}{hint}.") from error


def _document(piece: str) -> str:
    """The text between two separators without a byte order mark, of files that were joined; "" if it is blank."""
    document = piece.strip("\n").removeprefix("\ufeff").strip("\n")
    return document if document.strip() else ""


def select_rows(items: Iterable[T], start: int, wanted: np.ndarray | None, first: int = 0) -> Iterator[tuple[int, T]]:
    """Those of the items, the first of which has index ``first``, that ``Part.rows`` is asked for, with their indices."""
    chosen = None if wanted is None else set(wanted.tolist())
    for index, item in enumerate(items, first):
        if index >= start and (chosen is None or index in chosen):
            yield index, item
