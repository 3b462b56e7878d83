# SPDX-License-Identifier: Apache-2.0
"""A training run that records its batches. A file of its own: spawned processes must import it."""

from __future__ import annotations

import os
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from toy_tokenizers import word_tokenizer

from mtp_lightning.data import MTPDataModule


class Recorder(LightningModule):
    """A module with one parameter that records its batches."""

    num_masks = 2
    context = 64
    vocab_size = 17

    def __init__(self) -> None:
        super().__init__()
        self.tokenizer = word_tokenizer()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[tuple] = []
        self.validated: list[tuple] = []

    def training_step(self, batch, batch_idx: int):
        self.seen.append((self.current_epoch, batch.row_ids.tolist(), batch.starts.tolist(), batch.counts.tolist()))
        return self.weight * 1.0

    def validation_step(self, batch, batch_idx: int) -> None:
        self.validated.append((batch.row_ids.tolist(), batch.starts.tolist()))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(
    folder: Path, data: MTPDataModule, epochs: int = 3, ckpt_path: str | None = None, save: bool = False, **options: Any
) -> Recorder:
    """Train, with a checkpoint after every optimizer step if ``save``."""
    module = Recorder()
    callbacks = [ModelCheckpoint(folder, "{step}", save_top_k=-1, every_n_train_steps=1)] if save else []
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        callbacks=callbacks,
        enable_checkpointing=save,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **options,
    )
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
    return module


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run, in the order of their steps."""
    return sorted(folder.glob("*.ckpt"), key=lambda file: int(re.findall(r"\d+", file.name)[0]))


def whole_and_resumed(rank: int, folder: str, data_options: dict[str, Any], step: int) -> tuple[list, list]:
    """On one of two ranks: the batches of an uninterrupted run, and of one resumed after a step."""
    warnings.filterwarnings("ignore")
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "test", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    options = {"devices": 2, "strategy": "ddp", "accumulate_grad_batches": 2}
    whole = fit(Path(folder), MTPDataModule(**data_options), 2, save=True, **options)
    torch.distributed.barrier()
    checkpoint = str(checkpoints(Path(folder))[step - 1])
    return whole.seen, fit(Path(folder), MTPDataModule(**data_options), 2, checkpoint, **options).seen
