# SPDX-License-Identifier: Apache-2.0
"""Reading: a source (file, glob, folder, shipped file or hub id) -> data sets of rows. Knows nothing of tokens.

A source is one string:

* a file that ends in ``.jsonl``, ``.json``, ``.parquet`` or ``.txt``; a glob (``data/*.jsonl``); a folder, searched with
  its subfolders for such files. Whatever exists on this machine, ends in a file suffix or starts with ``.``, ``/`` or
  ``~`` is taken for a path.
* ``package://demo/train.parquet``: a file shipped inside the installed package.
* anything else is a data set on the Hugging Face hub: ``owner/name``, ``owner/name/config``, and either with ``:split``
  (``openai/gsm8k/main:train``). Without a split it is ``train``; slices work too (``owner/name:train[:1000]``).

A ``.txt`` file holds documents separated by ``<|endoftext|>``; without that mark the whole file is one document.
"""

from __future__ import annotations

import glob
import hashlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from mtp_lightning.data.cache import cache_errors, check_cache
from mtp_lightning.errors import RunError, UsageError, one_line, os_reason
from mtp_lightning.json_text import read_json
from mtp_lightning.paths import PACKAGE, resolve

if TYPE_CHECKING:
    from datasets import Dataset

SUFFIXES = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".txt": "text"}
"""Files that can be read."""

DOCUMENT_MARK = "<|endoftext|>"
"""What separates documents in a text file."""

FIELDS = ("messages", "prompt", "prompt_ids", "completion", "completion_ids", "text", "input_ids", "labels", "domain")
"""The fields of a row that are read; all others are left out."""

ROW_KINDS = "messages | prompt + completion (or completion_ids) | text | input_ids (+ labels)"
"""What a row may be, for error messages."""

_READABLE = ", ".join(SUFFIXES)
# A hub id may hold a dot, so only suffixes that files really have make a path out of a name that does not exist.
_OTHER_SUFFIXES = {
    ".csv",
    ".tsv",
    ".gz",
    ".xz",
    ".bz2",
    ".zst",
    ".zip",
    ".tar",
    ".arrow",
    ".ndjson",
    ".md",
    ".yaml",
    ".yml",
    ".npy",
}


def read_source(source: str) -> list[Dataset]:
    """The rows of one source, with the fields of ``FIELDS`` that it has; no data set is empty.

    Args:
        source: file, glob, folder, ``package://`` file or hub id, as the module docstring says.

    Returns:
        Data sets in the order of the files' names: one a file, one for all text files together, or one hub split.

    Raises:
        UsageError: the source is no name of anything, or a file of a kind that is not read.
        RunError: it does not exist, cannot be read, is empty, or its rows have none of the fields needed.
    """
    files = _local_files(source)
    check_cache()
    if files is None:
        return [_with_fields(_read_hub(source), source)]
    texts = [file for file in files if file.suffix == ".txt"]
    tables = [_with_fields(_read_table(file), str(file)) for file in files if file.suffix != ".txt"]
    return tables + ([_read_texts(texts)] if texts else [])


class Part:
    """Files of one kind, or a hub split, to be read as a stream.

    Args:
        name: the source, for messages.
        files: the files; none for a hub split.

    Attributes:
        rows: an ``IterableDataset``: rows of fields, and where it stands.
    """

    def __init__(self, name: str, files: list[Path]) -> None:
        self.name = name
        self.files = files
        for file in files:
            if SUFFIXES[file.suffix] == "json":
                _check_not_empty(file)
        self.rewind()

    def rewind(self) -> None:
        """Begin again."""
        from datasets import IterableDataset, load_dataset

        for kind in ("json", "parquet"):  # they log what they then raise; one line is enough
            logging.getLogger(f"datasets.packaged_modules.{kind}.{kind}").setLevel(logging.CRITICAL)
        if self.files and self.files[0].suffix == ".txt":
            self.rows = IterableDataset.from_generator(_text_rows, gen_kwargs={"files": [self.files]})
        elif self.files:
            kind, names = SUFFIXES[self.files[0].suffix], [str(file) for file in self.files]
            try:
                with cache_errors():
                    self.rows = load_dataset(kind, data_files=names, split="train", streaming=True)
            except RunError:
                raise
            except Exception as error:  # it looks at the first rows
                self.explain(error)
        else:
            self.rows = _read_hub(self.name, streaming=True)

    def explain(self, error: Exception) -> NoReturn:
        """Say which file or line is the reason for an error.

        Args:
            error: what reading raised.

        Raises:
            RunError: always.
        """
        for file in self.files:
            if SUFFIXES[file.suffix] == "json":
                _explain_json(file, error)
        raise RunError(
            f"{self.name}: it cannot be read: {one_line(error.__cause__ or error)}. Check its files and their permissions."
        ) from error


