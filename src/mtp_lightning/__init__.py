# SPDX-License-Identifier: Apache-2.0
"""Multi-token prediction for pretrained language models. Version and public names; importing it loads nothing else."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mtp_lightning.data import MTPDataModule
    from mtp_lightning.model import MTPModel
    from mtp_lightning.training.module import MTPModule

__version__ = "0.1.0"
__all__ = ["MTPDataModule", "MTPModel", "MTPModule", "__version__"]

_MODULES = {"MTPDataModule": "data", "MTPModel": "model", "MTPModule": "training.module"}


def __getattr__(name: str) -> Any:
    """A public class, imported at first use: Lightning and transformers take seconds to load."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
