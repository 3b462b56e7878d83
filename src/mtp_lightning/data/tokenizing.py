# SPDX-License-Identifier: Apache-2.0
"""Tokenizing: a text -> token ids that begin and end once, wherever the text came from."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from mtp_lightning.errors import RunError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TokenizedText(NamedTuple):
    """A text as tokens."""

    ids: list[int]  # token ids
    spans: list[tuple[int, int]]  # characters [begin, end) of each; (0, 0) for what the tokenizer added


def is_utf8(text: str) -> bool:
    """False if the text holds unpaired surrogates: cut JSON escapes and undecodable bytes of a terminal give them."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def tokenize(text: str, tokenizer: PreTrainedTokenizerBase, add_first: bool) -> list[int]:
    """Token ids of a text, without an end token that the tokenizer appends; a RunError if it is not valid UTF-8.

    With ``add_first`` they begin with what the tokenizer puts before a text, once, even if the text begins with it too.
    Without (a rendered chat), they begin with the text, whose first token is not doubled either.
    """
    return _tokenize(text, tokenizer, add_first, spans=False).ids


def tokenize_with_spans(text: str, tokenizer: PreTrainedTokenizerBase, add_first: bool) -> TokenizedText:
    """``tokenize`` with the characters of each token; the tokenizer must be a fast one."""
    return _tokenize(text, tokenizer, add_first, spans=True)


def _tokenize(text: str, tokenizer: PreTrainedTokenizerBase, add_first: bool, spans: bool) -> TokenizedText:
    if not is_utf8(text):
        raise RunError("expected UTF-8 text, it contains an unpaired surrogate.")
    offsets = {"return_offsets_mapping": True} if spans else {}  # a slow tokenizer does not know the argument
    out = tokenizer(text, add_special_tokens=add_first, verbose=False, **offsets)
    ids = list(out["input_ids"])
    begin, end, eos = 0, len(ids), tokenizer.eos_token_id
    if add_first and len(ids) > 1 and ids[-1] == eos:
        plain = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        end -= not plain or plain[-1] != eos or ids[-2:-1] == [eos]
    if ids and ids[0] in ids[1:4]:  # perhaps doubled
        first = tokenizer("")["input_ids"] if add_first else [tokenizer.bos_token_id]
        first = first[:-1] if first and first[-1] == eos != first[0] else first
        while first and ids[begin : begin + 2 * len(first)] == 2 * first:
            begin += len(first)
    return TokenizedText(ids[begin:end], out["offset_mapping"][begin:end] if spans else [])
