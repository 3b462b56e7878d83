# SPDX-License-Identifier: Apache-2.0
"""Wrong command lines of every command, options and files alike: the exit code and the one line."""

from __future__ import annotations

import io
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
from command_line import error_of, leave_no_trace, own_cache, save_base  # noqa: F401 - some are fixtures
from tiny_run import LAST
from toy_tokenizers import word_tokenizer
from trained_run import CONTEXT, contents

from mtp_lightning.commands import cli


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
        ("generate {last} --prompt a --draft_vocabulary 0", 2, "draft_vocabulary must be auto, all, or a number from 1 on"),
        (
            "predict --config config.yaml --ckpt_path {last} --prompts prompts.jsonl --draft_vocabulary -1",
            2,
            "draft_vocabulary must be auto, all, or a number from 1 on, got -1. Change draft_vocabulary.",
        ),
        ("chat {last} --draft_vocabulary few", 2, "draft_vocabulary: expected int or 'auto', 'all', got few."),
        (
            "generate {last} --prompt a --draft_vocabulary=",
            2,
            "draft_vocabulary: expected int or 'auto', 'all', got an empty text. Change --draft_vocabulary.",
        ),
        ("generate {last} --prompt a --top_k=", 2, "top_k: expected int or null, got an empty text. Change --top_k."),
        ("chat {last} --compile=", 2, "compile: expected bool, got an empty text. Change --compile."),
        ("generate {last} --prompt a --compile", 2, "--compile needs a value behind it, and there is none. --help says"),
        (
            "predict --config null.yaml --ckpt_path {last} --prompts prompts.jsonl",
            2,
            "compile must be True or False, got None. Change compile.",
        ),
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
        ("generate {last} --prompt a --stop ''", 2, "stop must be a text of one character at least, got an empty one."),
        ("generate {last} --prompt a --temperature hot", 2, "temperature: expected float, got hot. Change --temperature."),
        ("generate {last} --prompt ''", 2, "the prompt is empty"),
        ("generate Owner/none --prompt a", 1, "'Owner/none' is no file or folder here, and no hub id that this machine can"),
        (
            "generate a/b/c/d --prompt a",
            1,
            "'a/b/c/d' is no file or folder here, and no hub id that this machine can reach:",
        ),
        ("predict --config config.yaml --ckpt_path {last} --prompts prompts.jsonl --stop ''", 2, "stop must be a text of"),
        (
            "predict --config config.yaml --ckpt_path {last} --prompts long.txt",
            1,
            "long.txt, line 2: the prompt has 100 tokens and the model's context is 96: shorten it to 95 or less, or delete",
        ),
        (
            "predict --config config.yaml --ckpt_path {last} --prompts base",
            1,
            "base: expected a .txt or .jsonl file of prompts, it is a folder. Name a file in it.",
        ),
        (
            "predict",
            2,
            "model.base_model, ckpt_path are required: set them in the configuration file or on the command line.",
        ),
        ("fit --config base", 1, "configuration file 'base' is a folder. Give the path of a YAML file with --config."),
        ("fit --config config.yaml --ckpt_path best", 2, "ckpt_path must be the path of a .ckpt file, or last, got 'best'."),
        ("validate --config config.yaml --ckpt_path ''", 2, "ckpt_path must be the path of a .ckpt file, or last, got ''."),
        ("validate --config config.yaml --ckpt_path no.ckpt", 1, "checkpoint 'no.ckpt' does not exist. Give the path of a"),
        (
            "data --config config.yaml --split tset",
            2,
            "split: expected 'train', 'validation', 'test', got tset. Change --split.",
        ),
        ("data --config config.yaml --rowz 2", 2, "unknown key or option '--rowz': did you mean 'rows'?"),
        ("data --config config.yaml --rows 0", 2, "rows must be 1 or more, got 0. Change --rows."),
        (
            "data --config config.yaml --trainer.devices 0",
            2,
            "trainer.devices must be 1 or more, got 0. Change trainer.devices.",
        ),
        ("data --config config.yaml --trainer.num_nodes 0", 2, "trainer.num_nodes must be 1 or more, got 0."),
        (
            "data --config config.yaml --trainer.accumulate_grad_batches 0",
            2,
            "trainer.accumulate_grad_batches must be 1 or more, got 0.",
        ),
        (
            "data --config config.yaml --data.train '{train.jsonl: many}'",
            2,
            "a data source must be a file, folder, glob or hub id, a list of them, or a mix {source: weight} with numbers",
        ),
        ("chat", 2, "MODEL is required: set it on the command line. mtp chat --help shows all."),
        ("chat {last} --chat_template ''", 2, "chat_template must be a jinja file or plain, got an empty name."),
        ("chat {last} --chat_template base", 1, "chat_template 'base' can't be read: Is a directory. Give a jinja file, or"),
        (
            "distill",
            2,
            "MODEL, --prompts, --output are required: set them on the command line. mtp distill --help shows all.",
        ),
        ("distill base --prompts prompts.jsonl --output a.jsonl --dtype half", 2, "dtype must be auto or one of float64,"),
        (
            "distill base --prompts prompts.jsonl --output a.jsonl --batch_size x",
            2,
            "batch_size: expected int, got x. Change",
        ),
        (
            "distill base --prompts prompts.jsonl --output config.yaml/a.jsonl",
            1,
            "config.yaml/a.jsonl: expected a file that can be written: 'config.yaml' is a file, not a folder. Change",
        ),
        ("distill no_base --prompts prompts.jsonl --output a.jsonl", 1, "base model 'no_base' could not be loaded: "),
        ("export --ckpt_path {last} --output ''", 2, "output must be a path, got an empty one. Change --output."),
    ],
)
def test_wrong_command_lines(run: Path, here: Path, capsys, words: str, code: int, expected: str) -> None:
    Path("long.txt").write_text("one\n" + "one " * 99 + "\n")
    Path("null.yaml").write_text("model: {base_model: base}\ncompile: null\n")
    if "--prompt ''" in words:
        word_tokenizer(bos=False).save_pretrained("base")  # else an empty text is one token
    before = contents(here)
    # str.format would take the braces of a mix of sources for a field.
    found = error_of(capsys, code, *shlex.split(words.replace("{last}", LAST)))
    assert found.startswith(expected.replace("{here}", str(here))), found
    assert contents(here) == before


