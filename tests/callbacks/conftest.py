# SPDX-License-Identifier: Apache-2.0
"""A tiny base on disk with its tokenizer, a module and a trainer for it. No network."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bigram import bigram_base, planted_drafts
from lightning import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader
from toy_tokenizers import byte_tokenizer

from mtp_lightning.decoding.execution import step as decoding_step
from mtp_lightning.modeling.gated_lora import LoRA
from mtp_lightning.modeling.masking import build_masked_input
from mtp_lightning.training.module import MTPModule
from mtp_lightning.types import TokenRow

NUM_MASKS = 3


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tokenizer = byte_tokenizer(["<eos>"], "<eos>")
    tokenizer.save_pretrained(folder)
    bigram_base(len(tokenizer), len(tokenizer)).save_pretrained(folder)
    return folder


@pytest.fixture
def new_module(base_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], MTPModule]:
    """Makes modules whose drafts are often accepted; the trainer or the test loads their weights."""
    vocab_size = json.loads((base_folder / "config.json").read_text())["vocab_size"]
    monkeypatch.setattr(decoding_step, "draft_block", planted_drafts(vocab_size, vocab_size))

    def make() -> MTPModule:
        return MTPModule(str(base_folder), dtype="float64", num_masks=NUM_MASKS, lora=LoRA(rank=2), sampler_head=False)

    return make


@pytest.fixture
def module(new_module: Callable[[], MTPModule]) -> MTPModule:
    return new_module()


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    domains = ("code", "code", "maths", "code", "maths")
    rows = [{"prompt": text, "domain": domain} for text, domain in zip("abcde", domains, strict=True)]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def batches() -> DataLoader:
    """Four batches of two rows."""
    made = []
    for number in range(4):
        ids = torch.randint(5, 200, (2, 12), generator=torch.Generator().manual_seed(number))
        rows = [TokenRow(row, row.clone(), torch.zeros_like(row), 2 * number + r) for r, row in enumerate(ids)]
        made.append(build_masked_input(rows, NUM_MASKS))
    return DataLoader(made, batch_size=None)


@pytest.fixture
def fit(tmp_path: Path, batches: DataLoader) -> Callable[..., Trainer]:
    """Fits a module for an epoch of four steps, validates after each two, and gives the trainer."""

    def run(module: MTPModule, *callbacks: Callback, **options: Any) -> Trainer:
        settings = {
            "accelerator": "cpu",
            "logger": CSVLogger(tmp_path, name="", version=""),
            "max_epochs": 1,
            "val_check_interval": 2,
            "num_sanity_val_steps": 1,
            "enable_progress_bar": False,
            "enable_checkpointing": False,
            "enable_model_summary": False,
            **options,
        }
        trainer = Trainer(callbacks=list(callbacks), **settings)
        trainer.fit(module, batches, batches)
        return trainer

    return run
