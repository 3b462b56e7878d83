# SPDX-License-Identifier: Apache-2.0
"""Reading: a source (file, glob, folder, shipped file or hub id) -> datasets or streams of rows. Knows nothing of tokens.

A source is one string:

* a file that ends in ``.jsonl``, ``.json``, ``.parquet`` or ``.txt``; a glob (``data/*.jsonl``); a folder, searched with
  its subfolders for such files. Whatever exists on this machine, ends in a file suffix or starts with ``.``, ``/`` or
  ``~`` is taken for a path.
* ``package://demo/train.parquet``: a file shipped inside the installed package.
* anything else is a dataset on the Hugging Face hub: ``owner/name``, ``owner/name/config``, and either with ``:split``
  (``openai/gsm8k/main:train``). The default split is ``train``; slices work too (``owner/name:train[:1000]``).

A ``.txt`` file holds documents separated by ``<|endoftext|>``; without that mark the whole file is one document.
"""

from __future__ import annotations

import glob
import hashlib
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from mtp_lightning.data.cache import cache_errors, check_cache
from mtp_lightning.errors import RunError, UsageError, one_line, os_reason
from mtp_lightning.json_text import read_json
from mtp_lightning.paths import PACKAGE, resolve

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".txt": "text"}
"""Suffix -> format of the files that can be read."""

DOCUMENT_SEPARATOR = "<|endoftext|>"
"""Separates documents in a text file."""

FIELDS = ("messages", "prompt", "prompt_ids", "completion", "completion_ids", "text", "input_ids", "labels", "domain")
"""The fields of a row that are read; all others are ignored."""

ROW_TYPES = "messages | prompt + completion (or completion_ids) | text | input_ids (+ labels)"
"""The types of rows, for error messages."""

_SUFFIXES = ", ".join(FORMATS)
# A hub id may contain a dot, so only real file suffixes make a path out of a name that does not exist.
_OTHER_SUFFIXES = set(".csv .tsv .gz .xz .bz2 .zst .zip .tar .arrow .ndjson .md .yaml .yml .npy".split())


def read_source(source: str) -> list[Dataset]:
    """The rows of one source, with those of ``FIELDS`` that it has, as non-empty datasets in the order of the files' names.

    There is one dataset per file, one for all text files together, or one for a hub split. Raises a UsageError if the
    source is malformed or its format is not supported, and a RunError if it does not exist, cannot be read, is empty, or
    its rows have none of the fields needed.
    """
    files = _local_files(source)
    check_cache()
    if files is None:
        rows = _load_hub(source)
        _require_rows(len(rows), source)
        return [_select_fields(rows, source)]
    texts = [file for file in files if file.suffix == ".txt"]
    tables = [_select_fields(_load_files([file]), str(file)) for file in files if file.suffix != ".txt"]
    return tables + ([_read_texts(texts)] if texts else [])


def file_groups(source: str) -> list[list[Path]]:
    """The files of a source grouped by format, text files last; one empty group for a hub id."""
    files = _local_files(source)
    if files is None:
        return [[]]
    groups: dict[str, list[Path]] = {}
    for file in sorted(files, key=lambda file: file.suffix == ".txt"):
        groups.setdefault(FORMATS[file.suffix], []).append(file)
    return list(groups.values())


def open_stream(source: str, files: list[Path]) -> IterableDataset:
    """The rows of one of ``file_groups(source)`` as a stream; only its first rows are read now."""
    from datasets import IterableDataset

    if not files:
        return _load_hub(source, streaming=True)
    if files[0].suffix == ".txt":
        # Wrapped in a list, because datasets would take each item of it for a shard.
        return IterableDataset.from_generator(_text_rows, gen_kwargs={"files": [files]})
    return _load_files(files, streaming=True)


def raise_unreadable(name: str, files: list[Path], error: Exception) -> NoReturn:
    """Raise a RunError that names the file and line that caused ``error``."""
    for file in files:
        if FORMATS[file.suffix] == "json":
            _raise_bad_json(file, error)
    raise RunError(f"{name}: it cannot be read: {one_line(error.__cause__ or error)}.") from error


def row_type(fields: set[str]) -> str | None:
    """The type of a row with these non-empty fields, by the first that fits: messages, prompt, text, input_ids.

    Rows of ``mtp distill`` have ``prompt_ids`` and ``completion_ids`` in addition to the text: the ids take precedence.
    """
    if {"prompt_ids", "completion_ids"} <= fields:
        return "prompt"
    if "messages" in fields:
        return "messages"
    if "prompt" in fields and fields & {"completion", "completion_ids"}:
        return "prompt"
    return next((name for name in ("text", "input_ids") if name in fields), None)


def _local_files(source: str) -> list[Path] | None:
    """The files that a source names, sorted, or None if it is a hub id."""
    # A mix or list that YAML did not parse arrives here as a string.
    if not source.strip() or (source.lstrip()[0] in "{[" and not Path(source).exists()):
        raise UsageError(f"a data source must be a path, glob, hub id, list, or mix {{source: weight}}, got {source!r}.")
    path = Path(resolve(source))
    if path.is_file():
        if path.suffix not in FORMATS:
            raise UsageError(f"{path}: expected a file that ends in one of {_SUFFIXES}, got {path.suffix or 'no suffix'!r}.")
        return [path]
    if path.is_dir():
        return _with_known_suffix(source, sorted(path.rglob("*")))
    if "*" in source or "?" in source or ("[" in source and ":" not in source):
        return _with_known_suffix(source, map(Path, sorted(glob.glob(str(path), recursive=True))))
    has_file_suffix = path.suffix in FORMATS or path.suffix in _OTHER_SUFFIXES
    if source.startswith((PACKAGE, ".", "/", "~")) or source.endswith("/") or has_file_suffix or source.count("/") > 2:
        raise RunError(f"{source}: expected a file or folder, nothing is there (looked in {Path.cwd()}).")
    return None


