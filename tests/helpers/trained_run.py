# SPDX-License-Identifier: Apache-2.0
"""A run of ``mtp fit`` with what it wrote, for tests of the commands; the fixtures are in ``conftest.py``. No tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from command_line import mtp, read_metrics, save_base, write_rows
from tiny import greedy_text
from tiny_run import BEST, LAST, LOGGER
from toy_tokenizers import word_tokenizer
from transformers import AutoModelForCausalLM

CONTEXT, NUM_MASKS, STEPS = 96, 3, 4
CONFIG: dict[str, Any] = {
    "model": {
        "base_model": "base",
        "num_masks": NUM_MASKS,
        "lora": {"rank": 2},
        "sampler_head": {"class_path": "GRUSamplerHead", "init_args": {"hidden_size": 8}},
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}},
        "lr_scheduler": {"class_path": "mtp_lightning.schedules.WarmupConstant", "init_args": {"warmup_steps": 2}},
    },
    "data": {"train": "train.jsonl", "validation": "validation.jsonl", "max_length": 32, "batch_size": 4},
    "trainer": {
        "accelerator": "cpu",
        "max_steps": STEPS,
        "val_check_interval": 2,
        "log_every_n_steps": 1,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "logger": [LOGGER],
        "callbacks+": [
            BEST,
            # Not save_last: it writes when the best one is written.
            {
                "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                "init_args": {"filename": "last", "enable_version_counter": False},
            },
        ],
    },
}


def train(folder: Path) -> None:
    """Write a base, data and a configuration into ``folder``, and what one run of ``fit`` makes of them."""
    tokenizer = word_tokenizer()
    assert tokenizer.pad_token is None
    save_base(folder / "base", "llama", tokenizer, torch.float32, max_position_embeddings=CONTEXT)
    draw = torch.Generator().manual_seed(0)
    words = tokenizer.convert_ids_to_tokens(list(range(9, 15)))
    texts = [" ".join(words[i] for i in torch.randint(6, (20,), generator=draw).tolist()) for _ in range(24)]
    write_rows(folder / "train.jsonl", [{"text": text} for text in texts])
    # What the base itself writes: there its own argmax is right, and the forced reference has something to count.
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    prompts = torch.randint(9, 15, (6, 4), generator=draw)
    write_rows(folder / "validation.jsonl", [{"input_ids": [*p.tolist(), *greedy_text(base, p, 20)]} for p in prompts])
    write_rows(folder / "prompts.jsonl", [{"prompt": "one two", "domain": "a"}, {"prompt": "six"}])
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert mtp("fit", "--config", "config.yaml") == 0


def fit(*options: object) -> int:
    return mtp("fit", "--config", "config.yaml", *options)


def without_times(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in line.items() if "second" not in name} for line in lines]


def as_if_trained_here() -> None:
    """Let ``LAST`` say that its base is in the current folder, which is a copy of the one where it was trained."""
    checkpoint = torch.load(LAST, weights_only=True)
    checkpoint["mtp_settings"]["base_folder"] = str(Path("base").resolve())
    torch.save(checkpoint, LAST)


def losses(folder: Path) -> list[str]:
    return [line["train/loss"] for line in read_metrics(folder) if "train/loss" in line]


def validations(folder: Path) -> list[dict[str, str]]:
    return [line for line in read_metrics(folder) if "val/loss" in line]


def weights(checkpoint: str | Path) -> dict[str, torch.Tensor]:
    return torch.load(checkpoint, weights_only=True)["state_dict"]


def json_lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]
