# SPDX-License-Identifier: Apache-2.0
"""What an earlier run left in the folder of one that starts: the checkpoint to resume from, and what will be replaced."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning import Trainer

from mtp_lightning.errors import RunError, UsageError
from mtp_lightning.evaluation.reporting import note
from mtp_lightning.saving.checkpoint_files import newest_checkpoint, read_run_id, run_of
from mtp_lightning.training.distributed import checkpoint_folders

RESULTS = ("metrics.csv", "acceptance.json", "acceptance.png")
"""What a run writes to its folder besides checkpoints, its configuration, its id, and TensorBoard's events."""


def results_of_run(trainer: Trainer, folder: Path) -> list[Path]:
    """Checkpoints and results in the folder of a run. All processes must call it."""
    checkpoints = [path for place in dict.fromkeys(checkpoint_folders(trainer)) for path in sorted(place.glob("*.ckpt"))]
    return checkpoints + [path for name in RESULTS if (path := folder / name).is_file()]


def check_folder_is_free(trainer: Trainer, folder: Path) -> None:
    """Refuse to begin a run in the folder of another one. All processes must call it."""
    paths = results_of_run(trainer, folder)
    if paths and not getattr(trainer, "fast_dev_run", False):
        names = ", ".join(str(path) for path in paths[:3]) + (", ..." if len(paths) > 3 else "")
        raise UsageError(
            f"{str(folder)!r} holds a run already ({names}). Resume it with --ckpt_path last, choose another folder"
            " (trainer.default_root_dir, save_dir of the loggers), or delete it and begin again with --overwrite."
        )


def appends_metrics(trainer: Trainer, folder: Path, checkpoint: dict[str, Any]) -> bool:
    """True if the figures in a run's folder belong to the run of the checkpoint; warns if they do not."""
    owner = read_run_id(folder)
    if owner is None or owner == run_of(checkpoint):
        return True
    if not getattr(trainer, "fast_dev_run", False):
        _warn(
            trainer,
            f"{str(folder)!r} has figures of another run than the checkpoint's: metrics.csv is replaced and begins after"
            f" step {checkpoint['global_step']}.",
        )
    return False


def last_checkpoint(trainer: Trainer, folder: Path, may_begin: bool) -> str | None:
    """The newest complete checkpoint of the run, which ``--ckpt_path last`` means. All processes must call it.

    If there is none: None with ``may_begin`` (``--ckpt_path auto``), else a RunError.
    """
    folders = checkpoint_folders(trainer)
    path = newest_checkpoint(folders, read_run_id(folder), lambda message: _warn(trainer, message))
    if path is not None:
        return str(path)
    missing = f"no complete checkpoint of this run in {str(folders[-1])!r}"
    if not may_begin:
        raise RunError(
            f"{missing}. Give the path of a .ckpt file with --ckpt_path, or the folder of the run to resume"
            " (trainer.default_root_dir, save_dir of the loggers); mtp fit --ckpt_path auto begins a new run without one."
        )
    _warn(trainer, f"{missing}: training begins at step 0.")
    return None


def _warn(trainer: Trainer, message: str) -> None:
    """Print a line, once for all processes."""
    if trainer.is_global_zero:
        note(f"mtp: {message}")
