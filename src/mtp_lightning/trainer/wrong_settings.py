# SPDX-License-Identifier: Apache-2.0
"""Sentences for settings that Lightning or an optimizer refuses in its own words, or takes and fails at later."""

from __future__ import annotations

import os
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args, get_type_hints

from lightning import Trainer
from lightning.fabric.utilities.exceptions import MisconfigurationException

from mtp_lightning.errors import MTPError, RunError, UsageError, one_line, os_reason


def check_nulls(config: Any, groups: Mapping[str, type]) -> None:
    """Refuse ``null`` for what has to have a value; the parser takes it for every key.

    Args:
        config: a parsed configuration.
        groups: group of keys -> the class whose arguments they are.

    Raises:
        UsageError: a key without its value.
    """
    for group, kind in groups.items():
        hints = {} if kind is Trainer else get_type_hints(kind.__init__)  # type: ignore[misc] # Lightning says it itself
        for name, hint in hints.items():
            if name != "return" and config.get(f"{group}.{name}", 0) is None and type(None) not in get_args(hint):
                raise UsageError(f"{group}.{name} must have a value, got null. Change {group}.{name}, or leave it out.")


def check_states(path: str, checkpoint: Mapping[str, Any], command: str) -> None:
    """Refuse a checkpoint without what Lightning is going to ask of it.

    Args:
        path: the file.
        checkpoint: what is in it.
        command: fit, validate or test.

    Raises:
        RunError: something is missing.
    """
    needed = ["pytorch-lightning_version"]
    needed += ["loops", "optimizer_states", "lr_schedulers"] if command == "fit" else []
    missing = [name for name in needed if name not in checkpoint]
    if missing:
        raise RunError(
            f"checkpoint {path!r} has no {', '.join(missing)}: it holds weights alone, or was changed, and mtp {command}"
            " needs the state of a training. Give one that mtp fit wrote."
        )


def not_made(error: BaseException) -> UsageError | None:
    """The sentence for a trainer that can't be made.

    Args:
        error: what making it raised.

    Returns:
        The error to raise instead, or None for what is not known.
    """
    said = one_line(error)
    if isinstance(error, RuntimeError) and "more than one stateful callback" in said:
        return UsageError(
            "trainer.callbacks has a callback twice with the same settings, as when a configuration with callbacks+ is given"
            f" twice: leave one out ({one_line(error, 80)})."
        )
    if isinstance(error, MisconfigurationException | ValueError | TypeError | ModuleNotFoundError):
        return UsageError(f"the trainer can't be made: {said}. Change trainer.* in the configuration.")
    return None


def check_clock(trainer: Trainer, interval: Any) -> None:
    """Refuse validations by the clock where several processes train: each has a clock of its own, and validates alone.

    Args:
        trainer: the trainer.
        interval: ``trainer.val_check_interval``.

    Raises:
        UsageError: it is a time, and there are several processes.
    """
    if trainer.world_size > 1 and not isinstance(interval, int | float | None):
        raise UsageError(
            f"trainer.val_check_interval must be a number with several processes, got the time {interval}: each process"
            " would ask its own clock. Set it to a number of batches or a share of the epoch."
        )


def wrong_setting(error: BaseException, folder: Path) -> MTPError | None:
    """The sentence for a setting that Lightning or an optimizer refuses while it starts, or a file that it may not touch.

    Args:
        error: what was raised.
        folder: the run's folder.

    Returns:
        The error to raise instead, or None for what is not known.
    """
    said = one_line(error)
    if isinstance(error, ValueError | TypeError):
        if said.startswith("`val_check_interval`"):
            return UsageError(f"{said}. Change trainer.val_check_interval.")
        frames = [frame.name for frame in traceback.extract_tb(error.__traceback__)]
        if "configure_optimizers" in frames and "setup_data" not in frames:  # a schedule may ask how long the data is
            return UsageError(f"model.optimizer or model.lr_scheduler can't be made: {said}. Change its init_args.")
    if isinstance(error, PermissionError) and error.filename is not None:
        path = Path(os.fsdecode(error.filename))
        instead = " or the loggers' save_dir" if path.absolute().is_relative_to(folder.absolute()) else ""
        return RunError(f"{str(path)!r}: {os_reason(error)}. Change its permissions{instead}.")
    if isinstance(error, MisconfigurationException):
        return UsageError(f"the trainer can't run so: {said}. Change trainer.* in the configuration.")
    return None
