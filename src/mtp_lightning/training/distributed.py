# SPDX-License-Identifier: Apache-2.0
"""What callbacks of long runs share: stopping all processes with one message, and where a run's checkpoints lie."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NoReturn

import torch.distributed
from lightning import Trainer

from mtp_lightning.errors import RunError


def gather(value: Any) -> list[Any]:
    """A value of every process, in each of them. All processes must call it.

    Args:
        value: this process's; plain types.

    Returns:
        One of each process, by rank.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [value]
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def stop_all(trainer: Trainer, message: str) -> NoReturn:
    """Stop, where all processes know that they must; one of them says why.

    Args:
        trainer: the trainer.
        message: what is wrong.

    Raises:
        RunError: in the first process.
        SystemExit: in the others, with 0: Lightning kills the first as soon as another one ends with an error, and then
            nothing would be said.
    """
    if trainer.is_global_zero:
        raise RunError(message)
    raise SystemExit(0)


def run_folder(trainer: Trainer) -> Path:
    """The folder of a run: the first logger's. All processes must call it."""
    return Path(trainer.log_dir or trainer.default_root_dir)


def checkpoint_folders(trainer: Trainer) -> list[Path]:
    """Folders that a run writes checkpoints to; the first one is where ``last.ckpt`` goes. All processes must call it.

    Args:
        trainer: the trainer.

    Returns:
        Folders; they may not be there yet.
    """
    named = [Path(folder) for each in trainer.checkpoint_callbacks if (folder := getattr(each, "dirpath", None))]
    return [*named, run_folder(trainer) / "checkpoints"]


def figures_are_logged(trainer: Trainer) -> bool:
    """Whether Lightning is about to give the figures of a training step to the loggers.

    It keeps the answer to itself, so it is asked for in this one place. Where it can't be asked any more the answer is yes:
    figures are then worked out more often than needed.

    Args:
        trainer: the trainer, in a training batch.

    Returns:
        Whether, by ``log_every_n_steps`` and by a stop that was asked for so far.
    """
    connector = getattr(trainer, "_logger_connector", None)
    return bool(getattr(connector, "should_update_logs", True))


def validation_is_due(trainer: Trainer) -> bool:
    """Whether a validation follows the training batch that has just ended.

    A checkpoint that is written before it would make a resumed run leave it out. The validation that Lightning adds where a
    run is stopped early does not count: a run that is not stopped has none there.

    Args:
        trainer: the trainer, in ``on_train_batch_end``.

    Returns:
        Whether Lightning is about to validate.
    """
    fetcher = trainer.fit_loop._data_fetcher
    stop, trainer.should_stop = trainer.should_stop, False
    try:
        return fetcher is not None and trainer.fit_loop.epoch_loop._should_check_val_fx(fetcher)
    finally:
        trainer.should_stop = stop
