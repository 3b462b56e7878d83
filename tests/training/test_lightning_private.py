# SPDX-License-Identifier: Apache-2.0
"""What is read from the inside of Lightning's loop, against what Lightning then does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.strategies import ModelParallelStrategy

from mtp_lightning.training.lightning_private import (
    attached_trainer,
    cluster_environment,
    is_accumulating,
    is_logging_step,
    step_metrics,
    validation_follows,
)


class Constant(LightningModule):
    """Logs the number of its batch and learns nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.log("train/batch", float(batch_idx))
        return self.weight * 1.0

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Predictions(Callback):
    """After each batch what is predicted, and what came of it."""

    def __init__(self) -> None:
        self.predicted: list[tuple[bool, bool, bool]] = []
        self.seen: list[list[bool]] = []
        self.steps = 0
        self.logged: list[dict[str, Any]] = []

    def on_train_batch_end(self, trainer: Trainer, *others: Any) -> None:
        stepped, self.steps = trainer.global_step != self.steps, trainer.global_step
        accumulating = is_accumulating(trainer)
        logs = not accumulating and is_logging_step(trainer)
        self.predicted.append((not accumulating, logs, validation_follows(trainer)))
        self.seen.append([stepped, False, False])
        assert step_metrics(trainer).keys() == {"train/batch"}

    def on_validation_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.seen[-1][2] = True


class Listener(CSVLogger):
    """Notes when Lightning logs."""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        super().log_metrics(metrics, step)
        if "train/batch" in metrics:
            self.predictions.seen[-1][1] = True
            assert step == self.predictions.steps - 1


@pytest.mark.parametrize(
    "options", [{"check_val_every_n_epoch": None, "val_check_interval": 3}, {"val_check_interval": 1.0, "max_epochs": 2}]
)
def test_predictions_come_true(tmp_path: Path, options: dict[str, Any]) -> None:
    """Epochs of 7 batches, 3 to a step and 1 for the last of an epoch; every other step is logged."""
    model, predictions, logger = Constant(), Predictions(), Listener(tmp_path)
    logger.predictions = predictions
    assert attached_trainer(model) is None
    trainer = Trainer(
        accelerator="cpu",
        logger=logger,
        callbacks=[predictions],
        max_steps=5,
        accumulate_grad_batches=3,
        log_every_n_steps=2,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(model, torch.zeros(7, 1), torch.zeros(1, 1))
    assert attached_trainer(model) is trainer and cluster_environment(trainer) is not None
    seen = [tuple(batch) for batch in predictions.seen]
    assert len(seen) == 13 and {value for batch in seen for value in batch} == {False, True}
    assert predictions.predicted == seen, f"Lightning {lightning.__version__} steps, logs or validates at other batches"


def test_lightning_has_the_private_parts_that_are_used(tmp_path: Path) -> None:
    trainer: Any = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    loop, strategy = trainer.fit_loop, ModelParallelStrategy()
    names = {
        "_logger_connector.metrics": type(trainer._logger_connector),
        "_accelerator_connector.cluster_environment": trainer._accelerator_connector,
        "_data_fetcher": loop,
        "_should_check_val_fx": loop.epoch_loop,
        "_batches_that_stepped": loop.epoch_loop,
        "_on_before_fetch": loop.epoch_loop,
        "_on_after_fetch": loop.epoch_loop,
        "_experiment": CSVLogger(tmp_path),
        "_check_log_dir_exists": ExperimentWriter,
        "_data_parallel_size": strategy,
        "_tensor_parallel_size": strategy,
        **dict.fromkeys(("_get", "_parser", "_parse_ckpt_path", "_prepare_subcommand_parser"), LightningCLI),
        **dict.fromkeys(("_set_seed", "_run_subcommand"), LightningCLI),
    }
    missing = [name for name, owner in names.items() if not hasattr(owner, name.rpartition(".")[2])]
    assert not missing, f"Lightning {lightning.__version__} has no {missing}; see lightning_private.py for what happens then"


def test_without_them_a_public_way_is_taken() -> None:
    class Public:
        should_stop = True
        fit_loop = type("Loop", (), {"epoch_loop": None})
        logged_metrics = {"train/loss": 1.0, "val/loss": 2.0}
        strategy = type("Strategy", (), {"cluster_environment": "slurm"})

    trainer: Any = Public()
    assert step_metrics(trainer) == {"train/loss": 1.0}
    assert not validation_follows(trainer) and trainer.should_stop
    assert cluster_environment(trainer) == "slurm"
