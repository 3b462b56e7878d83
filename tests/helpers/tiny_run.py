# SPDX-License-Identifier: Apache-2.0
"""A run of ``mtp fit`` that takes a second: base, data, prompts, configuration. Helpers of the tests, no tests."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
import yaml
from command_line import read_metrics, save_base, write_rows
from toy_tokenizers import word_tokenizer

LAST = "run/checkpoints/last.ckpt"
LOGGER = {
    "class_path": "lightning.pytorch.loggers.CSVLogger",
    "init_args": {"save_dir": "run", "name": "", "version": ""},
}
"""Writes to the folder ``run``."""
BEST: dict[str, Any] = {
    "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
    "init_args": {
        "monitor": "val/forced_acceptance_length",
        "mode": "max",
        "filename": "best",
        "enable_version_counter": False,
    },
}
"""Keeps the checkpoint with the best forced acceptance length."""
CONFIG: dict[str, Any] = {
    "model": {
        "base_model": "base",
        "dtype": "float64",
        "num_masks": 2,
        "lora": {"rank": 2, "dropout": 0.2},  # the random state has something to decide
        "sampler_head": {"class_path": "GRUSamplerHead", "init_args": {"hidden_size": 8}},
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}},
        "lr_scheduler": {
            "class_path": "mtp_lightning.schedules.WarmupCosine",
            "init_args": {"warmup_steps": 3, "floor": 0.1, "total_steps": 24},
        },
        "loss_schedules": {"base": {"start": 1.0, "end": 0.0, "steps": 10}},
        "num_masks_schedule": {"start": 1, "end": 2, "begin": 2, "steps": 6},
    },
    # 11 batches an epoch: steps, validations and epochs end at different places.
    "data": {
        "train": "train.jsonl",
        "validation": "validation.jsonl",
        "max_length": 12,
        "batch_size": 2,
        "block_fraction": 0.5,
    },
    "trainer": {
        "accelerator": "cpu",
        "max_steps": 14,
        "val_check_interval": 6,
        "check_val_every_n_epoch": None,
        "num_sanity_val_steps": 1,
        "log_every_n_steps": 1,
        "gradient_clip_val": 1.0,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "logger": [LOGGER],
        "callbacks+": [
            BEST,
            {"class_path": "mtp_lightning.callbacks.LastCheckpoint", "init_args": {"every_n_steps": 4}},
            {
                "class_path": "mtp_lightning.callbacks.AcceptanceEvaluation",
                "init_args": {"prompts": "prompts.jsonl", "max_new_tokens": 6, "every_n_steps": 5, "num_masks": 2},
            },
        ],
    },
}


def write_run(folder: Path, rows: int = 22) -> dict[str, Any]:
    """Write everything but the run into ``folder``; gives the configuration, to change and write again."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = word_tokenizer()
    save_base(folder / "base", "llama", tokenizer, torch.float64, max_position_embeddings=32)
    draw = torch.Generator().manual_seed(0)
    ids = [torch.randint(9, 15, (8 + n % 5,), generator=draw).tolist() for n in range(rows)]
    write_rows(folder / "train.jsonl", [{"input_ids": each} for each in ids])
    write_rows(folder / "validation.jsonl", [{"input_ids": each} for each in ids[:3]])
    write_rows(folder / "prompts.jsonl", [{"prompt": "one two", "domain": "a"}, {"prompt": "six", "domain": "b"}])
    write_config(folder, CONFIG)
    return copy.deepcopy(CONFIG)


def write_config(folder: Path, config: dict[str, Any]) -> None:
    """Write ``config.yaml``."""
    (folder / "config.yaml").write_text(yaml.safe_dump(config))


def final(folder: Path) -> tuple[list[dict[str, str]], dict[str, torch.Tensor]]:
    """The figures and the weights that a run in ``folder`` ended with."""
    return read_metrics(folder / "run"), torch.load(folder / LAST, weights_only=True)["state_dict"]


def assert_same_run(folder: Path, other: Path) -> None:
    """Two runs ended alike: every figure of metrics.csv, once, and every weight, bit for bit."""
    (lines, weights), (other_lines, other_weights) = final(folder), final(other)
    assert lines == other_lines
    assert weights.keys() == other_weights.keys()
    assert [name for name in weights if not weights[name].equal(other_weights[name])] == []
