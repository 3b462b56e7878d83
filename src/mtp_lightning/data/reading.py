# SPDX-License-Identifier: Apache-2.0
"""Reading: sources (files, globs, folders, shipped files, hub ids) -> the parts that their rows are in. No tokens here.

A source is one string:

* a file that ends in ``.jsonl``, ``.ndjson``, ``.json``, ``.csv``, ``.parquet`` or ``.txt`` (all but Parquet also
  compressed); a glob (``data/*.jsonl``); a folder, searched with its subfolders for such files, or one that ``datasets``
  saved. Whatever exists on this machine, ends in a file suffix or starts with ``.``, ``/`` or ``~`` is taken for a path.
* ``package://demo/train.parquet``: a file shipped inside the installed package.
* anything else is a dataset on the Hugging Face hub: ``owner/name``, ``owner/name/config``, and either with ``:split``
  (``openai/gsm8k/main:train``). The default split is ``train``; slices work too (``owner/name:train[:1000]``).
"""

from __future__ import annotations

import glob
import os
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

from mtp_lightning.data.cache import cache_errors
from mtp_lightning.data.encoding import row_type
from mtp_lightning.data.formats import COMPRESSED, ROW_TYPES, SUFFIXES, CsvFile, File, JsonFile, Part, TextFile
from mtp_lightning.data.tables import DatasetPart, HubStream, ParquetFile
from mtp_lightning.errors import RunError, UsageError, one_line
from mtp_lightning.paths import PACKAGE, resolve

_SUFFIXES = ", ".join(SUFFIXES)
# A hub id may contain a dot, so only real file suffixes make a path out of a name that does not exist.
_OTHER_SUFFIXES = set(".tsv .zip .tar .arrow .md .yaml .yml .npy .xlsx".split()) | set(COMPRESSED)


def open_source(source: str, streaming: bool = False) -> list[Part]:
    """The parts of a source: its files in the order of their names, text files last, or one dataset.

    Raises a UsageError if the source is malformed or its format is not supported, and a RunError if it does not exist or
    cannot be read. Rows are read later.
    """
    path = Path(resolve(source))
    # A mix or list that YAML did not parse arrives here as a string.
    if not source.strip() or (source.lstrip()[0] in "{[" and not path.exists()):
        raise UsageError(f"a data source must be a path, glob, hub id, list, or mix {{source: weight}}, got {source!r}.")
    if path.is_file():
        if file_suffix(path) is None:
            raise UsageError(f"{path}: expected a file that ends in one of {_SUFFIXES}, got {path.suffix or 'no suffix'!r}.")
        return [_open_file(path)]
    if path.is_dir():
        return _saved_dataset(source, path) or _open_files(source, sorted(_files_below(path)))
    if "*" in source or "?" in source or ("[" in source and ":" not in source):
        return _open_files(source, map(Path, sorted(glob.glob(str(path), recursive=True))))
    has_file_suffix = file_suffix(path) is not None or path.suffix.lower() in _OTHER_SUFFIXES
    if source.startswith((PACKAGE, ".", "/", "~")) or source.endswith("/") or has_file_suffix or source.count("/") > 2:
        raise RunError(f"{source}: expected a file or folder, nothing is there (looked in {Path.cwd()}).")
    return [_open_hub(source, streaming)]


def open_sources(sources: Iterable[str], name: str, streaming: bool = False) -> dict[str, list[Part]]:
    """Source -> its parts; a UsageError if a file is in two of the sources. ``name`` is the config key, for messages."""
    opened: dict[str, list[Part]] = {}
    owners: dict[Path, str] = {}
    for source in sources:
        if source in opened:
            raise UsageError(f"{name} names {source} twice. For more weight, give a mix {{source: weight}}.")
        opened[source] = open_source(source, streaming)
        for part in opened[source]:
            if isinstance(part, File) and (owner := owners.setdefault(part.path.resolve(), source)) != source:
                raise UsageError(f"{name}: {part.name} is in two sources, {owner} and {source}.")
    return opened