def open_parts(source: str) -> list[Part]:
    """A source as streams, one after another: nothing but their first rows is read.

    Args:
        source: file, glob, folder, ``package://`` file or hub id, as the module docstring says.

    Returns:
        Streams in the order of the files' names; all text files, last, are one.

    Raises:
        UsageError: the source is no name of anything, or a file of a kind that is not read.
        RunError: it does not exist or cannot be read.
    """
    files = _local_files(source)
    if files is None:
        return [Part(source, [])]
    kinds = dict.fromkeys(SUFFIXES[file.suffix] for file in files if file.suffix != ".txt")
    groups = [[file for file in files if file.suffix != ".txt" and SUFFIXES[file.suffix] == kind] for kind in kinds]
    texts = [file for file in files if file.suffix == ".txt"]
    return [Part(source, group) for group in [*groups, texts] if group]


def _text_rows(files: list[list[Path]]) -> Iterator[dict[str, str]]:
    for group in files:
        for file in group:
            for text in _read_documents(file)[1]:
                yield {"text": text}


def row_kind(fields: set[str]) -> str | None:
    """Which kind of row has these fields; where several fit, the first of the list in ``ROW_KINDS``.

    Rows of ``mtp distill`` have ``prompt_ids`` and ``completion_ids`` beside the same as text: the tokens count.

    Args:
        fields: names of the fields that are not empty.

    Returns:
        ``messages``, ``prompt``, ``text``, ``input_ids``, or None where none fits.
    """
    if {"prompt_ids", "completion_ids"} <= fields:
        return "prompt"
    if "messages" in fields:
        return "messages"
    if "prompt" in fields and fields & {"completion", "completion_ids"}:
        return "prompt"
    return next((name for name in ("text", "input_ids") if name in fields), None)


def _local_files(source: str) -> list[Path] | None:
    """The files that a source names, or None if it is a hub id."""
    if not source.strip():
        raise UsageError("a data source must be a file, folder, glob or hub id, got an empty string.")
    if source.lstrip()[0] in "{[" and not Path(source).exists():
        raise UsageError(
            f"a data source must be a file, folder, glob or hub id, a list of them, or a mix {{source: weight}} with numbers"
            f" as weights, got {source!r}. Change data.train, or the one that this is."
        )
    path = Path(resolve(source))
    if path.is_file():
        return [_readable(path)]
    if path.is_dir():
        found = sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES and p.is_file())
        if not found:
            raise RunError(f"{source}: expected a folder with {_READABLE} files, found none in it. Check the path.")
        return found
    if "*" in source or "?" in source or ("[" in source and ":" not in source):
        matches = [Path(name) for name in sorted(glob.glob(str(path), recursive=True))]
        found = [match for match in matches if match.suffix in SUFFIXES and match.is_file()]
        if not found:
            raise RunError(
                f"{source}: expected a glob that matches {_READABLE} files, it matches none in {Path.cwd()}."
                " Check the pattern."
            )
        return found
    named_like_a_file = path.suffix in SUFFIXES or path.suffix in _OTHER_SUFFIXES
    if source.startswith((PACKAGE, ".", "/", "~")) or source.endswith("/") or named_like_a_file or source.count("/") > 2:
        raise RunError(f"{source}: expected a file or folder, nothing is there (looked in {Path.cwd()}). Check the path.")
    return None


def _readable(path: Path) -> Path:
    if path.suffix not in SUFFIXES:
        raise UsageError(
            f"{path}: expected a file that ends in one of {_READABLE}, got {path.suffix or 'no suffix'!r}. Convert it."
        )
    return path


def _read_hub(source: str, streaming: bool = False) -> Any:
    from datasets import load_dataset

    name, _, split = source.partition(":")
    parts = name.split("/")
    if not all(parts):
        raise UsageError(f"{source}: expected a path, or a hub id like owner/name, owner/name/config or owner/name:split.")
    try:
        with cache_errors():
            options = {"streaming": True} if streaming else {}
            config = parts[2] if len(parts) == 3 else None
            rows = load_dataset("/".join(parts[:2]), config, split=split or "train", **options)
    except RunError:
        raise
    except Exception as error:  # the hub's client raises many kinds, none of them in common
        raise RunError(
            f"{source}: no such file here, and as a data set on the Hugging Face hub it could not be loaded: "
            f"{one_line(error)}. Check the name, config and split (owner/name/config:split), the network, or"
            " give a local path."
        ) from error
    return rows if streaming else _not_empty(rows, source)


