# SPDX-License-Identifier: Apache-2.0
"""Damaged, foreign and unreadable files: checkpoints, saved folders, bases. What is said, and that nothing is lost."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from command_line import error_of, leave_no_trace, own_cache, save_base  # noqa: F401 - some are fixtures
from tiny_run import LAST
from toy_tokenizers import word_tokenizer
from trained_run import CONTEXT, contents


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


@pytest.mark.parametrize("command", ["fit", "validate"])
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
        found = error_of(capsys, 1, command, *words, "--data.train", "no.jsonl", "--data.validation", "no.jsonl")
        changed = key.removesuffix(".hidden_size")
        assert found == (
            f"the checkpoint's {name} is {there}, the configuration's is {here_}. Change {changed} or --ckpt_path."
        )
    assert contents(run) == before
