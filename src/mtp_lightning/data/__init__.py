# SPDX-License-Identifier: Apache-2.0
"""The data layer, in the order in which data flows.

``reading`` sources -> files and datasets; ``formats`` and ``tables`` those -> rows of fields; ``messages``, ``chat``,
``tokenizing`` and ``encoding`` a row -> token ids and loss; ``cutting`` rows -> documents of limited length;
``documents`` all of that for a file, kept on disk (``cache``); ``packing`` documents -> rows; ``rows`` the dataset
that a loader draws from; ``preparing`` everything up to there, ``streaming`` the same for a stream; ``loader`` which
rows when, on which rank; ``collator`` rows -> masked input; ``display`` a batch as text; ``module`` the
LightningDataModule, the only file here that imports Lightning.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mtp_lightning.data.module import MTPDataModule

__all__ = ["MTPDataModule"]


def __getattr__(name: str) -> Any:
    """``MTPDataModule``, imported on first use, so that the other files here work without Lightning."""
    if name != "MTPDataModule":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from mtp_lightning.data.module import MTPDataModule

    return MTPDataModule
