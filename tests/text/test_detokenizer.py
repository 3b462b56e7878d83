# SPDX-License-Identifier: Apache-2.0
"""Text of tokens behind a prompt: spaces and characters at the border, and stop strings with special tokens."""

from __future__ import annotations

import pytest
from toy_tokenizers import byte_tokenizer, llama_tokenizer, word_tokenizer
from transformers import PreTrainedTokenizerFast

from mtp_lightning.text.detokenizer import Detokenizer, StoppableText, decode_behind


def slow(tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> PreTrainedTokenizerFast:
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    return tokenizer


def as_bytes(text: str) -> list[int]:
    return [6 + byte for byte in text.encode()]


@pytest.mark.parametrize("is_fast", [True, False])
def test_spaces_and_characters_at_the_borders(is_fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = llama_tokenizer() if is_fast else slow(llama_tokenizer(), monkeypatch)
    assert tokenizer.decode([3]) == "Paris"  # what is to be avoided
    assert decode_behind(tokenizer, [1, 4], [3, 2]) == " Paris"
    assert decode_behind(tokenizer, [1], [3]) == "Paris"  # the text begins here
    assert decode_behind(tokenizer, [4], [*as_bytes("é€")]) == "é€"
    assert decode_behind(tokenizer, [4], [5, *as_bytes("\ufffd")]) == "x\ufffd"  # the model wrote it
    assert decode_behind(tokenizer, [4], [5, *as_bytes("€")[:2]]) == "x"  # cut in the middle
    assert decode_behind(tokenizer, [4], [5, *as_bytes("\ufffd"), *as_bytes("€")[:2]]) == "x\ufffd"
    assert decode_behind(tokenizer, [4, *as_bytes("\ufffd")], [5, 3]) == "x Paris"
    assert decode_behind(tokenizer, [4, *as_bytes("\ufffd")], [3, 5]) == " Parisx"
    assert stopped(StoppableText(tokenizer, [4], ["\ufffd"]), [5, *as_bytes("\ufffd")])[1] == "x"
    detokenizer = Detokenizer(tokenizer, [4])
    assert [detokenizer.add(token) for token in as_bytes("€")] == ["", "", "€"] and detokenizer.rest() == ""


def test_ids_that_only_the_padded_vocabulary_of_a_base_has() -> None:
    tokenizer = byte_tokenizer(["<eos>"], "<eos>")
    ids = [5, tokenizer("é", add_special_tokens=False).input_ids[0]]
    assert decode_behind(tokenizer, [4], [*ids, len(tokenizer) + 3]) == decode_behind(tokenizer, [4], ids)


def test_bytes_of_characters() -> None:
    tokenizer = byte_tokenizer(["<eos>"], "<eos>")
    ids = tokenizer("xé\ufffd")["input_ids"]
    assert decode_behind(tokenizer, tokenizer("ab \ufffd")["input_ids"], ids) == "xé\ufffd"
    assert decode_behind(tokenizer, [], ids[:2]) == "x" and decode_behind(tokenizer, [], ids[:-1]) == "xé"


def stopped(text: StoppableText, tokens: list[int]) -> tuple[int | None, str]:
    """Index of the token that stopped a text, and the text."""
    index = next((index for index, token in enumerate(tokens) if text.add(token)), None)
    text.finish()
    return index, text.text


def test_stop_strings_with_special_tokens() -> None:
    tokenizer = word_tokenizer()
    one, end, newline, two = 9, 4, 5, 10
    tokens = [one, end, newline, two]
    assert stopped(StoppableText(tokenizer, [two], ["<|im_end|>"]), tokens) == (1, " one")
    assert stopped(StoppableText(tokenizer, [two], ["<|im_end|> \n"]), tokens) == (2, " one")
    assert stopped(StoppableText(tokenizer, [two], ["<eos>", "two"]), tokens) == (
        3,
        " one \n ",
    )  # special tokens stay hidden
    assert stopped(StoppableText(tokenizer, [two], ["three"]), tokens) == (None, " one \n two")


def test_an_end_that_could_become_a_stop_string_is_held_back() -> None:
    text = StoppableText(byte_tokenizer(["<eos>"], "<eos>"), [], ["bcd"])
    ids = text._detokenizer.tokenizer("xbcx")["input_ids"]
    shown = []
    for token in ids:
        assert not text.add(token)
        shown.append(text.text)
    assert shown == ["x", "x", "x", "xbcx"]
