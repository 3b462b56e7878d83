# SPDX-License-Identifier: Apache-2.0
"""BesideCheckpointIO: Lightning's CheckpointIO that writes to the side and renames, on a local disk."""

from __future__ import annotations

from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from mtp_lightning.saving.checkpoint_files import write_beside


class BesideCheckpointIO(TorchCheckpointIO):
    """Writes ``last.ckpt.part`` next to ``last.ckpt`` and renames it, so that a kill leaves the old file or the new one.

    Lightning's own collects the file in memory first and moves it from the folder for temporary files, which may be on
    another disk. Paths with a protocol (``s3://``) are left to it.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write a checkpoint.

        Args:
            checkpoint: its content.
            path: the file.
            storage_options: refused, as by Lightning's own.
        """
        if "://" in str(path) or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        write_beside(path, lambda file: torch.save(checkpoint, file))
