# SPDX-License-Identifier: Apache-2.0
"""Damaged, foreign and unreadable files: checkpoints, saved folders, bases. What is said, and that nothing is lost."""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import error_of, mtp, save_base
from tiny_run import LAST
from toy_tokenizers import word_tokenizer
from trained_run import CONTEXT, contents

from mtp_lightning.commands.lightning_cli import MTPCLI
from mtp_lightning.errors import UsageError
from mtp_lightning.trainer.wrong_settings import setting_error


@pytest.mark.parametrize("command", ["fit", "validate", "predict", "generate"])
def test_files_that_are_no_checkpoint(run: Path, capsys, command: str) -> None:
    whole = Path(LAST).read_bytes()
    unreadable = "checkpoint '{}' can't be read; it may be cut short or no checkpoint. Use another one."
    cases = {
        "truncated.ckpt": (whole[: len(whole) // 2], unreadable),
        "empty.ckpt": (b"", unreadable),
        "text.ckpt": (b"hello\n", unreadable),
        "code.ckpt": (b"cos\nsystem\n(S'echo run'\ntR.", unreadable),
    }
    for name, (content, _) in cases.items():
        Path(name).write_bytes(content)
    torch.save({"state_dict": {}}, "other.ckpt")
    cases["other.ckpt"] = (
        b"",
        "checkpoint '{}' was not written by mtp fit: it has no entry 'mtp_settings'. Use another one.",
    )
    before = contents(run)
    for name, (_, message) in cases.items():
        words = [name, "--prompt", "one"] if command == "generate" else ["--config", "config.yaml", "--ckpt_path", name]
        extra = ["--prompts", "prompts.jsonl"] if command == "predict" else []
        assert error_of(capsys, 1, command, *words, *extra) == message.format(name)
    assert contents(run) == before


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
def test_a_checkpoint_of_other_settings(run: Path, here: Path, capsys, command: str) -> None:
    save_base(here / "wider", "llama", word_tokenizer(), torch.float32, max_position_embeddings=CONTEXT, hidden_size=40)
    before = contents(run)
    path = "mtp_lightning.sampler_heads.GRUSamplerHead"
    head = "{'class_path': '" + path + "', 'init_args': {'hidden_size': %s, 'read_hidden': False}}"
    shape = "{'model_type': 'llama', 'hidden_size': %s, 'num_hidden_layers': 2, 'vocab_size': 17}"
    for key, value, name, there, here_ in (
        ("model.num_masks", 4, "num_masks", 3, 4),
        ("model.lora.rank", 4, "LoRA rank", 2, 4),
        ("model.sampler_head.hidden_size", 16, "sampler head", head % 8, head % 16),
        ("model.base_model", "wider", "base model", shape % 32, shape % 40),
    ):
        words = ["--config", "config.yaml", "--ckpt_path", LAST, f"--{key}", value]
        # Seen before the data is read.
        no_data = [word for split in ("train", "validation", "test") for word in (f"--data.{split}", "no.jsonl")]
        found = error_of(capsys, 1, command, *words, *no_data)
        if command == "predict" and value == "wider":  # it reads the base itself, which may have moved
            assert found.startswith("the checkpoint belongs to a base with hidden_size 32, and 'wider' has 40.")
            continue
        changed = key.removesuffix(".hidden_size")
        assert found == (
            f"the checkpoint's {name} is {there}, the configuration's is {here_}. Change {changed} or --ckpt_path."
        )
    assert contents(run) == before


def test_predict_asks_for_no_more_than_is_named(run: Path, here: Path, capsys) -> None:
    """A key that is left out has a default, and the checkpoint's own value counts; one that is named must be the same."""
    predict = ["predict", "--ckpt_path", LAST, "--prompts", "prompts.jsonl", "--max_new_tokens", "2"]
    words = [*predict, "--model.base_model", "base"]
    assert mtp(*words) == 0  # of the checkpoint's 3 masks, rank 2 and GRU head the configuration says nothing
    assert mtp(*words, "--model.lora.dropout", "0.5", "--model.num_masks", "3", "--model.lora.gated", "true") == 0
    layers = ["--model.lora.target_modules", "[q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj]"]
    assert mtp(*words, "--model.lora.alpha", "4", *layers) == 0  # what the checkpoint's null stands for
    validate = ["validate", "--config", "config.yaml", "--ckpt_path", LAST]
    assert mtp(*validate, "--model.lora.alpha", "4", "--model.lora.target_modules", "all-linear") == 0
    capsys.readouterr()
    for option, value in (("alpha", "5"), ("target_modules", "[q_proj]"), ("target_modules", r".*\.0\..*proj")):
        for command in (words, validate):
            found = error_of(capsys, 1, *command, f"--model.lora.{option}", value)
            assert found.startswith(f"the checkpoint's LoRA {option} is None, the configuration's is ")
    (here / "default.yaml").write_text("model: {num_masks: 8}")  # the default, named
    found = error_of(capsys, 1, *words, "--config", "default.yaml")
    assert found == "the checkpoint's num_masks is 3, the configuration's is 8. Change model.num_masks or --ckpt_path."
    found = error_of(capsys, 1, *words, "--model.sampler_head", "false", "--model.losses", "{base: BaseCrossEntropy}")
    assert re.fullmatch(r"the checkpoint's sampler head is .*GRU.*, the configuration's is None\. Change .*", found)
    # What only training needs may be missing here.
    (here / "logger.yaml").write_text("trainer: {logger: {class_path: lightning.pytorch.loggers.CometLogger}}")
    assert mtp(*words, "--config", "logger.yaml") == 0


def change(path: str, alter: Callable[[dict[str, Any]], object]) -> None:
    """Change what is in a checkpoint."""
    checkpoint = torch.load(path, weights_only=True)
    alter(checkpoint)
    torch.save(checkpoint, path)


@pytest.mark.parametrize("command", ["fit", "validate", "predict", "generate", "export", "distill"])
@pytest.mark.parametrize("missing", ["num_masks", "state_dict"])
def test_a_checkpoint_without_an_entry(run: Path, here: Path, capsys, command: str, missing: str) -> None:
    change(LAST, lambda checkpoint: (checkpoint if missing == "state_dict" else checkpoint["mtp_settings"]).pop(missing))
    words = {
        "generate": [LAST, "--prompt", "one"],
        "export": ["--ckpt_path", LAST, "--output", "saved"],
        "distill": [LAST, "--prompts", "prompts.jsonl", "--output", "a.jsonl"],
        "predict": ["--config", "config.yaml", "--ckpt_path", LAST, "--prompts", "prompts.jsonl"],
    }.get(command, ["--config", "config.yaml", "--ckpt_path", LAST])
    before = contents(here)
    assert error_of(capsys, 1, command, *words) == f"checkpoint '{LAST}' is damaged: it has no {missing}. Use another one."
    assert contents(here) == before


def test_a_checkpoint_without_a_weight_is_not_measured_without_it(run: Path, here: Path, capsys) -> None:
    name = "model.mask_embeddings"
    change(LAST, lambda checkpoint: checkpoint["state_dict"].pop(name))
    before = contents(here)
    for command in ("fit", "validate"):
        found = error_of(capsys, 1, command, "--config", "config.yaml", "--ckpt_path", LAST)
        assert found == (f"the checkpoint is damaged: {name} should be (3, 32) and is absent. Give another --ckpt_path.")
    assert contents(here) == before


def test_a_checkpoint_of_damaged_counts(run: Path, here: Path, capsys) -> None:
    change(LAST, lambda checkpoint: checkpoint.update(mtp_label_counts=torch.zeros(3)))
    before = contents(here)
    said = "mtp_label_counts should be 17 int64 numbers from 0 on and is (3,) torch.float32. It is damaged."
    for command in ("fit", "validate"):
        found = error_of(capsys, 1, command, "--config", "config.yaml", "--ckpt_path", LAST)
        assert found == f"the checkpoint does not fit: {said}"
    found = error_of(capsys, 1, "generate", LAST, "--prompt", "one")
    assert found == f"checkpoint '{LAST}' does not fit its own settings: {said}"
    assert contents(here) == before


@pytest.mark.parametrize("missing", ["optimizer_states", "loops", "pytorch-lightning_version"])
def test_a_checkpoint_that_training_cannot_go_on_from(run: Path, here: Path, capsys, missing: str) -> None:
    change(LAST, lambda checkpoint: checkpoint.pop(missing))
    before = contents(here)
    found = error_of(capsys, 1, "fit", "--config", "config.yaml", "--ckpt_path", LAST)
    assert found.startswith(f"checkpoint '{LAST}' has no {missing}: it holds weights alone, or was changed, and mtp fit")
    assert contents(here) == before


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("config.json", "{", "base model 'base' could not be loaded: "),
        ("config.json", "[]", "base model 'base' could not be loaded: "),
        (
            "config.json",
            {"hidden_size": 64},
            "base model 'base' could not be loaded: the shapes of its weights are not those",
        ),
        ("config.json", {"num_attention_heads": 0}, "base model 'base' could not be loaded: ZeroDivisionError: "),
        ("model.safetensors", None, "base model 'base' could not be loaded: SafetensorError: "),
        ("model.safetensors", "", "base model 'base' could not be loaded: SafetensorError: "),
        ("tokenizer.json", "{}", "no tokenizer could be loaded from 'base': KeyError: "),
        ("tokenizer.json", "{", "no tokenizer could be loaded from 'base': "),
    ],
)
def test_a_damaged_base(
    run: Path, here: Path, capsys, name: str, content: str | dict[str, Any] | None, expected: str
) -> None:
    path = here / "base" / name
    whole = path.read_bytes()
    if content is None:
        path.write_bytes(whole[: len(whole) // 2])
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(json.loads(whole) | content))
    before = contents(here)
    for words in (
        ["fit", "--config", "config.yaml"],
        ["distill", "base", "--prompts", "prompts.jsonl", "--output", "a.jsonl"],
    ):
        assert error_of(capsys, 1, *words).startswith(expected)
    assert contents(here) == before


@pytest.mark.parametrize(
    ("file", "words", "expected"),
    [
        ("config.yaml", "fit --config config.yaml", "configuration file 'config.yaml' can't be read: Permission denied."),
        (
            "train.jsonl",
            "fit --config config.yaml",
            "train.jsonl: it can't be read: Permission denied. Change its permissions.",
        ),
        (LAST, "validate --config config.yaml --ckpt_path {last}", "checkpoint '{last}' can't be read: Permission denied."),
        ("prompts.jsonl", "generate {last} --prompts prompts.jsonl", "prompts.jsonl: it can't be read: Permission denied."),
        ("run", "validate --config config.yaml --ckpt_path last.ckpt", "'run/metrics.csv': Permission denied. Change"),
        (
            ".",
            "distill base --prompts prompts.jsonl --output a.jsonl",
            "a.jsonl: expected a file that can be written: '.' can't",
        ),
        (
            ".",
            "benchmark {last} --prompts prompts.jsonl --output new",
            "new can't be written: '.' can't be written to. Give",
        ),
        (
            ".",
            "export --ckpt_path {last} --output new",
            "new can't be written: '.' can't be written to. Choose another folder.",
        ),
    ],
)
def test_no_permission(run: Path, here: Path, capsys, file: str, words: str, expected: str) -> None:
    Path("last.ckpt").write_bytes(Path(LAST).read_bytes())
    places = [Path(file), *Path(file).glob("metrics.csv")]
    before = contents(here)
    modes = [place.stat().st_mode for place in places]
    for place in places:
        place.chmod(0o555 if place.is_dir() else 0o400 if place.name == "metrics.csv" else 0)
    try:
        if any(os.access(place, os.W_OK) for place in places):
            pytest.skip("this user may read and write everything")
        assert error_of(capsys, 1, *words.format(last=LAST).split()).startswith(expected.format(last=LAST))
    finally:
        for place, mode in zip(places, modes, strict=True):
            place.chmod(mode)
    assert contents(here) == before


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("--trainer.val_check_interval 0", "trainer.val_check_interval must be above 0, got 0. Change trainer.val_check"),
        ("--trainer.val_check_interval 1000", "`val_check_interval` (1000) must be less than or equal to the number"),
        (
            "--model.lr_scheduler mtp_lightning.schedules.WarmupCosine --trainer.max_steps -1 --trainer.max_epochs 1"
            " --trainer.val_check_interval 1000",
            "`val_check_interval` (1000) must be less than or equal to the number",  # found while the schedule is made
        ),
        (
            "--model.optimizer.lr -1",
            "model.optimizer or model.lr_scheduler can't be made: Invalid learning rate: -1.0. Change",
        ),
        (
            "--model.lr_scheduler.warmup_steps -1",
            "warmup_steps must be 0 or more, got -1.",
        ),
        ("--config config.yaml", "trainer.callbacks has a callback twice with the same settings, as when a configuration"),
        ("--seed_everything -1", "seed_everything must be from 0 to 4294967295, got -1. Change seed_everything."),
    ],
)
def test_a_start_that_fails_leaves_the_run_as_it_was(run: Path, here: Path, capsys, option: str, expected: str) -> None:
    before = contents(here)
    assert error_of(capsys, 2, "fit", "--config", "config.yaml", *option.split()).startswith(expected)
    assert contents(here) == before


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("run/metrics.csv", "'run/metrics.csv': Permission denied. Change its permissions or the loggers' save_dir."),
        (Path("run/a.csv").absolute(), "a.csv': Permission denied. Change its permissions or the loggers' save_dir."),
        ("train.jsonl", "'train.jsonl': Permission denied. Change its permissions."),
    ],
)
def test_a_file_that_may_not_be_touched(path: str | Path, expected: str) -> None:
    found = setting_error(PermissionError(errno.EACCES, "Permission denied", path), Path("run"))
    assert str(found).endswith(expected)


def test_no_permission_for_what_is_no_file() -> None:
    assert setting_error(PermissionError(errno.EPERM, "Operation not permitted"), Path("run")) is None


def test_wrong_data_that_a_schedule_asks_for_is_no_wrong_schedule() -> None:
    def setup_data() -> None:
        raise ValueError("a row is wrong")

    def configure_optimizers(data: bool) -> None:
        setup_data() if data else int("no number")

    found = []
    for data in (False, True):
        with pytest.raises(ValueError) as caught:
            configure_optimizers(data)
        found.append(setting_error(caught.value, Path("run")))
    assert isinstance(found[0], UsageError) and found[1] is None


class Made(MTPCLI):
    """``mtp`` up to where it would run; what is not refused is to start no processes."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Nothing."""


def test_validations_by_the_clock_need_one_process(run: Path) -> None:
    words = ["fit", "--config", "config.yaml", "--trainer.val_check_interval", "00:00:10:00"]
    Made(words)
    with pytest.raises(UsageError, match="must be a number with several processes, got the time 00:00:10:00: each process"):
        Made([*words, "--trainer.devices", "2", "--trainer.strategy", "ddp"])
