# SPDX-License-Identifier: Apache-2.0
"""``mtp chat``: turns, the cache between them, templates, commands, and Ctrl-C by a real signal."""

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
import torch
from command_line import error_of, mtp
from saved import model_on_disk
from toy_tokenizers import CHATML, word_tokenizer

from mtp_lightning import MTPModel
from mtp_lightning.decoding.options import DecodingOptions
from mtp_lightning.errors import UsageError
from mtp_lightning.modeling.base import load_base, load_tokenizer
from mtp_lightning.modeling.gated_lora import LoRA
from mtp_lightning.sampler_heads import GRUSamplerHead
from mtp_lightning.text.chat import PLAIN_STOP, PLAIN_TEMPLATE, Conversation, end_of_turn_token

OPTIONS = DecodingOptions(max_new_tokens=12, num_masks=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base that has a chat template, and a saved model on it."""
    at = tmp_path_factory.mktemp("chat")
    model_on_disk(at, head=GRUSamplerHead(8), max_position_embeddings=160, seed=36).save_pretrained(at / "saved")
    return at


@pytest.fixture
def model(folder: Path) -> MTPModel:
    return MTPModel.from_pretrained(folder / "saved")


def answer(model: MTPModel, messages: list[dict[str, str]], ends: list[int]) -> str:
    """What the model says next, from the whole prompt and without a cache."""
    text = model.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = model.tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    out = model.generate(ids, max_new_tokens=12, num_masks=2, eos_token_id=ends)
    return model.tokenizer.decode(out.sequences[0, ids.shape[1] :], skip_special_tokens=True)


def test_turns_and_the_cache_between_them(model: MTPModel) -> None:
    fed: list[int] = []
    model.base.get_decoder().register_forward_pre_hook(
        lambda _, args, given: fed.append(given["position_ids"].shape[-1]), with_kwargs=True
    )
    talk = Conversation(model, OPTIONS)
    messages: list[dict[str, str]] = []
    known: list[int] = []
    for turn, said in enumerate(["one two three", "four", "five six one two"]):
        fed.clear()
        pieces = list(talk.say(said))
        first = fed[0]
        messages.append({"role": "user", "content": said})
        expected = answer(model, messages, [2, 4])
        assert "".join(pieces) == expected and expected.strip()
        messages.append({"role": "assistant", "content": expected.strip()})
        assert talk.messages == messages
        assert talk.generated is not None
        prompt = talk.generated.prompt.input_ids
        # What the last turn has seen is not fed again, but for the last token; two masks are.
        same = next((i for i, pair in enumerate(zip(prompt, known, strict=False)) if len(set(pair)) > 1), len(known))
        assert first == len(prompt) - same + 2 and (same >= len(known) // 2 > 0 or turn == 0)
        # Of an answer the last token was not fed, and a rewound cache holds the rest.
        known = prompt + talk.generated.tokens[:-1]
    talk.reset()
    assert "".join(talk.say("four")) == answer(model, [{"role": "user", "content": "four"}], [2, 4])


def test_a_system_message_undo_and_a_stop(model: MTPModel) -> None:
    talk = Conversation(model, OPTIONS, system="six six")
    asked = [{"role": "system", "content": "six six"}, {"role": "user", "content": "one"}]
    whole = "".join(talk.say("one"))
    assert whole == answer(model, asked, [2, 4])
    assert talk.undo() and talk.messages == [] and not talk.undo()
    assert "".join(talk.say("one")) == whole
    words = whole.split()
    stopping = Conversation(model, OPTIONS, [words[2]], "six six")
    assert "".join(stopping.say("one")) == whole[: whole.index(words[2])]
    assert stopping.messages[-1]["content"] == whole[: whole.index(words[2])].strip()


def test_an_answer_that_is_cut_off_is_kept(model: MTPModel) -> None:
    talk = Conversation(model, OPTIONS)
    pieces = talk.say("one two")
    first = next(pieces)
    pieces.close()
    assert talk.messages == [{"role": "user", "content": "one two"}, {"role": "assistant", "content": first.strip()}]
    expected = answer(model, [*talk.messages, {"role": "user", "content": "three"}], [2, 4])
    assert "".join(talk.say("three")) == expected


def test_the_oldest_turns_go_when_the_context_is_full(model: MTPModel) -> None:
    talk = Conversation(model, OPTIONS)
    sizes = []
    for _ in range(12):
        list(talk.say("one two three four five six"))
        sizes.append(len(talk.messages))
        assert talk.messages[0]["role"] == "user" and talk.messages[-2]["content"] == "one two three four five six"
        assert talk.dropped in (0, 2)
        if talk.dropped:
            break
    assert sizes[:3] == [2, 4, 6] and talk.dropped == 2
    before = list(talk.messages)
    with pytest.raises(UsageError, match=r"the message makes a prompt of \d+ tokens and the model's context is 160: say it"):
        list(talk.say("one " * 200))
    assert talk.messages == before


def test_the_token_after_an_answer() -> None:
    tokenizer = word_tokenizer()
    assert (end_of_turn_token(tokenizer), tokenizer.convert_tokens_to_ids("<|im_end|>")) == (4, 4)
    tokenizer.chat_template = PLAIN_TEMPLATE
    assert end_of_turn_token(tokenizer) is None
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    assert end_of_turn_token(tokenizer) is None
    assert CHATML.count("<|im_end|>") == 1


def test_a_plain_dialogue() -> None:
    tokenizer = load_tokenizer("package://demo/base")
    assert not tokenizer.chat_template
    messages = [("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello"), ("user", "How much is 2 + 2?")]
    said = [{"role": role, "content": text} for role, text in messages]
    text = tokenizer.apply_chat_template(said, chat_template=PLAIN_TEMPLATE, tokenize=False, add_generation_prompt=True)
    assert text == "Be brief.\nUser: Hi\nAssistant: Hello\nUser: How much is 2 + 2?\nAssistant:"
    assert PLAIN_STOP in text


# The command


def typed(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))


def test_piped_input(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    lines = ["one two", "", "/nothing", "/undo", "/undo", "one two", "/help", "//one", "three \\", "four", "/reset"]
    typed(monkeypatch, *lines, "/system six", "one", "/exit", "never said")
    words = ["--max_new_tokens", 12, "--num_masks", 2, "--dtype", "float64"]
    assert mtp("chat", folder / "saved", *words) == 0
    out, err = capsys.readouterr()
    model = MTPModel.from_pretrained(folder / "saved")
    messages: list[dict[str, str]] = []
    expected = []
    for said in ("one two", "/one", "three \nfour"):
        messages.append({"role": "user", "content": said})
        expected.append(answer(model, messages, [2, 4]))
        messages.append({"role": "assistant", "content": expected[-1].strip()})
    last = [{"role": "system", "content": "six"}, {"role": "user", "content": "one"}]
    printed = [expected[0], *expected, answer(model, last, [2, 4])]
    assert out == "".join(text.lstrip() + "\n" for text in printed) and sum(map(len, printed)) > 60
    assert err.count("acceptance length") == 5 and err.count("tokens/s]") == 5
    for note in (
        "There is no command /nothing. /help lists them",
        "The last message is forgotten.",
        "Nothing was said yet.",
        "Ctrl-C stops an answer",
        "Forgotten.",
        "The system message is set.",
    ):
        assert note in err
    assert "never said" not in err


def test_what_does_not_fit_is_said_and_the_chat_goes_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typed(monkeypatch, "one " * 200, "two")
    assert mtp("chat", folder / "saved", "--max_new_tokens", 5) == 1
    out, err = capsys.readouterr()
    assert err.endswith("\nmtp: error: 1 of 2 messages were not answered, for the reasons above. Change them.\n")
    assert "mtp: the message makes a prompt of " in err and out.endswith("\n") and err.count("tokens/s]") == 1


def test_a_base_without_a_template(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = word_tokenizer()
    tokenizer.chat_template = None
    model_on_disk(tmp_path, tokenizer=tokenizer).save_pretrained(tmp_path / "saved")
    assert error_of(capsys, 2, "chat", tmp_path / "saved") == (
        "the base's tokenizer has no chat template: it was not made for chat. Give --chat_template FILE, or"
        " --chat_template plain for a simple dialogue."
    )
    message = error_of(capsys, 1, "chat", tmp_path / "saved", "--chat_template", "no.jinja")
    assert message.startswith("chat_template 'no.jinja' can't be read: No such file or directory. Give a")
    (tmp_path / "own.jinja").write_text(CHATML)
    for template in ("plain", tmp_path / "own.jinja"):
        typed(monkeypatch, "one two")
        assert mtp("chat", tmp_path / "saved", "--chat_template", template, "--max_new_tokens", 5) == 0
        out, err = capsys.readouterr()
        assert out.endswith("\n") and "tokens/s]" in err


@pytest.mark.parametrize(
    ("options", "code", "expected"),
    [
        ("--num_masks 4", 2, "num_masks must be auto or from 1 to 3, the number this model was trained with, got 4."),
        ("--batch_size 2", 2, "unrecognized arguments: --batch_size 2"),
        ("--temperature -1", 2, "temperature must be 0 (greedy) or more, got -1.0."),
    ],
)
def test_wrong_command_lines(folder: Path, capsys: Any, options: str, code: int, expected: str) -> None:
    assert error_of(capsys, code, "chat", folder / "saved", *options.split()).startswith(expected)


# Ctrl-C


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that writes on for longer than any test waits: the demo's base, without end tokens, in a longer context."""
    at = tmp_path_factory.mktemp("slow")
    base, tokenizer = load_base("package://demo/base", dtype="float64"), load_tokenizer("package://demo/base")
    base.generation_config.eos_token_id = base.config.eos_token_id = None
    base.config.max_position_embeddings = 20_000
    tokenizer.eos_token = None
    base.save_pretrained(at / "base")
    tokenizer.save_pretrained(at / "base")
    MTPModel(load_base(str(at / "base")), 8, LoRA(rank=2), None, load_tokenizer(str(at / "base"))).save_pretrained(
        at / "saved"
    )
    return at / "saved"


def until(read: int, wanted: str, seconds: float = 240) -> str:
    """What comes from a file descriptor until it contains a text."""
    text, end = b"", time.monotonic() + seconds
    while wanted not in text.decode(errors="ignore") and time.monotonic() < end:
        if select.select([read], [], [], 0.2)[0]:
            try:
                text += os.read(read, 1 << 14)
            except OSError:  # the other side of a terminal was closed
                break
    return text.decode(errors="replace")


@contextlib.contextmanager
def program(*words: object, **streams: Any) -> Iterator[subprocess.Popen[bytes]]:
    # A shell starts jobs in the background with Ctrl-C ignored, and children would inherit that.
    heed = functools.partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    started = subprocess.Popen([sys.executable, "-m", "mtp_lightning", *map(str, words)], preexec_fn=heed, **streams)
    try:
        yield started
    finally:
        started.kill()
        started.wait()


def test_generate_keeps_what_was_said(slow: Path) -> None:
    words = ["generate", slow, "--prompt", "def f(x):", "--max_new_tokens", 19_000]
    with program(*words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as started:
        assert started.stdout is not None
        text = until(started.stdout.fileno(), "def f(x):\n")
        started.send_signal(signal.SIGINT)
        rest, err = started.communicate(timeout=240)
    text += rest.decode()
    # Before it may stand what a library says at its import, as bitsandbytes does.
    assert started.returncode == 130 and err.decode().endswith("\nmtp: interrupted\n") and "Traceback" not in err.decode()
    model = MTPModel.from_pretrained(slow)
    ids = model.tokenizer("def f(x):", return_tensors="pt").input_ids
    whole = model.tokenizer.decode(model.generate(ids, max_new_tokens=200, num_masks=1).sequences[0])
    assert len(text) > len("def f(x):") and whole.startswith(text[: len(whole)])


def test_a_terminal(slow: Path) -> None:
    """A prompt, an answer that Ctrl-C stops, another one, a stray Ctrl-C, and the end."""
    ours, theirs = pty.openpty()
    words = ["chat", slow, "--chat_template", "plain", "--max_new_tokens", 19_000]
    with program(*words, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True) as started:
        os.close(theirs)
        # The terminal is not the program's controlling one, so that the signal is sent by hand.
        assert "> " in until(ours, "> ")
        os.write(ours, b"Hi\n")
        answer_begun = until(ours, "Hi\r\n")
        answer_begun += until(ours, "e")
        os.kill(started.pid, signal.SIGINT)
        stopped = until(ours, "> ")
        assert "[stopped; the answer is kept as far as it came]" in stopped and "Traceback" not in stopped
        # A signal that comes between readline's prompt and its waiting is seen at the next key only: so it is repeated.
        told, end = "", time.monotonic() + 240
        while "leaves." not in told and time.monotonic() < end:
            os.kill(started.pid, signal.SIGINT)
            told += until(ours, "leaves.", 1)
        assert "Ctrl-D or /exit leaves." in told
        os.write(ours, b"/undo\n")
        assert "The last message is forgotten." in until(ours, "forgotten.")  # so that it had been kept
        os.write(ours, b"/exit\n")
        assert started.wait(timeout=120) == 0
    os.close(ours)


@pytest.mark.slow
def test_interrupted_while_piped(slow: Path) -> None:
    words = ["chat", slow, "--chat_template", "plain"]
    with program(*words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as started:
        assert started.stdin is not None and started.stderr is not None
        started.stdin.write(b"/help\n")
        started.stdin.flush()
        until(started.stderr.fileno(), "as far as it came")
        started.send_signal(signal.SIGINT)
        out, err = started.communicate(timeout=240)
    assert (started.returncode, out) == (130, b"") and err.endswith(b"mtp: interrupted\n")


def test_the_prompt_is_torch_free_to_reuse(model: MTPModel) -> None:
    """Turns with a seed draw the same again after a reset."""
    talk = Conversation(model, DecodingOptions(max_new_tokens=12, temperature=1.0, seed=3))
    first = "".join(talk.say("one"))
    talk.reset()
    torch.manual_seed(99)
    assert "".join(talk.say("one")) == first
