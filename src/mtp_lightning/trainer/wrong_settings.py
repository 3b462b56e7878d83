# SPDX-License-Identifier: Apache-2.0
"""One-line messages for settings that Lightning or an optimizer refuses in its own words, or accepts and fails at later."""

from __future__ import annotations

import os
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning import Trainer
from lightning.fabric.utilities.exceptions import MisconfigurationException

from mtp_lightning.errors import MTPError, RunError, UsageError, one_line, os_reason


def check_training_state(path: str, checkpoint: Mapping[str, Any], command: str) -> None:
    """Refuse a checkpoint of weights alone for a command (fit, validate or test) for which Lightning needs more."""
    needed = ["pytorch-lightning_version"]
    needed += ["loops", "optimizer_states", "lr_schedulers"] if command == "fit" else []
    missing = [name for name in needed if name not in checkpoint]
    if missing:
        raise RunError(f"checkpoint {path!r} has no {', '.join(missing)}, which mtp {command} needs.")


def check_validation_interval(trainer: Trainer, interval: Any) -> None:
    """Refuse validations by the clock with several processes: each has its own clock, and they would wait for each other."""
    if trainer.world_size > 1 and not isinstance(interval, int | float | None):
        raise UsageError(f"trainer.val_check_interval must count batches with several processes, got the time {interval}.")


def trainer_error(error: BaseException) -> UsageError | None:
    """The error to raise instead of one from the trainer's constructor, or None if it is not known."""
    reason = one_line(error)
    if isinstance(error, RuntimeError) and "more than one stateful callback" in reason:
        return UsageError(f"trainer.callbacks has a callback twice: leave one out ({one_line(error, 80)}).")
    if isinstance(error, MisconfigurationException | ValueError | TypeError | ModuleNotFoundError):
        return UsageError(f"invalid trainer configuration: {reason}. Change trainer.*.")
    return None


def setting_error(error: BaseException, folder: Path) -> MTPError | None:
    """The error to raise instead of one about a setting or a file's permissions while a run starts; None if not known."""
    reason = one_line(error)
    if isinstance(error, ValueError | TypeError):
        if reason.startswith("`val_check_interval`"):
            return UsageError(f"{reason}. Change trainer.val_check_interval.")
        frames = [frame.name for frame in traceback.extract_tb(error.__traceback__)]
        if "configure_optimizers" in frames and "setup_data" not in frames:  # a schedule may ask how long the data is
            return UsageError(f"model.optimizer or model.lr_scheduler can't be made: {reason}. Change its init_args.")
    if isinstance(error, PermissionError) and error.filename is not None:
        path = Path(os.fsdecode(error.filename))
        instead = " or the loggers' save_dir" if path.absolute().is_relative_to(folder.absolute()) else ""
        return RunError(f"{str(path)!r}: {os_reason(error)}. Change its permissions{instead}.")
    if isinstance(error, MisconfigurationException):
        return UsageError(f"invalid trainer configuration: {reason}. Change trainer.*.")
    return None
