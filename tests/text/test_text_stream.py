# SPDX-License-Identifier: Apache-2.0
"""Text piece by piece, and transformers' streamers: the same tokens as ``generate``, and what is left when one leaves."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bigram import bigram_base, bigram_text
from command_line import mtp
from saved import PROMPT, model_on_disk
from tiny import tiny_model
from toy_tokenizers import byte_tokenizer, word_tokenizer
from transformers import TextIteratorStreamer, TextStreamer

from mtp_lightning import MTPModel
from mtp_lightning.decoding import calibration
from mtp_lightning.decoding.execution import step as decoding_step
from mtp_lightning.decoding.execution.step import Drafts
from mtp_lightning.decoding.options import DecodingOptions
from mtp_lightning.decoding.planning.draft_plan import PLAIN, Plan
from mtp_lightning.errors import RunError, UsageError
from mtp_lightning.evaluation import acceptance, decoded_text
from mtp_lightning.modeling.gated_lora import LoRA
from mtp_lightning.sampler_heads import GRUSamplerHead
from mtp_lightning.text import stream as text_stream
from mtp_lightning.text.detokenizer import decode_behind
from mtp_lightning.text.prompts import Prompt

LIMIT: dict[str, Any] = {"max_new_tokens": 24, "num_masks": 2, "eos_token_id": []}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> MTPModel:
    return model_on_disk(tmp_path_factory.mktemp("stream"), head=GRUSamplerHead(8), seed=36)


def worded_model() -> MTPModel:
    model = tiny_model(vocab_size=17)
    model.tokenizer = word_tokenizer()
    return model


def text_of(model: MTPModel, ids: torch.Tensor, **options: Any) -> tuple[str, list[int], list[int]]:
    out = model.generate(ids, **LIMIT, **options)
    new = out.sequences[0, ids.shape[1] :].tolist()
    return decode_behind(model.tokenizer, ids[0].tolist(), new), new, out.accepted_per_step[0]


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "seed": 2}, {"decoding": "autoregressive"}])
def test_pieces_are_the_text(model: MTPModel, options: dict[str, Any]) -> None:
    ids = model.tokenizer("one two", return_tensors="pt").input_ids
    text, tokens, accepted = text_of(model, ids, **options)
    for prompt in ("one two", ids, ids[0].tolist()):
        stream = model.stream(prompt, raw=True, **LIMIT, **options)
        pieces = list(stream)
        assert "".join(pieces) == text == stream.text and len(pieces) > 4
        assert (stream.token_ids, stream.accepted_per_step, stream.finish_reason) == (tokens, accepted, "length")
    messages = [{"role": "user", "content": "one"}]
    chat = model.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = model.tokenizer(chat, add_special_tokens=False, return_tensors="pt").input_ids
    assert "".join(model.stream(messages, **LIMIT, **options)) == text_of(model, ids, **options)[0]


def test_stops(model: MTPModel) -> None:
    whole = "".join(model.stream("one two", **LIMIT))
    words = whole.split()
    late, early = words[5], words[3]
    first = min(whole.index(late), whole.index(early))
    stream = model.stream("one two", stop=[late, "not there", early], **LIMIT)
    assert "".join(stream) == whole[:first] and stream.finish_reason == "stop"
    assert len(stream.token_ids) < 24
    assert "".join(model.stream("one two", stop=early, **LIMIT)) == whole[: whole.index(early)]
    # The beginning of a stop text is held back, and given once it is not one.
    stream = model.stream("one two", stop=words[-1] + " no more", **LIMIT)
    assert "".join(stream) == whole and stream.finish_reason == "length"


def test_an_end_token(model: MTPModel) -> None:
    tokens = text_of(model, PROMPT)[1]
    stream = model.stream(PROMPT, **{**LIMIT, "eos_token_id": tokens[4]})
    list(stream)
    assert stream.finish_reason == "stop" and stream.token_ids == tokens[: tokens.index(tokens[4]) + 1]


def test_leaving_early(model: MTPModel) -> None:
    text, tokens, _ = text_of(model, PROMPT)
    stream = model.stream(PROMPT, **LIMIT)
    first = next(stream)
    assert stream.finish_reason is None and stream.text == first and text.startswith(first)
    assert tokens[: len(stream.token_ids)] == stream.token_ids and 0 < len(stream.token_ids) < 24
    stream.close()
    assert list(stream) == [] and stream.text == first
    assert text_of(model, PROMPT)[0] == text  # nothing is left open


def test_an_incomplete_character_is_held_back() -> None:
    tokenizer = byte_tokenizer(["<a>"], "<a>")
    model = tiny_model(sampler_head=GRUSamplerHead(8), vocab_size=len(tokenizer), seed=5)
    model.tokenizer = tokenizer
    for seed in range(2):
        stream = model.stream("ab", max_new_tokens=40, temperature=1.0, seed=seed)
        pieces = list(stream)
        whole = tokenizer.decode(stream.token_ids, skip_special_tokens=True).rstrip("\ufffd")
        # A replacement character at the end may become another one; what was given is never taken back.
        assert "".join(pieces) == stream.text and len(stream.text) == len(whole)
        assert not pieces[0].endswith("\ufffd")


def test_wrong_stream_arguments(model: MTPModel) -> None:
    with pytest.raises(UsageError, match="num_masks"):
        model.stream("one", num_masks=4)  # before the first piece is asked for
    with pytest.raises(UsageError, match="streaming text needs a tokenizer"):
        tiny_model().stream("one")
    with pytest.raises(UsageError, match=r"\[2, 3\]"):
        model.stream(torch.ones(2, 3, dtype=torch.int64))
    with pytest.raises(UsageError, match="logits_processor"):
        model.stream("one", logits_processor=len)
    with pytest.raises(UsageError, match="token ids .* got 999"):
        list(model.stream([999]))
    bare = worded_model()
    bare.tokenizer.chat_template = None
    with pytest.raises(RunError, match="no chat template"):
        bare.stream([{"role": "user", "content": "one"}])


def test_transformers_streamers(model: MTPModel, capsys: pytest.CaptureFixture[str]) -> None:
    _, tokens, _ = text_of(model, PROMPT)
    options = {"skip_special_tokens": True}
    text = model.tokenizer.decode(tokens, **options)  # theirs do not decode behind the prompt
    out = model.generate(PROMPT, streamer=TextStreamer(model.tokenizer, skip_prompt=True, **options), **LIMIT)
    assert capsys.readouterr().out == text + "\n" and out.sequences[0, 3:].tolist() == tokens
    model.generate(PROMPT, streamer=TextStreamer(model.tokenizer, **options), **LIMIT)
    assert capsys.readouterr().out == model.tokenizer.decode(PROMPT[0], **options) + " " + text + "\n"
    queue = TextIteratorStreamer(model.tokenizer, skip_prompt=True, **options)
    model.generate(PROMPT, attention_mask=torch.ones_like(PROMPT), streamer=queue, **LIMIT)
    assert "".join(queue) == text
    with pytest.raises(UsageError, match="a streamer takes one row, got 2"):
        model.generate(PROMPT.repeat(2, 1), streamer=queue, **LIMIT)


def test_trust_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[Any] = []

    def load(name: str, **options: Any) -> MTPModel:
        asked.append(options["trust_remote_code"])
        raise RunError("enough")

    monkeypatch.setattr(MTPModel, "from_pretrained", load)
    monkeypatch.chdir(tmp_path)
    Path("p.txt").write_text("a\n")
    for words in (["generate", "m", "--prompt", "a"], ["chat", "m"], ["benchmark", "m", "--prompts", "p.txt"]):
        assert mtp(*words) == 1 and mtp(*words, "--trust_remote_code", "true") == 1
    assert asked == [False, True] * 3


@pytest.mark.parametrize("stops", [["bcd", "c"], ["cd"], ["d", "ab"]])
def test_stops_cut_the_same_tokens_however_many_come_in_a_step(stops: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = byte_tokenizer(["<a>"], "<a>")
    a = tokenizer("a").input_ids[-1]
    # The base counts up: the letters of the alphabet where the vocabulary has them in order.
    assert tokenizer.decode([a, a + 1, a + 2, a + 3, a + 4]) == "abcde"
    V = len(tokenizer)
    seen: list[int] = []

    def right_drafts(model: Any, hidden: torch.Tensor, verified: torch.Tensor, *others: Any) -> Drafts:
        return Drafts(torch.tensor([bigram_text(token, hidden.shape[1], V, V) for token in verified.tolist()]), None)

    monkeypatch.setattr(decoding_step, "draft_block", right_drafts)
    model = MTPModel(bigram_base(V, V), 6, LoRA(rank=2)).eval()
    model.tokenizer = tokenizer
    found = []
    for options in ({"decoding": "autoregressive"}, {"num_masks": 2}, {"num_masks": 6}):
        stream = model.stream([a - 2], stop=stops, max_new_tokens=20, **options)
        text = "".join(stream)
        seen.append(max(stream.accepted_per_step))
        record = stream.record()
        assert record["acceptance_length"] * record["num_steps"] == len(record["token_ids"])
        assert sum(record["accepted_per_step"]) + record["num_steps"] == len(record["token_ids"])
        found.append((text, stream.token_ids, stream.finish_reason))
    assert found == found[:1] * 3 and found[0][2] == "stop"
    assert seen[0] == 0 < min(seen[1:])  # drafts were kept


def test_measuring_the_machine_is_not_decoding_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=0.0, perf_counter=lambda: clock.now)

    def slow_measurement(*arguments: Any) -> dict[Plan, float]:
        clock.now += 1000.0
        return {PLAIN: 1.0, Plan(0, 1, "last"): 2.0}

    monkeypatch.setattr(calibration, "measure", slow_measurement)
    monkeypatch.setenv(calibration.FOLDER_VARIABLE, "/dev/null/none")
    for module in (text_stream, decoded_text):
        monkeypatch.setattr(module, "time", clock)
    prompt, options = Prompt("", [9, 10], ""), {"max_new_tokens": 2}
    stream = worded_model().stream(prompt.input_ids, **options)
    list(stream)
    (result,) = acceptance.evaluate_prompts(worded_model(), [prompt], DecodingOptions(**options))
    assert clock.now == 2000.0 and stream.seconds == result.seconds == 0.0
