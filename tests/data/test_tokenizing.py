# SPDX-License-Identifier: Apache-2.0
"""Texts begin and end once; prompt and completion are tokenised as one text."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, models, normalizers, processors
from toy_tokenizers import CHATML, word_tokenizer
from transformers import PreTrainedTokenizerFast

from mtp_lightning.data.encoding import encode_row
from mtp_lightning.data.tokenizing import tokenize
from mtp_lightning.errors import RunError

BOS, EOS, ONE, TWO = 1, 2, 9, 10


def both_ends() -> PreTrainedTokenizerFast:
    """Puts a first token before a text and an end token after it."""
    tokenizer = word_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 1), ("<eos>", 2)]
    )
    return tokenizer


@pytest.mark.parametrize("make", [word_tokenizer, both_ends])
@pytest.mark.parametrize("text", ["one two", "<bos> one two", "<bos><bos>one two <eos>", "one two<eos>"])
def test_rows_begin_and_end_once(make, text: str) -> None:
    tokenizer = make()
    assert list(encode_row({"text": text}, tokenizer).input_ids) == [BOS, ONE, TWO, EOS]
    row = encode_row({"prompt": text.replace("one two", "one ").replace("<eos>", ""), "completion": "two"}, tokenizer)
    assert row.input_ids == [BOS, ONE, TWO, EOS] and row.loss == [False, False, True, True]


def test_a_first_part_of_two_tokens() -> None:
    tokenizer = word_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> <unk> $A", special_tokens=[("<bos>", 1), ("<unk>", 0)]
    )
    for text in ("one", "<bos><unk>one"):
        assert tokenize(text, tokenizer, add_first=True) == [BOS, 0, ONE]
    assert tokenize("zzz zzz", word_tokenizer(bos=False), add_first=True) == [0, 0]


def test_a_rendered_chat_begins_once() -> None:
    template = "{{ bos_token }}" + CHATML
    messages = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
    once = encode_row({"messages": messages}, word_tokenizer(), template)
    twice = encode_row({"messages": messages}, word_tokenizer(), "{{ bos_token }}" + template)
    assert once == twice and once.input_ids[:2] == [BOS, 3]


def test_surrogates_are_refused() -> None:
    with pytest.raises(RunError, match="surrogate"):
        tokenize("one \ud800", word_tokenizer(), add_first=True)


def sentencepiece() -> PreTrainedTokenizerFast:
    """Puts the mark of a space before each text, as Llama 2 does."""
    pieces = ["<unk>", "</s>", "▁", "x", "=", "5", "▁x", "▁5", "[/INST]"]
    merges = [("▁", "x"), ("▁", "5")]
    model = Tokenizer(models.BPE({piece: number for number, piece in enumerate(pieces)}, merges, unk_token="<unk>"))
    model.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    model.add_special_tokens(["</s>", "[/INST]"])
    return PreTrainedTokenizerFast(tokenizer_object=model, eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize("is_fast", [True, False])
def test_pieces_of_sentencepiece_are_those_of_the_joined_text(is_fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone, a completion would begin with the mark that begins a text."""
    tokenizer = sentencepiece()
    monkeypatch.setattr(type(tokenizer), "is_fast", property(lambda self: is_fast))
    row = encode_row({"prompt": "x=", "completion": "5"}, tokenizer)
    assert tokenizer.convert_ids_to_tokens(row.input_ids) == ["▁x", "=", "5", "</s>"]
    assert row.loss == [False, False, True, True]
    row = encode_row({"prompt": "x= ", "completion": "5"}, tokenizer)  # the space joins the answer's token
    assert tokenizer.convert_ids_to_tokens(row.input_ids) == ["▁x", "=", "▁5", "</s>"]
    assert row.loss == [False, False, True, True]


TURNS = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}[/INST]"
    "{% else %} {{ m.content }} </s>{% endif %}{% endfor %}"
)
MARKED = TURNS.replace(" {{ m.content }} </s>", "{% generation %} {{ m.content }}{% endgeneration %} </s>")


@pytest.mark.parametrize("template", [TURNS, MARKED])
@pytest.mark.parametrize(
    ("completion", "end"),
    [("5", ["▁", "</s>"]), (" 5 </s>", ["▁", "</s>"]), ("5</s>", ["</s>"]), (None, ["▁", "</s>"])],
)
def test_the_end_of_a_turn_is_that_of_the_joined_text(template: str, completion: str | None, end: list[str]) -> None:
    """Alone, it would begin with the mark that begins a text; None: as messages."""
    tokenizer, prompt = sentencepiece(), [{"role": "user", "content": "x"}]
    row = {"prompt": prompt, "completion": completion}
    if completion is None:
        row = {"messages": [*prompt, {"role": "assistant", "content": "5"}]}
    encoded = encode_row(row, tokenizer, template)
    trained = [token for token, flag in zip(encoded.input_ids, encoded.loss, strict=True) if flag]
    pieces = tokenizer.convert_ids_to_tokens(trained)
    assert pieces[-len(end) - 1 :] == ["▁5", *end]
    assert pieces.count("</s>") == 1