def file_suffix(path: Path) -> str | None:
    """The one of ``SUFFIXES`` that a file's name ends in, without that of a compression; None if there is none."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if len(suffixes) > 1 and suffixes[-1] in COMPRESSED and suffixes[-2] != ".parquet":
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in SUFFIXES else None


def _open_file(path: Path) -> File:
    suffix = file_suffix(path)
    others: dict[str | None, type[File]] = {".parquet": ParquetFile, ".txt": TextFile, ".csv": CsvFile}
    return others.get(suffix, JsonFile)(path)


def _open_files(source: str, paths: Iterable[Path]) -> list[Part]:
    found: dict[Path, Path] = {}
    for path in paths:
        if path.is_file() and file_suffix(path) is not None:
            found.setdefault(path.resolve(), path)  # a file that is also there as a link is read once
    names = set(found.values())
    files = [_open_file(path) for path in found.values() if not _is_compressed_copy(path, names)]
    files = [file for file in files if not _is_description(file)]
    if not files:
        which = "those found hold no rows and were left out" if names else "found none"
        raise RunError(f"{source}: expected {_SUFFIXES} files of rows, {which} (looked in {Path.cwd()}).")
    return sorted(files, key=lambda file: isinstance(file, TextFile))


def _files_below(folder: Path) -> Iterator[Path]:
    """The files of a folder and its subfolders, also those that are links, each folder once; not the hidden ones."""
    seen: set[Path] = set()
    for place, subfolders, names in os.walk(folder, followlinks=True):
        subfolders[:] = sorted(filter(_is_shown, subfolders))  # walked in this order: the first of two links counts
        if (real := Path(place).resolve()) in seen:
            subfolders.clear()
        else:
            seen.add(real)
            yield from (Path(place, name) for name in names if _is_shown(name))


def _is_compressed_copy(path: Path, files: set[Path]) -> bool:
    """True for ``a.jsonl.gz`` next to ``a.jsonl``, which ``gunzip -k`` leaves."""
    if path.suffix.lower() not in COMPRESSED or path.with_suffix("") not in files:
        return False
    warnings.warn(f"{path}: left out, {path.stem} next to it is taken for the same rows", stacklevel=2)
    return True


def _is_shown(name: str) -> bool:
    """False for hidden and temporary files and folders: ``.ipynb_checkpoints``, ``__MACOSX``, ``_temporary``."""
    return not name.startswith((".", "__", "_temporary"))


def _is_description(file: File) -> bool:
    """True for files that describe data and hold none: tables of other fields, and JSON of one object that is no row."""
    if isinstance(file, CsvFile):
        try:
            names = file.names()
        except RunError as error:
            warnings.warn(f"left out: {error}", stacklevel=2)
            return True
        if not names or row_type(names) is not None:
            return False
        warnings.warn(f"{file.name}: left out, its fields are none of {ROW_TYPES}", stacklevel=2)
        return True
    if not isinstance(file, JsonFile) or file_suffix(file.path) != ".json" or not file.is_single_object():
        return False
    if row_type(next(file.rows()).fields) is not None:
        return False
    if not file.path.name.startswith("dataset_info"):
        warnings.warn(f"{file.name}: left out, it holds one object that is no row", stacklevel=2)
    return True


def _saved_dataset(source: str, folder: Path) -> list[Part]:
    """The dataset that ``save_to_disk`` wrote into a folder (of several splits: train); none if it wrote none."""
    import datasets

    if (folder / "dataset_dict.json").is_file():
        folder = folder / "train"
        if not folder.is_dir():
            raise RunError(f"{source}: a saved dataset without the split train; name the folder of another split.")
    if not ((folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()):
        return []
    if not any(folder.glob("*.arrow")):  # datasets cannot load it
        raise RunError(f"{source}: expected at least one row, the saved dataset is empty (no .arrow file).")
    try:
        return [DatasetPart(source, datasets.Dataset.load_from_disk(str(folder)))]
    except RunError:
        raise
    except Exception as error:  # a damaged file makes Arrow and datasets raise many types
        raise RunError(f"{source}: it cannot be read: {one_line(error)}.") from error


def _open_hub(source: str, streaming: bool) -> Part:
    from datasets import load_dataset

    name, _, split = source.partition(":")
    parts = name.split("/")
    if not all(parts):
        raise UsageError(f"{source}: expected a path, or a hub id like owner/name, owner/name/config or owner/name:split.")
    try:
        with cache_errors():
            rows = load_dataset("/".join(parts[:2]), *parts[2:], split=split or "train", streaming=streaming)
    except RunError:
        raise
    except Exception as error:  # the hub's client raises many types, with nothing in common
        raise RunError(
            f"{source}: no such file here, and no dataset (owner/name/config:split) that the hub returns: {one_line(error)}."
        ) from error
    return HubStream(source, rows) if streaming else DatasetPart(source, rows)
