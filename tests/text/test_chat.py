# SPDX-License-Identifier: Apache-2.0
"""A conversation: turns, the cache between them, templates."""

from __future__ import annotations

from pathlib import Path

import pytest
from saved import model_on_disk
from toy_tokenizers import CHATML, word_tokenizer

from mtp_lightning import MTPModel
from mtp_lightning.decoding.limits import end_of_turn_token
from mtp_lightning.decoding.options import DecodingOptions
from mtp_lightning.errors import UsageError
from mtp_lightning.modeling.base import load_tokenizer
from mtp_lightning.sampler_heads import GRUSamplerHead
from mtp_lightning.text.chat import PLAIN_STOP, PLAIN_TEMPLATE, Conversation
from mtp_lightning.text.detokenizer import decode_behind

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
    return decode_behind(model.tokenizer, ids[0].tolist(), out.sequences[0, ids.shape[1] :].tolist())


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
        known = prompt + talk.generated.token_ids[:-1]
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


def test_an_interrupted_answer_is_kept(model: MTPModel) -> None:
    talk = Conversation(model, OPTIONS)
    pieces = talk.say("one two")
    first = next(pieces)
    pieces.close()
    assert talk.messages == [{"role": "user", "content": "one two"}, {"role": "assistant", "content": first.strip()}]
    expected = answer(model, [*talk.messages, {"role": "user", "content": "three"}], [2, 4])
    assert "".join(talk.say("three")) == expected


def test_the_oldest_turns_are_dropped_when_the_context_is_full(model: MTPModel) -> None:
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
    with pytest.raises(UsageError, match=r"prompt has \d+ tokens.* context is 160"):
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
