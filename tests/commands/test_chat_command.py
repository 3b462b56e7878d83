# SPDX-License-Identifier: Apache-2.0
"""``mtp chat``: piped messages, a terminal, templates, and Ctrl-C."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import pytest
from command_line import error_of, mtp
from saved import model_on_disk
from toy_tokenizers import CHATML, word_tokenizer

from mtp_lightning import MTPModel
from mtp_lightning.commands.chat import run_conversation
from mtp_lightning.decoding.options import DecodingOptions
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
    assert "mtp: the prompt has " in err and out.endswith("\n") and err.count("tokens/s]") == 1


def test_a_base_without_a_template(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = word_tokenizer()
    tokenizer.chat_template = None
    model_on_disk(tmp_path, tokenizer=tokenizer).save_pretrained(tmp_path / "saved")
    assert "--chat_template" in error_of(capsys, 2, "chat", tmp_path / "saved")
    (tmp_path / "own.jinja").write_bytes(b"\xff")
    assert "own.jinja" in error_of(capsys, 1, "chat", tmp_path / "saved", "--chat_template", tmp_path / "own.jinja")
    (tmp_path / "own.jinja").write_text(CHATML)
    for template in ("plain", tmp_path / "own.jinja"):
        pipe(monkeypatch, "one two")
        assert mtp("chat", tmp_path / "saved", "--chat_template", template, "--max_new_tokens", 5) == 0
        out, err = capsys.readouterr()
        assert out.endswith("\n") and "tokens/s]" in err
