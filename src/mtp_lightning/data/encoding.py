# SPDX-License-Identifier: Apache-2.0
"""Encoding: one row -> token ids and which of them carry loss. Pure functions of the row and the tokenizer.

| row | tokens | loss |
|---|---|---|
| ``text`` | as the tokenizer gives them, its first token included, then its end token | all |
| ``prompt`` + ``completion`` | each encoded alone, then joined, then the end token or turn's end | completion and its end |
| ``prompt`` + ``completion_ids`` | the prompt encoded, then the ids as they are | the ids |
| ``prompt_ids`` + ``completion_ids`` | as they are: what ``mtp distill`` writes | the completion's |
| ``messages`` | the base's chat template | assistant turns with their end-of-turn token |
| ``input_ids`` (+ ``labels``) | as they are | all, or where the label is not -100 |

Prompt and completion are encoded separately because together a token could span the border between them; so write the
space between the two into one of them. A ``prompt`` may be a list of messages: it is rendered with the generation prompt.
The length is not limited here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from mtp_lightning.data.chat import Message, encode_chat_prompt, encode_messages, end_of_turn
from mtp_lightning.data.reading import ROW_TYPES, row_type
from mtp_lightning.errors import RunError
from mtp_lightning.types import IGNORE_INDEX

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class EncodedRow(NamedTuple):
    """A row as tokens."""

    input_ids: list[int]  # token ids
    loss: list[bool]  # for each token, True if it carries loss
    splittable: bool  # True if a row that is too long may be cut into pieces (plain text); otherwise its end is dropped


def encode_row(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, chat_template: str | None = None) -> EncodedRow:
    """The row as tokens, by the first type that its fields fit; a field that is None counts as absent.

    Raises a RunError if the row has none of the fields needed or one has the wrong type, and a UsageError if it needs a
    chat template and there is none.
    """
    fields = {name for name, value in row.items() if value is not None}
    type_ = row_type(fields)
    if type_ == "messages":
        ids, loss = encode_messages(row["messages"], tokenizer, chat_template)
        return EncodedRow(ids, loss, splittable=False)
    if type_ == "prompt":
        return _encode_completion(row, tokenizer, chat_template)
    if type_ == "text":
        text = _text(row, "text")
        ids = _with_end_token(tokenizer(text, verbose=False)["input_ids"], tokenizer) if text else []
        return EncodedRow(ids, [True] * len(ids), splittable=True)
    if type_ == "input_ids":
        return _encode_ids(row)
    raise RunError(f"expected {ROW_TYPES}, got {', '.join(sorted(fields)) or 'no field'}.")


def _encode_completion(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, chat_template: str | None) -> EncodedRow:
    """A prompt without loss and its completion with loss."""
    has_completion_ids = row.get("completion_ids") is not None
    if has_completion_ids and row.get("prompt_ids") is not None:
        prompt = _token_ids(row, "prompt_ids")
    elif isinstance(row["prompt"], list):
        prompt = encode_chat_prompt(row["prompt"], tokenizer, chat_template)
    else:
        text = _text(row, "prompt")
        prompt = list(tokenizer(text, verbose=False)["input_ids"])
        # Some tokenizers append an end token to every text; the completion would then follow an end token.
        end = tokenizer.eos_token_id
        if end is not None and prompt and prompt[-1] == end and not text.endswith(tokenizer.eos_token):
            prompt.pop()
    if has_completion_ids:
        completion = _token_ids(row, "completion_ids")
    else:
        completion = list(tokenizer(_text(row, "completion"), add_special_tokens=False, verbose=False)["input_ids"])
        end = completion_end(row["prompt"], tokenizer, chat_template)
        completion += [] if end and completion[-len(end) :] == end else end
    return EncodedRow(prompt + completion, [False] * len(prompt) + [True] * len(completion), splittable=False)


def completion_end(
    prompt: str | Sequence[Message], tokenizer: PreTrainedTokenizerBase, chat_template: str | None = None
) -> list[int]:
    """Token ids that end a completion: behind messages the template's end of turn, else the tokenizer's end token."""
    try:
        end = [] if isinstance(prompt, str) else end_of_turn(prompt, tokenizer, chat_template)
    except RunError:  # the template rewrites answers
        end = []
    return end or ([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])


def _encode_ids(row: Mapping[str, Any]) -> EncodedRow:
    """A row that is tokens already; without labels it may be split, like text."""
    ids = _token_ids(row, "input_ids")
    if row.get("labels") is None:
        return EncodedRow(ids, [True] * len(ids), splittable=True)
    labels = _token_ids(row, "labels")
    if len(labels) != len(ids):
        raise RunError(f"labels must be as long as input_ids ({len(ids)}), got {len(labels)}.")
    for position, (token, label) in enumerate(zip(ids, labels, strict=True)):
        if label not in (token, IGNORE_INDEX):
            raise RunError(wrong_label(position, token, label))
    return EncodedRow(ids, [label != IGNORE_INDEX for label in labels], splittable=False)


def wrong_label(position: int, token: int, label: int) -> str:
    """The error message for a label that is neither its token nor ignored."""
    return (
        f"labels must be the token of the same position or {IGNORE_INDEX}, got {label} at position {position} where"
        f" input_ids has {token}. Do not shift the labels."
    )


def _with_end_token(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    end = tokenizer.eos_token_id
    return list(ids) if end is None or (ids and ids[-1] == end) else [*ids, end]


def _text(row: Mapping[str, Any], field: str) -> str:
    if not isinstance(row[field], str):
        raise RunError(f"{field} must be text, got {type(row[field]).__name__}.")
    return row[field]


def _token_ids(row: Mapping[str, Any], field: str) -> list[int]:
    ids = list(row[field])
    if not all(isinstance(value, int) for value in ids):
        raise RunError(f"{field} must be a list of token ids, got {ids[:3]!r}...")
    return ids
