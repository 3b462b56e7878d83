# SPDX-License-Identifier: Apache-2.0
"""Opening a trained model, whatever it was saved as: a checkpoint file, a saved folder or a hub id."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mtp_lightning.paths import resolve
from mtp_lightning.saving.checkpoint import Network, load_model
from mtp_lightning.saving.saved_folder import load_folder


def load_pretrained(network_class: type[Network], name: str | Path, **options: Any) -> Network:
    """Load a trained model; see ``MTPModel.from_pretrained``.

    Args:
        network_class: the class to build.
        name: a checkpoint file, a saved folder or a hub id.
        **options: those of ``load_model`` or ``load_folder``.

    Returns:
        The model in evaluation mode.
    """
    name = resolve(str(name))
    path = Path(name)
    if path.is_file() or (path.suffix == ".ckpt" and not path.is_dir()):
        options.pop("trust_remote_code", None)  # a checkpoint is the user's own
        return load_model(network_class, path, **options)
    return load_folder(network_class, name, **options)
