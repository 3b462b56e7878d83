# SPDX-License-Identifier: Apache-2.0
"""Checkpoint files: which run wrote one, and the newest complete one of a folder."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mtp_lightning.errors import one_line
from mtp_lightning.files import atomic_file

LAST = "last.ckpt"
"""Name of the checkpoint to go on from."""

RESUME = "mtp_resume"
"""A checkpoint's entry of what Lightning leaves out; its ``run`` names the run."""

RUN_FILE = "run_id.txt"
"""File of a run's folder that names the run whose figures and configuration the folder holds."""


def write_run_id(folder: Path, run: str) -> None:
    """Say which run a folder belongs to from now on.

    Args:
        folder: the run's folder.
        run: the run's name, the same over all its starts.
    """
    with atomic_file(folder / RUN_FILE) as file:
        file.write(f"{run}\n".encode())


def read_run_id(folder: Path) -> str | None:
    """The run that a folder belongs to.

    Args:
        folder: the run's folder.

    Returns:
        Its name, or None where nothing is said.
    """
    try:
        return (folder / RUN_FILE).read_text().strip()
    except (OSError, UnicodeDecodeError):
        return None


def run_of(checkpoint: dict[str, Any]) -> str:
    """The run that wrote a checkpoint; empty for one that was written before runs had names."""
    return str(checkpoint.get(RESUME, {}).get("run", ""))


def inspect(path: str | Path) -> dict[str, Any] | str:
    """Open a checkpoint file, every byte of it read.

    Args:
        path: the file.

    Returns:
        What is in a complete checkpoint of ``mtp fit`` that training can go on from, its tensors on the disk still; else a
        few words that say what is wrong.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if (broken := archive.testzip()) is not None:
                return f"its entry {broken} is damaged"
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except OSError as error:
        return f"it can't be read ({error.strerror or one_line(error, 80)})"
    except Exception:  # the unpickler raises anything
        return "it is cut short or no checkpoint"
    if not isinstance(checkpoint, dict) or "mtp_settings" not in checkpoint:
        return "it was not written by mtp fit"
    if "optimizer_states" not in checkpoint:
        return "it holds weights alone, without the state of the training"
    return checkpoint


def newest_checkpoint(
    folders: list[Path], run: str | None = None, warn: Callable[[str], None] = lambda message: None
) -> Path | None:
    """The newest complete checkpoint of a run; a damaged one, and one of another run, is passed over.

    Of the same step ``last.ckpt`` is taken: another may have been written in a validation that the run's end added.

    Args:
        folders: where to look; those that are not there are fine.
        run: the run's name; None: any.
        warn: told of each checkpoint that is passed over.

    Returns:
        The file, or None where there is none.
    """
    found = [path for folder in dict.fromkeys(folders) for path in folder.glob("*.ckpt") if path.is_file()]
    newest: tuple[Path, int] | None = None
    for path in sorted(found, key=lambda path: (path.stat().st_mtime_ns, path.name), reverse=True):
        if newest is not None and path.name != LAST:
            continue
        checkpoint = inspect(path)
        if isinstance(checkpoint, str):
            if newest is None:
                warn(f"checkpoint {str(path)!r} is passed over: {checkpoint}.")
        elif run is not None and run_of(checkpoint) != run:
            if newest is None:
                warn(
                    f"checkpoint {str(path)!r} is passed over: it belongs to an earlier run in this folder. To go on from"
                    f" it give --ckpt_path {path}."
                )
        elif newest is None:
            newest = path, checkpoint["global_step"]
        elif checkpoint["global_step"] == newest[1]:
            return path
    return None if newest is None else newest[0]
