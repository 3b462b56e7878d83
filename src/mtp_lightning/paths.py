# SPDX-License-Identifier: Apache-2.0
"""Names of files and folders: those on disk, and those shipped with this package (``package://demo/base``)."""

from __future__ import annotations

from importlib.resources import files

PACKAGE = "package://"


def resolve(name: str) -> str:
    """The path of a ``package://`` name; any other name as it is.

    ``package://demo/base -> .../mtp_lightning/demo/base``

    Args:
        name: a path, a hub id or a ``package://`` name.

    Returns:
        A path or the name.
    """
    if name.startswith(PACKAGE):
        return str(files("mtp_lightning").joinpath(name[len(PACKAGE) :]))
    return name
