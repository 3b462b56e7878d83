# SPDX-License-Identifier: Apache-2.0
"""Where prompts come from: the files that can be read. Imports no torch, so that a wrong name is refused at once."""

from __future__ import annotations

from pathlib import Path

from mtp_lightning.data.formats import COMPRESSED
from mtp_lightning.errors import RunError, UsageError
from mtp_lightning.paths import resolve

SUFFIXES = (".txt", ".jsonl", ".ndjson", ".json", ".parquet", ".csv")


def check_source(source: str) -> str:
    """The suffix of a prompts file, without that of a compression; an empty string for standard input.

    RunError if the file is missing or empty, UsageError if its suffix is none of ``SUFFIXES``.
    """
    if source == "-":
        return ""
    path = Path(resolve(source))
    if path.is_dir():
        raise RunError(f"{source}: expected a file of prompts, it is a folder.")
    name = path.with_suffix("") if path.suffix.lower() in COMPRESSED else path
    suffix = name.suffix.lower()
    if suffix not in SUFFIXES or (name != path and suffix in (".txt", ".parquet")):
        raise UsageError(f"{source}: expected prompts in a file {', '.join(SUFFIXES)}, or - for standard input.")
    if not path.is_file():
        raise RunError(f"{source}: expected a file of prompts, nothing is there (looked in {Path.cwd()}).")
    if not path.stat().st_size:
        raise RunError(f"{source}: expected at least one prompt, it is empty.")
    return ".ndjson" if name != path and suffix == ".jsonl" else suffix
