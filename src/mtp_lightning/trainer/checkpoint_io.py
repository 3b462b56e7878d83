# SPDX-License-Identifier: Apache-2.0
"""AtomicCheckpointIO: Lightning's CheckpointIO that writes local files under a temporary name and renames them."""

from __future__ import annotations

from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from mtp_lightning.errors import RunError
from mtp_lightning.files import atomic_file


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes ``last.ckpt.part`` next to ``last.ckpt`` and renames it, so that a kill leaves the old file or the new one.

    Lightning's own collects the file in memory first and moves it from the folder for temporary files, which may be on
    another disk. Paths with a protocol (``s3://``) are left to it.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write a checkpoint; Lightning's own refuses ``storage_options``."""
        if "://" in str(path) or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        try:
            with atomic_file(path) as file:
                torch.save(checkpoint, file)
        except RunError as error:
            raise RunError(f"{error} When there is room, --ckpt_path auto resumes, or starts again.") from error