def _read_table(file: Path) -> Dataset:
    import pyarrow.parquet as pq
    from datasets import load_dataset

    if SUFFIXES[file.suffix] == "json":
        _check_not_empty(file)
    log = logging.getLogger("datasets")
    level = log.level
    log.setLevel(logging.CRITICAL)  # it logs what it then raises; one line is enough
    try:
        if file.suffix == ".parquet" and pq.read_metadata(file).num_rows == 0:
            raise ValueError("it has no rows")
        with cache_errors():
            rows = load_dataset(SUFFIXES[file.suffix], data_files=str(file), split="train")
    except RunError:
        raise
    except Exception as error:  # Arrow, pandas and datasets raise many kinds
        if SUFFIXES[file.suffix] == "json":
            _explain_json(file, error)
        raise RunError(
            f"{file}: expected a {file.suffix} file, it cannot be read: {one_line(error.__cause__ or error)}."
            " Write it again, or look at its permissions."
        ) from error
    finally:
        log.setLevel(level)
    return _not_empty(rows, str(file))


def _check_not_empty(file: Path) -> None:
    """Arrow's message about an empty JSON file would speak of something else."""
    try:
        with file.open(encoding="utf-8", errors="replace") as lines:
            empty = not any(line.strip() for line in lines)
    except OSError as error:
        raise RunError(f"{file}: it can't be read: {os_reason(error)}. Change its permissions.") from error
    if empty:
        raise RunError(f"{file}: expected at least one row, it is empty.")


def _not_empty(rows: Dataset, name: str) -> Dataset:
    if len(rows) == 0:
        raise RunError(f"{name}: expected at least one row, it is empty.")
    return rows


def _explain_json(file: Path, error: Exception) -> None:
    """Find the line that is not UTF-8 or not JSON: Arrow's own message names a block, not a line."""
    seen: BaseException | None = error
    while seen is not None and not isinstance(seen, UnicodeDecodeError):
        seen = seen.__cause__ or seen.__context__
    if seen is not None:
        with file.open("rb") as raw:
            for number, encoded in enumerate(raw, 1):
                try:
                    encoded.decode()
                except UnicodeDecodeError as bad:
                    raise RunError(
                        f"{file}, line {number}: expected UTF-8 text, {one_line(bad)}. Save it as UTF-8."
                    ) from error
    with file.open(encoding="utf-8", errors="replace") as lines:
        if file.suffix == ".json" and lines.read(100).lstrip().startswith("["):
            lines.seek(0)
            for number, row in enumerate(read_json(lines.read(), str(file)), 1):
                _check_row(f"{file}, row {number}", row, error)
            return
        lines.seek(0)
        for number, line in enumerate(lines, 1):
            if line.strip():
                _check_row(f"{file}, line {number}", read_json(line.rstrip("\r\n"), str(file), number), error)


def _check_row(place: str, row: object, error: Exception) -> None:
    if not isinstance(row, dict):
        raise RunError(f"{place}: expected an object with fields ({ROW_KINDS}), got {type(row).__name__}.") from error


def _read_texts(files: list[Path]) -> Dataset:
    import pyarrow as pa
    from datasets import Dataset

    documents, digest = [], hashlib.sha256()
    for file in files:
        text, found = _read_documents(file)
        documents += found
        digest.update(text.encode())
        digest.update(b"\0")
    # The fingerprint is the content, so that what is made of these rows can be found again in the cache.
    return Dataset(pa.table({"text": pa.array(documents, pa.large_string())}), fingerprint=digest.hexdigest()[:32])


def _read_documents(file: Path) -> tuple[str, list[str]]:
    """The text of a file, and its documents."""
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise RunError(f"{file}: it can't be read: {os_reason(error)}. Change its permissions.") from error
    except UnicodeDecodeError as error:
        raise RunError(f"{file}: expected UTF-8 text, it cannot be decoded: {one_line(error)}. Save it as UTF-8.") from error
    pieces = text.split(DOCUMENT_MARK) if DOCUMENT_MARK in text else [text]
    kept = [piece.strip("\n") for piece in pieces if piece.strip()]
    if not kept:
        raise RunError(f"{file}: expected at least one document, it is empty.")
    return text, kept


def _with_fields(rows: Dataset, name: str) -> Dataset:
    names = [field for field in FIELDS if field in rows.column_names]
    if row_kind(set(names)) is None:
        got = one_line(Exception(", ".join(rows.column_names)), 120)
        raise RunError(f"{name}: expected rows with {ROW_KINDS}, got the fields {got}. Rename or add a field.")
    return rows.select_columns(names)
