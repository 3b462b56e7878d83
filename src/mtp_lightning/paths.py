# SPDX-License-Identifier: Apache-2.0
"""Names of files and folders: those on disk, and those shipped with this package (``package://demo/base``)."""

from __future__ import annotations

import os
import tempfile
from importlib.resources import files
from pathlib import Path

from mtp_lightning.errors import RunError

PACKAGE = "package://"
SMOLLM2 = "bases/smollm2-135m"
"""Where ``mtp base smollm2`` writes."""
OWN_FOLDERS = ("bases/", "runs/", "pretrained/")
"""Where commands and documentation put bases, runs and adapters: no owner on the hub has such a name."""


def resolve(name: str) -> str:
    """The path of a ``package://`` name or of one that begins with ``~``; any other name as it is.

    ``package://demo/base -> .../mtp_lightning/demo/base``, ``~/base -> /home/ada/base``
    """
    if name.startswith(PACKAGE):
        return str(files("mtp_lightning").joinpath(name[len(PACKAGE) :]))
    return os.path.expanduser(name)


def is_gguf(name: str) -> bool:
    """True for the name of a GGUF file, which may not exist."""
    return name.endswith(".gguf")


def is_on_disk(name: str) -> bool:
    """True if a base's name is that of a folder or GGUF file on this machine."""
    path = Path(resolve(name))
    return path.is_file() if is_gguf(name) else path.is_dir()


def check_exists(name: str, advice: str = "") -> None:
    """RunError for a name of nothing here that can't be a hub id, or that begins like our own folders."""
    is_path = name.startswith((PACKAGE, ".", "/", "~", *OWN_FOLDERS)) or name.endswith("/") or name.count("/") > 1
    if is_path and not Path(resolve(name)).exists():
        download = "" if Path(name) != Path(SMOLLM2) else " mtp base smollm2 writes it here."
        raise RunError(f"no folder {name} here.{download}{advice}")


def absolute_name(name: str) -> str:
    """The absolute path of a base's folder or GGUF file; a hub id or ``package://`` name as it is."""
    if not name or name.startswith(PACKAGE) or not is_on_disk(name):
        return name
    return str(Path(resolve(name)).resolve())


def check_writable(folder: Path, what: Path | str | None = None) -> None:
    """Refuse a folder, existing or not, that can't be written to: RunError, on ``what`` is to be written there."""
    if (reason := why_unwritable(folder)) is not None:
        raise RunError(f"{folder if what is None else what} can't be written: {reason}.")


def why_unwritable(folder: Path) -> str | None:
    """Why a folder, existing or not, can't be created or written to; None if it can."""
    for path in (folder, *folder.parents):
        if os.path.isdir(path):
            try:  # os.access allows root everything
                with tempfile.TemporaryFile(dir=path):
                    return None
            except OSError:
                return f"{str(path)!r} can't be written to"
        if os.path.lexists(path):
            return f"{str(path)!r} is a file, not a folder"
    return None