def _with_known_suffix(source: str, paths: Iterable[Path]) -> list[Path]:
    files = [path for path in paths if path.suffix in FORMATS and path.is_file()]
    if not files:
        raise RunError(f"{source}: expected {_SUFFIXES} files, found none (looked in {Path.cwd()}).")
    return files


def _load_hub(source: str, streaming: bool = False) -> Any:
    from datasets import load_dataset

    name, _, split = source.partition(":")
    parts = name.split("/")
    if not all(parts):
        raise UsageError(f"{source}: expected a path, or a hub id like owner/name, owner/name/config or owner/name:split.")
    try:
        with cache_errors():
            return load_dataset("/".join(parts[:2]), *parts[2:], split=split or "train", streaming=streaming)
    except RunError:
        raise
    except Exception as error:  # the hub's client raises many types, with nothing in common
        raise RunError(
            f"{source}: no such file here, and no dataset (owner/name/config:split) that the hub returns: {one_line(error)}."
        ) from error


def _load_files(files: list[Path], streaming: bool = False) -> Any:
    """The rows of JSON or Parquet files of one format, as a dataset or a stream."""
    from datasets import load_dataset

    file_format = FORMATS[files[0].suffix]
    # datasets logs errors before raising them, which would print them twice.
    logging.getLogger(f"datasets.packaged_modules.{file_format}.{file_format}").setLevel(logging.CRITICAL)
    try:
        for file in files:
            _check_not_empty(file)
        with cache_errors():
            return load_dataset(file_format, data_files=list(map(str, files)), split="train", streaming=streaming)
    except RunError:
        raise
    except Exception as error:  # Arrow, pandas and datasets raise many types
        raise_unreadable(str(files[0]), files, error)


def _check_not_empty(file: Path) -> None:
    """Arrow's own message about an empty file would not say that it is empty."""
    import pyarrow.parquet as pq

    if file.suffix == ".parquet":
        _require_rows(pq.read_metadata(file).num_rows, str(file))
        return
    try:
        with file.open(encoding="utf-8", errors="replace") as lines:
            _require_rows(any(line.strip() for line in lines), str(file))
    except OSError as error:
        raise RunError(f"{file}: it can't be read: {os_reason(error)}.") from error


def _require_rows(num_rows: int, name: str) -> None:
    if not num_rows:
        raise RunError(f"{name}: expected at least one row, it is empty.")


def _raise_bad_json(file: Path, error: Exception) -> None:
    """Find the line that is not UTF-8 or not JSON (Arrow's own message names a block), and raise a RunError."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, UnicodeDecodeError):
        cause = cause.__cause__ or cause.__context__
    if cause is not None:
        with file.open("rb") as raw:
            for number, line in enumerate(raw, 1):
                try:
                    line.decode()
                except UnicodeDecodeError as bad:
                    raise RunError(f"{file}, line {number}: expected UTF-8 text, {one_line(bad)}.") from error
    for place, row in _json_rows(file):
        if not isinstance(row, dict):
            raise RunError(f"{file}, {place}: expected an object ({ROW_TYPES}), got {type(row).__name__}.") from error


def _json_rows(file: Path) -> Iterator[tuple[str, Any]]:
    """The values in a JSON lines file or array, each with its place; a RunError where one does not parse."""
    with file.open(encoding="utf-8", errors="replace") as lines:
        is_array = file.suffix == ".json" and lines.read(100).lstrip().startswith("[")
        lines.seek(0)
        if is_array:
            for number, value in enumerate(read_json(lines.read(), str(file)), 1):
                yield f"row {number}", value
            return
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield f"line {number}", read_json(line.rstrip("\r\n"), str(file), number)


def _text_rows(files: list[list[Path]]) -> Iterator[dict[str, str]]:
    for group in files:
        for file in group:
            for document in _read_documents(file):
                yield {"text": document}


def _read_texts(files: list[Path]) -> Dataset:
    import pyarrow as pa
    from datasets import Dataset

    documents = [document for file in files for document in _read_documents(file)]
    # The fingerprint is the content, so that the encoded rows are found again in the cache.
    digest = hashlib.sha256()
    for document in documents:
        digest.update(f"{len(document)}:{document}".encode())
    return Dataset(pa.table({"text": pa.array(documents, pa.large_string())}), fingerprint=digest.hexdigest()[:32])


def _read_documents(file: Path) -> list[str]:
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise RunError(f"{file}: it can't be read: {os_reason(error)}.") from error
    except UnicodeDecodeError as error:
        raise RunError(f"{file}: expected UTF-8 text, {one_line(error)}.") from error
    documents = [piece.strip("\n") for piece in text.split(DOCUMENT_SEPARATOR) if piece.strip()]
    _require_rows(len(documents), str(file))
    return documents


def _select_fields(rows: Dataset, name: str) -> Dataset:
    fields = [field for field in FIELDS if field in rows.column_names]
    if row_type(set(fields)) is None:
        columns = one_line(", ".join(rows.column_names), 120)
        raise RunError(f"{name}: expected rows with {ROW_TYPES}, got the fields {columns}.")
    return rows.select_columns(fields)
