# SPDX-License-Identifier: Apache-2.0
"""Checkpoint files of a run: which run wrote one, and the newest complete one of a folder."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mtp_lightning.errors import one_line
from mtp_lightning.files import atomic_file

LAST = "last.ckpt"
"""Name of the checkpoint to resume from."""
BEST = "best.ckpt"
"""Name of the checkpoint with the best figures in the complete configurations."""

SETTINGS = "mtp_settings"
"""A checkpoint's entry with the settings of its trained weights."""

RESUME = "mtp_resume"
"""A checkpoint's entry of what Lightning leaves out; its ``run`` is the run's id."""

RUN_FILE = "run_id.txt"
"""File in a run's folder with the id of the run whose figures and configuration the folder holds."""


def write_run_id(folder: Path, run: str) -> None:
    """Record that a folder belongs to a run, whose id is the same after every resumption."""
    with atomic_file(folder / RUN_FILE) as file:
        file.write(f"{run}\n".encode())


def read_run_id(folder: Path) -> str | None:
    """The id of the run that a folder belongs to, or None if it has none."""
    try:
        return (folder / RUN_FILE).read_text().strip()
    except (OSError, UnicodeDecodeError):
        return None


def run_of(checkpoint: dict[str, Any]) -> str:
    """The id of the run that wrote a checkpoint; empty for one of a version before runs had ids."""
    return str(checkpoint.get(RESUME, {}).get("run", ""))


def read_complete(path: Path) -> dict[str, Any] | str:
    """Open a checkpoint file and verify every byte of it.

    The result is the content of a complete checkpoint that training can resume from, its tensors memory-mapped, or what is
    wrong with the file, in a few words.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if (broken := archive.testzip()) is not None:
                return f"its entry {broken} is damaged"
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except OSError as error:
        return f"it can't be read ({error.strerror or one_line(error, 80)})"
    except Exception:  # the unpickler raises anything
        return "it is truncated or not a checkpoint"
    if not isinstance(checkpoint, dict) or SETTINGS not in checkpoint:
        return "it was not written by mtp fit"
    if "optimizer_states" not in checkpoint:
        return "it holds weights only, without the optimizer's state"
    return checkpoint


def newest_checkpoint(
    folders: list[Path], run: str | None = None, warn: Callable[[str], None] = lambda message: None
) -> Path | None:
    """The newest complete checkpoint of a run (None: of any) in some folders; ``warn`` gets a message for each one skipped.

    Of two at the same step ``last.ckpt`` is taken: the other may have been written by a validation at the run's end.
    """
    paths = [path for folder in dict.fromkeys(folders) for path in folder.glob("*.ckpt") if path.is_file()]
    newest: tuple[Path, int] | None = None
    for path in sorted(paths, key=lambda path: (path.stat().st_mtime_ns, path.name), reverse=True):
        if newest is not None and path.name != LAST:
            continue
        checkpoint = read_complete(path)
        if isinstance(checkpoint, str):
            problem = checkpoint
        elif run is not None and run_of(checkpoint) != run:
            problem = f"it belongs to an earlier run in this folder. To resume from it give --ckpt_path {path}"
        elif newest is None:
            newest = path, checkpoint["global_step"]
            continue
        elif checkpoint["global_step"] == newest[1]:
            return path
        else:
            continue
        if newest is None:
            warn(f"checkpoint {str(path)!r} is skipped: {problem}.")
    return None if newest is None else newest[0]
