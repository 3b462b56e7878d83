# SPDX-License-Identifier: Apache-2.0
"""What an earlier run left in the folder of one that starts: the checkpoint to go on from, and what will be replaced."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from lightning import Trainer

from mtp_lightning.errors import RunError
from mtp_lightning.saving.checkpoint_files import newest_checkpoint, read_run_id, run_of
from mtp_lightning.training.distributed import checkpoint_folders


def say_what_is_replaced(trainer: Trainer) -> None:
    """Say so where a new run begins in the folder of an earlier one. All processes must call it.

    Args:
        trainer: the trainer.
    """
    folders = dict.fromkeys(checkpoint_folders(trainer))
    there = [path for folder in folders for path in sorted(folder.glob("*.ckpt"))]
    if there and not getattr(trainer, "fast_dev_run", False):
        names = ", ".join(str(path) for path in there[:3]) + (", ..." if len(there) > 3 else "")
        _say(
            trainer,
            f"checkpoints of an earlier run are there ({names}), and this one begins at step 0: its own will"
            " replace those of the same name. To go on from an earlier one stop this run and name the file with"
            " --ckpt_path.",
        )


def figures_are_its_own(trainer: Trainer, folder: Path, checkpoint: dict[str, Any]) -> bool:
    """Whether training adds to the folder's figures: not where it goes on in the folder of another run, which is said.

    Args:
        trainer: the trainer.
        folder: the run's folder.
        checkpoint: what training goes on from.

    Returns:
        Whether.
    """
    owner = read_run_id(folder)
    if owner is None or owner == run_of(checkpoint):
        return True
    if not getattr(trainer, "fast_dev_run", False):
        _say(
            trainer,
            f"{str(folder)!r} has figures of another run than the checkpoint's: metrics.csv begins"
            f" anew, after step {checkpoint['global_step']}.",
        )
    return False


def last_checkpoint(trainer: Trainer, folder: Path, training: bool) -> str | None:
    """The newest complete checkpoint of the run, which ``last`` stands for. All processes must call it.

    Args:
        trainer: the trainer.
        folder: the run's folder.
        training: whether the run may begin at step 0 where there is none.

    Returns:
        The file, or None where training begins at step 0, which is said.

    Raises:
        RunError: there is none, and the command needs one.
    """
    folders = checkpoint_folders(trainer)
    found = newest_checkpoint(folders, read_run_id(folder), lambda message: _say(trainer, message))
    if found is None:
        missing = f"no complete checkpoint of this run in {str(folders[-1])!r}"
        if not training:
            raise RunError(f"{missing}. Give the path of a .ckpt file with --ckpt_path.")
        _say(trainer, f"{missing}: training begins at step 0.")
    return None if found is None else str(found)


def _say(trainer: Trainer, message: str) -> None:
    """Tell the user, once for all processes."""
    if trainer.is_global_zero:
        print(f"mtp: {message}", file=sys.stderr)
