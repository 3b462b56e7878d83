# SPDX-License-Identifier: Apache-2.0
"""Damaged, foreign and unreadable files: the error names the file or key, and nothing that was there is lost."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import error_of, mtp, save_base
from saved import files_of
from tiny_run import LAST
from toy_tokenizers import word_tokenizer
from trained_run import CONTEXT

from mtp_lightning.commands.lightning_cli import MTPCLI
from mtp_lightning.errors import UsageError
from mtp_lightning.trainer.wrong_settings import setting_error


def change(path: str, alter: Callable[[dict[str, Any]], object]) -> None:
    """Change what is in a checkpoint."""
    checkpoint = torch.load(path, weights_only=True)
    alter(checkpoint)
    torch.save(checkpoint, path)


CHANGES: dict[str, Callable[[], object]] = {
    "truncated": lambda: os.truncate(LAST, 1000),
    "pickle": lambda: Path(LAST).write_bytes(b"cos\nsystem\n(S'echo run'\ntR."),
    "mask_embeddings": lambda: change(LAST, lambda checkpoint: checkpoint["state_dict"].pop("model.mask_embeddings")),
    "optimizer_states": lambda: change(LAST, lambda checkpoint: checkpoint.pop("optimizer_states")),
}


@pytest.mark.parametrize(
    ("command", "damage", "message"),
    [
        ("fit", "truncated", f"'{LAST}' can't be read"),
        ("generate", "pickle", f"'{LAST}' can't be read"),
        ("fit", "mask_embeddings", "model.mask_embeddings should be (3, 32) and is absent"),
        ("generate", "mask_embeddings", "mask_embeddings should be (3, 32) and is absent"),
        ("fit", "optimizer_states", f"'{LAST}' has no optimizer_states"),
    ],
)
def test_a_damaged_checkpoint(run: Path, here: Path, capsys, command: str, damage: str, message: str) -> None:
    CHANGES[damage]()
    before = files_of(here)
    configured = ["--config", "config.yaml", "--ckpt_path", LAST]
    words = [LAST, "--prompt", "one"] if command == "generate" else configured
    assert message in error_of(capsys, 1, command, *words)
    assert files_of(here) == before


@pytest.mark.parametrize(
    ("command", "key", "value"),
    [
        ("fit", "model.num_masks", "4"),
        ("test", "model.base_model", "wider"),
    ],
)
def test_a_checkpoint_of_other_settings(run: Path, here: Path, capsys, command: str, key: str, value: str) -> None:
    save_base(here / "wider", "llama", word_tokenizer(), torch.float32, max_position_embeddings=CONTEXT, hidden_size=40)
    before = files_of(run)
    # Seen before the data is read.
    no_data = [word for split in ("train", "validation", "test") for word in (f"--data.{split}", "no.jsonl")]
    message = error_of(capsys, 1, command, "--config", "config.yaml", "--ckpt_path", LAST, f"--{key}", value, *no_data)
    assert f"({key})" in message
    assert files_of(run) == before


def test_predict_compares_only_what_is_named(run: Path, here: Path, capsys) -> None:
    """A key that is left out has a default, and the checkpoint's own value counts; one that is named must be the same."""
    words = [
        "predict",
        "--ckpt_path",
        LAST,
        "--prompts",
        "prompts.jsonl",
        "--max_new_tokens",
        "2",
        "--model.base_model",
        "base",
    ]
    # The checkpoint has 3 masks, rank 2 and a GRU head. What only training needs, as a logger, may be missing here.
    (here / "logger.yaml").write_text("trainer: {logger: {class_path: lightning.pytorch.loggers.CometLogger}}")
    assert mtp(*words, "--config", "logger.yaml", "--model.lora.dropout", "0.5", "--model.lora.alpha", "4") == 0
    (here / "default.yaml").write_text("model: {num_masks: 8}")  # the default, named
    assert "model.num_masks" in error_of(capsys, 1, *words, "--config", "default.yaml")
    assert "model.lora.target_modules" in error_of(capsys, 1, *words, "--model.lora.target_modules", "[q_proj]")
    no_head = ["--model.sampler_head", "false", "--model.losses", "{base: BaseCrossEntropy}"]
    assert "model.sampler_head" in error_of(capsys, 1, *words, *no_head)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("config.json", {"hidden_size": 64}, "base model 'base' could not be loaded"),
        ("tokenizer.json", None, "no tokenizer"),
    ],
)
def test_a_damaged_base(run: Path, here: Path, capsys, name: str, content: dict[str, Any] | None, expected: str) -> None:
    path = here / "base" / name
    path.write_text("{}" if content is None else json.dumps(json.loads(path.read_bytes()) | content))
    before = files_of(here)
    assert expected in error_of(capsys, 1, "fit", "--config", "config.yaml", "--overwrite")
    assert files_of(here) == before


@pytest.mark.parametrize(
    ("option", "name"),
    [
        ("--trainer.val_check_interval 0", "trainer.val_check_interval"),
        (
            "--model.lr_scheduler mtp_lightning.schedules.WarmupCosine --trainer.max_steps -1 --trainer.max_epochs 1"
            " --trainer.val_check_interval 1000",
            "`val_check_interval`",  # found while the schedule is built
        ),
        ("--model.optimizer.lr -1", "model.optimizer"),
        ("--trainer.gradient_clip_val -1", "trainer.gradient_clip_val"),
        ("--trainer.gradient_clip_val .nan", "trainer.gradient_clip_val"),
        ("--seed_everything -5", "seed_everything"),
    ],
)
def test_a_start_that_fails_leaves_the_run_as_it_was(run: Path, here: Path, capsys, option: str, name: str) -> None:
    before = files_of(here)
    assert name in error_of(capsys, 2, "fit", "--config", "config.yaml", "--overwrite", *option.split())
    assert files_of(here) == before


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("run/metrics.csv", "'run/metrics.csv': Permission denied. Change its permissions or the loggers' save_dir."),
        ("train.jsonl", "'train.jsonl': Permission denied. Change its permissions."),
    ],
)
def test_a_file_that_may_not_be_touched(path: str, message: str) -> None:
    assert str(setting_error(PermissionError(errno.EACCES, "Permission denied", path), Path("run"))) == message
    assert setting_error(PermissionError(errno.EPERM, "Operation not permitted"), Path("run")) is None


class Made(MTPCLI):
    """``mtp`` up to where it would run; what is not refused is to start no processes."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Nothing."""


def test_validations_by_the_clock_need_one_process(run: Path) -> None:
    words = ["fit", "--config", "config.yaml", "--overwrite", "--trainer.val_check_interval", "00:00:10:00"]
    Made(words)
    with pytest.raises(UsageError, match="trainer.val_check_interval"):
        Made([*words, "--trainer.devices", "2", "--trainer.strategy", "ddp"])
