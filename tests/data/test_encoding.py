# SPDX-License-Identifier: Apache-2.0
"""Encoding: every kind of row against ids and labels written by hand; refusals. Chat templates have their own file."""

from __future__ import annotations

import pytest
from toy_tokenizers import CHATML, byte_tokenizer, word_tokenizer

from mtp_lightning.data.encoding import encode_row
from mtp_lightning.errors import RunError, UsageError

X = -100
BOS, EOS, START, END, NEWLINE, USER, ASSISTANT = 1, 2, 3, 4, 5, 7, 8
ONE, TWO, THREE, FOUR = 9, 10, 11, 12


def check(row: dict, tokenizer: object, ids: list[int], labels: list[int], template: str | None = None) -> None:
    encoded = encode_row(row, tokenizer, template)
    found = [token if carries_loss else X for token, carries_loss in zip(encoded.input_ids, encoded.loss, strict=True)]
    assert (list(encoded.input_ids), found) == (ids, labels)


def says(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


# text, prompt, ids


def test_text_carries_loss_everywhere(tokenizer) -> None:
    check({"text": "one two", "prompt": None}, tokenizer, [BOS, ONE, TWO, EOS], [BOS, ONE, TWO, EOS])
    assert encode_row({"text": "one"}, tokenizer).splittable
    check({"text": "one <eos>"}, tokenizer, [BOS, ONE, EOS], [BOS, ONE, EOS])
    check({"text": ""}, tokenizer, [], [])
    check({"text": "one", "input_ids": [3], "prompt": "two"}, tokenizer, [BOS, ONE, EOS], [BOS, ONE, EOS])
    check({"text": "one two"}, word_tokenizer(bos=False, eos=False), [ONE, TWO], [ONE, TWO])


def test_prompt_carries_no_loss(tokenizer) -> None:
    row = {"prompt": "one two", "completion": " three", "text": "six"}
    check(row, tokenizer, [BOS, ONE, TWO, THREE, EOS], [X, X, X, THREE, EOS])
    assert not encode_row(row, tokenizer).splittable


def test_completion_ids_and_prompt_ids_are_used_unchanged(tokenizer) -> None:
    check({"prompt": "one", "completion_ids": [THREE, FOUR]}, tokenizer, [BOS, ONE, THREE, FOUR], [X, X, THREE, FOUR])
    row = {"prompt_ids": [ONE, TWO], "completion_ids": [THREE, FOUR], "messages": [says("user", "x")], "prompt": "one"}
    check(row | {"completion": "six"}, tokenizer, [ONE, TWO, THREE, FOUR], [X, X, THREE, FOUR])
    check({"prompt": "one", "prompt_ids": None, "completion_ids": [THREE]}, tokenizer, [BOS, ONE, THREE], [X, X, THREE])


def test_prompt_of_messages_ends_with_the_generation_prompt(tokenizer) -> None:
    row = {"prompt": [says("user", "one")], "completion": "two"}
    prompt = [START, USER, NEWLINE, ONE, END, NEWLINE, START, ASSISTANT, NEWLINE]
    check(row, tokenizer, [*prompt, TWO, END], [X] * 9 + [TWO, END])  # the template's own end of turn
    check(row | {"completion": "two<|im_end|>"}, tokenizer, [*prompt, TWO, END], [X] * 9 + [TWO, END])


def test_prompt_and_completion_are_encoded_together() -> None:
    tokenizer = byte_tokenizer(["<eos>"], "<eos>")
    a, b, ab = (tokenizer.convert_tokens_to_ids(token) for token in ("a", "b", "ab"))
    check({"text": "ab"}, tokenizer, [ab, 0], [ab, 0])
    check({"prompt": "b", "completion": "ab"}, tokenizer, [b, ab, 0], [X, ab, 0])
    check({"prompt": "ba", "completion": "b"}, tokenizer, [b, ab, 0], [X, ab, 0])  # it has a character of the completion
    check({"prompt": "a", "completion": ""}, tokenizer, [a, 0], [X, 0])


def test_an_end_token_that_the_tokenizer_adds_does_not_end_the_prompt() -> None:
    from tokenizers import processors

    tokenizer = word_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", 2)]
    )
    check({"prompt": "one ", "completion": "two"}, tokenizer, [ONE, TWO, EOS], [X, TWO, EOS])
    check({"text": "one"}, tokenizer, [ONE, EOS], [ONE, EOS])


