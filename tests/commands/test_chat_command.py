# SPDX-License-Identifier: Apache-2.0
"""``mtp chat``: piped messages, a terminal, templates, and Ctrl-C."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from command_line import error_of, mtp
from saved import model_on_disk
from toy_tokenizers import CHATML, word_tokenizer

from mtp_lightning import MTPModel
from mtp_lightning.commands.chat import run_conversation
from mtp_lightning.decoding.options import DecodingOptions
from mtp_lightning.modeling.base import load_base, load_tokenizer
from mtp_lightning.modeling.gated_lora import LoRA
from mtp_lightning.sampler_heads import GRUSamplerHead
from mtp_lightning.text.chat import Conversation

OPTIONS = DecodingOptions(max_new_tokens=12, num_masks=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base that has a chat template, and a saved model on it."""
    folder = tmp_path_factory.mktemp("chat")
    model = model_on_disk(folder, head=GRUSamplerHead(8), max_position_embeddings=160, seed=36)
    model.save_pretrained(folder / "saved")
    return folder


def pipe(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))


def test_piped_messages(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The answers are those of a conversation with the same messages."""
    lines = ["one two", "", "/nothing", "/undo", "/undo", "one two", "/help", "//one", "three \\", "four", "/reset"]
    pipe(monkeypatch, *lines, "/system six", "one", "/exit", "never said")
    assert mtp("chat", folder / "saved", "--max_new_tokens", 12, "--num_masks", 2) == 0
    out, err = capsys.readouterr()
    conversation = Conversation(MTPModel.from_pretrained(folder / "saved"), OPTIONS)
    answers = ["".join(conversation.say(message)) for message in ("one two", "/one", "three \nfour")]
    conversation.reset()
    conversation.system = "six"
    printed = [answers[0], *answers, "".join(conversation.say("one"))]
    assert out == "".join(text.lstrip() + "\n" for text in printed) and sum(map(len, printed)) > 60
    assert err.count("acceptance length") == 5 and err.count("tokens/s]") == 5
    assert "/nothing" in err and "never said" not in err


class Terminal(io.StringIO):
    """Standard input of a terminal, where the line ``^C`` is Ctrl-C."""

    def isatty(self) -> bool:
        return True

    def readline(self, *args: Any) -> str:
        line = super().readline(*args)
        if line == "^C\n":
            raise KeyboardInterrupt
        return line


def test_ctrl_c_in_a_terminal(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """It stops an answer, whose beginning is kept, and does nothing at the prompt."""
    model = MTPModel.from_pretrained(folder / "saved")
    whole = "".join(Conversation(model, OPTIONS).say("one two"))
    num_forwards = 0

    def interrupt(*_: object) -> None:
        nonlocal num_forwards
        num_forwards += 1
        if num_forwards == 4:
            raise KeyboardInterrupt

    model.base.get_decoder().register_forward_pre_hook(interrupt)
    monkeypatch.setattr(sys, "stdin", Terminal("one two\n^C\nthree\n"))
    conversation = Conversation(model, OPTIONS)
    run_conversation(conversation)
    beginning = conversation.messages[1]["content"]
    assert beginning and whole.strip().startswith(beginning) and len(beginning) < len(whole.strip())
    assert [message["role"] for message in conversation.messages] == ["user", "assistant"] * 2
    out, err = capsys.readouterr()
    assert out.startswith(f"> {beginning}") and "stopped" in err and "/exit leaves" in err


def test_a_message_that_does_not_fit(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The conversation continues without it."""
    pipe(monkeypatch, "one " * 200, "two")
    assert mtp("chat", folder / "saved", "--max_new_tokens", 5) == 1
    out, err = capsys.readouterr()
    assert "mtp: error: 1 of 2 messages" in err.splitlines()[-1]
    assert "mtp: the message makes a prompt of " in err and out.endswith("\n") and err.count("tokens/s]") == 1


def test_a_base_without_a_template(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = word_tokenizer()
    tokenizer.chat_template = None
    model_on_disk(tmp_path, tokenizer=tokenizer).save_pretrained(tmp_path / "saved")
    assert "--chat_template" in error_of(capsys, 2, "chat", tmp_path / "saved")
    (tmp_path / "own.jinja").write_text(CHATML)
    for template in ("plain", tmp_path / "own.jinja"):
        pipe(monkeypatch, "one two")
        assert mtp("chat", tmp_path / "saved", "--chat_template", template, "--max_new_tokens", 5) == 0
        out, err = capsys.readouterr()
        assert out.endswith("\n") and "tokens/s]" in err


# Real processes and signals


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that writes for longer than any test waits: the demo's base, without end tokens, in a longer context."""
    folder = tmp_path_factory.mktemp("endless")
    base, tokenizer = load_base("package://demo/base", dtype="float64"), load_tokenizer("package://demo/base")
    base.generation_config.eos_token_id = base.config.eos_token_id = None
    base.config.max_position_embeddings = 20_000
    tokenizer.eos_token = None
    base.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    model = MTPModel(load_base(str(folder / "base")), 8, LoRA(rank=2), None, load_tokenizer(str(folder / "base")))
    model.save_pretrained(folder / "saved")
    return folder / "saved"


def read_until(descriptor: int, wanted: str, seconds: float = 240) -> str:
    """What comes from a file descriptor until it contains a text."""
    text, end = b"", time.monotonic() + seconds
    while wanted not in text.decode(errors="ignore") and time.monotonic() < end:
        if select.select([descriptor], [], [], 0.2)[0]:
            try:
                text += os.read(descriptor, 1 << 14)
            except OSError:  # the other side of a terminal was closed
                break
    return text.decode(errors="replace")


@contextlib.contextmanager
def program(*words: object, **streams: Any) -> Iterator[subprocess.Popen[bytes]]:
    # A shell starts jobs in the background with Ctrl-C ignored, and children would inherit that.
    accept_sigint = functools.partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(
        [sys.executable, "-m", "mtp_lightning", *map(str, words)], preexec_fn=accept_sigint, **streams
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_a_real_terminal(endless: Path) -> None:
    """A prompt, an answer that Ctrl-C stops, and the end."""
    ours, theirs = pty.openpty()
    words = ["chat", endless, "--chat_template", "plain", "--max_new_tokens", 19_000]
    with program(*words, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True) as process:
        os.close(theirs)
        assert "> " in read_until(ours, "> ")
        os.write(ours, b"Hi\n")
        assert "e" in read_until(ours, "Hi\r\n") + read_until(ours, "e")
        os.kill(process.pid, signal.SIGINT)  # the terminal is not the program's controlling one
        stopped = read_until(ours, "> ")
        assert "stopped" in stopped and "Traceback" not in stopped
        os.write(ours, b"/exit\n")
        assert process.wait(timeout=120) == 0
    os.close(ours)
