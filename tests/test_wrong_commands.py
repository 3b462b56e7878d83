# SPDX-License-Identifier: Apache-2.0
"""Wrong command lines of every command, options and files alike: the exit code and the one line."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from command_line import error_of, leave_no_trace, own_cache, save_base  # noqa: F401 - some are fixtures
from tiny_run import LAST
from toy_tokenizers import word_tokenizer
from trained_run import CONTEXT, contents

from mtp_lightning import cli


@pytest.mark.parametrize(
    ("words", "code", "expected"),
    [
        ("fitt", 2, f"unknown command 'fitt': expected one of {', '.join(cli.COMMANDS)}."),
        ("fit", 2, "model.base_model is required: set it in the configuration file or on the command line."),
        (
            "fit --config no.yaml",
            1,
            "configuration file 'no.yaml' does not exist. Give the path of a YAML file with --config.",
        ),
        ("fit -c=no.yaml", 1, "configuration file 'no.yaml' does not exist. Give the path of a YAML file with --config."),
        ("test --config config.yaml", 2, "data.test must name a source for this command, got nothing. Set data.test."),
        (
            "predict --config config.yaml --prompts prompts.jsonl",
            2,
            "ckpt_path is required: set it in the configuration file",
        ),
        (
            "predict --config config.yaml --ckpt_path last",
            2,
            "mtp predict needs the path of a .ckpt file, got 'last'. Change --ckpt_path.",
        ),
        (
            "predict --config config.yaml --ckpt_path {last}",
            2,
            "mtp predict needs prompts: give --prompts FILE or set data.",
        ),
        (
            "predict --config config.yaml --ckpt_path {last} --prompts no.jsonl",
            1,
            "no.jsonl: expected a file of prompts, nothing is there (looked in {here}). Check the path.",
        ),
        (
            "predict --config config.yaml --ckpt_path {last} --prompts prompts.jsonl --model.nummasks 2",
            2,
            "unknown key or option '--model.nummasks': did you mean 'model.num_masks'?",
        ),
        ("generate", 2, "MODEL is required: set it on the command line. mtp generate --help shows all."),
        (
            "generate no.ckpt --prompt a",
            1,
            "checkpoint 'no.ckpt' does not exist. Give the path of a .ckpt file that mtp fit wrote.",
        ),
        ("generate base --prompt a", 1, "base is no folder that mtp export wrote: it has no mtp_config.json. Give such a"),
        ("generate {last}", 2, "give either --prompt TEXT or --prompts FILE."),
        ("generate {last} --prompt a --prompts prompts.jsonl", 2, "give either --prompt TEXT or --prompts FILE."),
        (
            "generate {last} --prompt a --decoding cubic",
            2,
            "decoding: expected 'quadratic', 'linear', 'autoregressive', got cubic.",
        ),
        ("generate {last} --prompt a --num_masks x", 2, "num_masks: expected int or 'auto', got x."),
        ("generate {last} --prompt a --num_maskz 2", 2, "unknown key or option '--num_maskz': did you mean 'num_masks'?"),
        (
            "generate {last} --prompt a --num_masks 0",
            2,
            "num_masks must be auto or from 1 to 3, the number this model was trained",
        ),
        (
            "generate {last} --prompt a --num_masks 4",
            2,
            "num_masks must be auto or from 1 to 3, the number this model was trained",
        ),
        (
            "generate {last} --prompt a --max_new_tokens 0",
            2,
            "max_new_tokens must be 1 or more, got 0. Change --max_new_tokens.",
        ),
        ("generate {last} --prompt a --max_steps 0", 2, "max_steps must be 1 or more, got 0. Change --max_steps."),
        (
            "generate {last} --prompt a --dtype half",
            2,
            "dtype must be auto or one of float64, float32, bfloat16, float16, got 'half'",
        ),
        (
            "generate {last} --prompt a --device tpu9",
            2,
            "device must be cpu, cuda or another one of this machine, got 'tpu9': ",
        ),
        (
            "generate {last} --prompts long.txt",
            1,
            "long.txt, line 2: the prompt has 100 tokens and the model's context is 96: shorten it to 95 or less, or delete",
        ),
    ],
)
def test_wrong_command_lines(run: Path, here: Path, capsys, words: str, code: int, expected: str) -> None:
    Path("long.txt").write_text("one\n" + "one " * 99 + "\n")
    found = error_of(capsys, code, *words.format(last=LAST).split())
    assert found.startswith(expected.format(here=here))


def test_an_empty_prompt(run: Path, capsys) -> None:
    word_tokenizer(bos=False).save_pretrained("base")  # otherwise an empty text is one token, which will do
    message = "the prompt is empty: it needs at least one token."
    assert error_of(capsys, 2, "generate", LAST, "--prompt", "") == message


@pytest.mark.parametrize("command", ["fit", "validate", "generate"])
def test_base_model_not_found(run: Path, capsys, command: str) -> None:
    before = contents(run)
    words = {
        "fit": ["--config", "config.yaml", "--model.base_model", "no_base"],
        "validate": ["--config", "config.yaml", "--model.base_model", "owner/no_base", "--ckpt_path", LAST],
        "generate": [LAST, "--prompt", "one", "--base_model", "./no_base"],
    }[command]
    found = error_of(capsys, 1, command, *words)
    assert re.match(r"base model '(\./|owner/)?no_base' could not be loaded: ", found)
    assert found.endswith(
        "Set model.base_model to a folder with config.json and weights, or to a hub id that this machine can reach."
    )
    assert contents(run) == before


def test_generate_with_another_base(run: Path, here: Path, capsys) -> None:
    save_base(here / "wider", "llama", word_tokenizer(), torch.float32, max_position_embeddings=CONTEXT, hidden_size=40)
    assert error_of(capsys, 1, "generate", LAST, "--prompt", "one", "--base_model", "wider") == (
        "the checkpoint belongs to a base with hidden_size 32, and 'wider' has 40."
        " Give the base it was trained on with --base_model."
    )


@pytest.mark.parametrize(
    "words",
    ["generate m --prompt a --num_mask 3", "chat m --num_mask 3", "benchmark m --prompts p --num_mask 3",
     "export --ckpt_pat c --output o", "distill --base_mode b --prompts p --output o", "fit --confi c.yaml"],
)  # fmt: skip
def test_options_are_not_abbreviated(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    short = next(word for word in words.split()[1:] if word in ("--num_mask", "--ckpt_pat", "--base_mode", "--confi"))
    assert error_of(capsys, 2, *words.split()).startswith(f"unknown key or option '{short}'")


def test_benchmark_does_not_vary_autoregressive_decoding(capsys: pytest.CaptureFixture[str]) -> None:
    found = error_of(capsys, 2, "benchmark", "m", "--prompts", "p", "--decoding", "autoregressive")
    assert found.startswith("autoregressive decoding is what all others are compared with")