def test_ids(tokenizer) -> None:
    check({"input_ids": [3, 9, 4]}, tokenizer, [3, 9, 4], [3, 9, 4])
    check({"input_ids": [3, 9, 4], "labels": [X, 9, 4]}, tokenizer, [3, 9, 4], [X, 9, 4])
    assert encode_row({"input_ids": [3]}, tokenizer).splittable
    row = {"input_ids": [1, 5, 6, 0, 0], "attention_mask": [1, 1, 1, 0, 0]}  # padding is no text
    check(row, tokenizer, [1, 5, 6], [1, 5, 6])
    check(row | {"loss_mask": [0, 1, 1, 1, 1], "position_ids": [0, 1, 2, 0, 0]}, tokenizer, [1, 5, 6], [X, 5, 6])
    labels = {"labels": [X, X, 1, X, 6]}
    check({"input_ids": [0, 0, 1, 5, 6], "attention_mask": [0, 0, 1, 1, 1]} | labels, tokenizer, [1, 5, 6], [1, X, 6])
    masked = {"prompt_ids": [ONE], "completion_ids": [TWO, THREE], "completion_mask": [1, 0]}
    check(masked, tokenizer, [ONE, TWO, THREE], [X, TWO, X])
    assert not encode_row({"input_ids": [3], "labels": [3]}, tokenizer).splittable


IDS = {"prompt_ids": [0, 0, BOS, ONE], "completion_ids": [TWO, EOS, 0]}


@pytest.mark.parametrize(
    "masks",
    [
        {"attention_mask": [0, 0, 1, 1, 1, 1, 0]},
        {"attention_mask": [1, 1, 1, 1, 1, 1, 0], "prompt_mask": [0, 0, 1, 1]},
    ],
)
def test_padding_of_prompt_and_completion_is_cut_off(tokenizer, masks: dict) -> None:
    check(IDS | masks, tokenizer, [BOS, ONE, TWO, EOS], [X, X, TWO, EOS])


@pytest.mark.parametrize(
    ("row", "named"),
    [
        (IDS | {"attention_mask": [0, 1]}, "attention_mask"),
        (IDS | {"prompt_mask": [1, 1, 0, 1]}, "prompt_mask"),
        ({"input_ids": [1, 9], "prompt_mask": [1, 0]}, "prompt_mask"),
        ({"prompt": "one", "completion_ids": [9], "prompt_mask": [1]}, "prompt_mask"),
        ({"prompt": "one", "completion_ids": [9], "attention_mask": [1, 1]}, "attention_mask"),
        ({"text": "one two three", "loss_mask": [0, 0, 1, 1, 1]}, "loss_mask"),
        ({"prompt": "one", "completion": "two", "completion_mask": [0]}, "completion_mask"),
        ({"messages": [{"role": "user", "content": "one"}], "assistant_masks": [0]}, "assistant_masks"),
    ],
)
def test_masks_that_fit_no_token_ids_are_refused(tokenizer, row: dict, named: str) -> None:
    with pytest.raises(RunError, match=named):
        encode_row(row, tokenizer)


# chat

TWO_TURNS = [says("user", "one"), says("assistant", "two three"), says("user", "four"), says("assistant", "one")]
TWO_TURNS_IDS = [
    *(START, USER, NEWLINE, ONE, END, NEWLINE, START, ASSISTANT, NEWLINE, TWO, THREE, END, NEWLINE),
    *(START, USER, NEWLINE, FOUR, END, NEWLINE, START, ASSISTANT, NEWLINE, ONE, END, NEWLINE),
]
TWO_TURNS_LABELS = [X] * 9 + [TWO, THREE, END, X] + [X] * 9 + [ONE, END, X]


def test_null_fields_are_dropped(tokenizer) -> None:
    template = CHATML.replace("{{ m.content }}", "{{ m.content }}{% if m.tool_calls is defined %} six{% endif %}")
    messages = [message | {"tool_calls": None} for message in TWO_TURNS]
    check({"messages": messages}, tokenizer, TWO_TURNS_IDS, TWO_TURNS_LABELS, template)


MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
)


@pytest.mark.parametrize(
    "template",
    [
        MARKED,
        MARKED.replace("{% generation %}", "{%- generation -%}"),
        # The token that ends the turn carries loss wherever endgeneration is.
        MARKED.replace("<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>"),
    ],
)
def test_generation_markers_by_hand(tokenizer, template: str) -> None:
    check({"messages": TWO_TURNS}, tokenizer, TWO_TURNS_IDS, TWO_TURNS_LABELS, template)
    first = [START, ASSISTANT, NEWLINE, TWO, THREE, END, NEWLINE]  # the assistant's turn alone
    check({"messages": TWO_TURNS[1:2]}, tokenizer, first, [X, X, X, TWO, THREE, END, X], template)


def test_no_assistant_turn_no_loss(tokenizer) -> None:
    check({"messages": TWO_TURNS[:1], "prompt": "two", "completion": "two"}, tokenizer, TWO_TURNS_IDS[:6], [X] * 6)


def test_no_template() -> None:
    tokenizer = byte_tokenizer(["<eos>"], "<eos>")
    with pytest.raises(UsageError, match="data.chat_template"):
        encode_row({"messages": TWO_TURNS}, tokenizer)


def test_slow_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = word_tokenizer()
    monkeypatch.setattr(type(tokenizer), "is_fast", property(lambda self: False))
    with pytest.raises(RunError, match="fast tokenizer"):
        encode_row({"messages": TWO_TURNS}, tokenizer)