@pytest.mark.parametrize(
    "words",
    [
        f"generate {LAST} --prompts -",
        f"predict --config config.yaml --ckpt_path {LAST} --prompts -",
        "distill base --prompts - --output a.jsonl",
        f"chat {LAST}",
    ],
)
def test_standard_input_that_gives_nothing(
    run: Path, here: Path, capsys, monkeypatch: pytest.MonkeyPatch, words: str
) -> None:
    before, chat = contents(here), words.startswith("chat")
    monkeypatch.setattr(sys, "stdin", None)  # as after <&-
    assert error_of(capsys, 1, *words.split()).startswith("standard input: expected ")
    # What a pipe of other bytes gives where the locale is C.
    monkeypatch.setattr(sys, "stdin", io.StringIO("\udcff\n"))
    found = error_of(capsys, 1, *words.split())
    assert found.startswith("1 of 1 messages were not answered" if chat else "standard input, line 1: expected UTF-8 text, ")
    if not chat:
        monkeypatch.setattr(sys, "stdin", io.StringIO(""))
        assert error_of(capsys, 1, *words.split()) == "standard input: expected at least one prompt, it is empty."
    assert contents(here) == before


@pytest.mark.parametrize(
    ("template", "system", "code", "expected"),
    [
        (" ", "", 1, "chat_template 't.jinja' is empty. Give a jinja file, or plain."),
        (
            "{% for %}",
            "",
            1,
            "the chat template refuses the messages (roles: user): Expected an expression, got 'end of statement",
        ),
        (
            "{{ raise_exception('no system') }}",
            "Be brief.",
            1,
            "the chat template refuses the messages (roles: system, user): no system.",
        ),
        (None, "one " * 99, 2, "the system message makes a prompt of 10"),
    ],
)
def test_what_no_message_of_a_chat_would_fit(
    run: Path,
    here: Path,
    capsys,
    monkeypatch: pytest.MonkeyPatch,
    template: str | None,
    system: str,
    code: int,
    expected: str,
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\n"))
    (here / "t.jinja").write_text(template or "")
    options = ["--chat_template", "plain" if template is None else "t.jinja", *(["--system", system] if system else [])]
    assert error_of(capsys, code, "chat", LAST, *options).startswith(expected)


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
        "Set model.base_model (--base_model) to a folder with config.json and weights,"
        " or to a hub id that this machine can reach."
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
