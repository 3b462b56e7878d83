# SPDX-License-Identifier: Apache-2.0
"""Names of files and folders: those on disk, and those shipped with this package (``package://demo/base``)."""

from __future__ import annotations

import os
from importlib.resources import files
from pathlib import Path

PACKAGE = "package://"


def resolve(name: str) -> str:
    """The path of a ``package://`` name or of one that begins with ``~``; any other name as it is.

    ``package://demo/base -> .../mtp_lightning/demo/base``, ``~/base -> /home/ada/base``

    Args:
        name: a path, a hub id or a ``package://`` name.

    Returns:
        A path or the name.
    """
    if name.startswith(PACKAGE):
        return str(files("mtp_lightning").joinpath(name[len(PACKAGE) :]))
    return os.path.expanduser(name)


def absolute_name(name: str) -> str:
    """A name that holds in every current folder: a folder's becomes absolute."""
    if not name or name.startswith(PACKAGE) or not Path(resolve(name)).is_dir():
        return name
    return str(Path(resolve(name)).resolve())


def why_unwritable(folder: Path) -> str | None:
    """Why a folder can't be made or written to, as far as that is seen before anything is written.

    Args:
        folder: the folder, there or not.

    Returns:
        A few words, or None where nothing is in the way.
    """
    for place in (folder, *folder.parents):
        if os.path.isdir(place):
            return None if os.access(place, os.W_OK | os.X_OK) else f"{str(place)!r} can't be written to"
        if os.path.lexists(place):
            return f"{str(place)!r} is a file, not a folder"
    return None
