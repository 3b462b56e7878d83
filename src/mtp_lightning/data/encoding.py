# SPDX-License-Identifier: Apache-2.0
"""Encoding: one row -> token ids and which of them carry loss. Pure functions of the row and the tokenizer.

| row | tokens | loss |
|---|---|---|
| ``text`` | as the tokenizer gives them, its first token included, then its end token | all |
| ``prompt`` + ``completion`` | of the joined text, then the end token | from the first with a character of the completion |
| ``prompt`` + ``completion_ids`` | the prompt encoded, then the ids as they are | the ids |
| ``prompt_ids`` + ``completion_ids`` | as they are, without padding at the ends | the completion's, or where masks say |
| a conversation (``messages.py``) | the base's chat template | assistant turns with their end-of-turn token |
| ``input_ids`` (+ ``labels``, masks) | as they are, without padding at the ends | all, or where labels and masks say |

Prompt and completion are encoded together because that is how the model reads them: a token may span the border. A
``prompt`` may be a list of messages: it is rendered with the generation prompt, and the template's own end of turn follows
the completion. The length is not limited here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mtp_lightning.data.chat import encode_chat_prompt, encode_messages, end_of_turn, render_chat_prompt
from mtp_lightning.data.formats import ROW_TYPES
from mtp_lightning.data.messages import QUESTIONS, Message, chat_of, clean_tools, with_parsed_chats
from mtp_lightning.data.tokenizing import tokenize, tokenize_with_spans
from mtp_lightning.errors import RunError, one_line
from mtp_lightning.types import IGNORE_INDEX

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TYPES = (
    ("prompt", {"prompt_ids", "completion_ids"}),
    *(("messages", {field}) for field in ("messages", "conversations", "conversation")),
    ("prompt", {"prompt", "completion"}),
    ("prompt", {"prompt", "completion_ids"}),
    ("text", {"text"}),
    ("input_ids", {"input_ids"}),
    *(("messages", set(pair)) for pair in QUESTIONS),
)
_LOSS_MASKS = ("loss_mask", "completion_mask", "assistant_masks")


class EncodedRow(NamedTuple):
    """A row as tokens."""

    input_ids: Sequence[int] | np.ndarray  # token ids
    loss: Sequence[bool] | np.ndarray  # for each token, True if it carries loss
    splittable: bool  # True if a row that is too long may be cut into pieces (plain text); otherwise its end is dropped


def row_type(fields: Mapping[str, Any] | set[str]) -> str | None:
    """The type of a row with these fields, by the first that fits: prompt, messages, text, input_ids; None if none does."""
    return next((kind for kind, needed in _TYPES if needed <= set(fields)), None)


def is_plain_text(row: Mapping[str, Any]) -> bool:
    """True for a row of text, or of a prompt and completion of text, which no chat template is applied to."""
    row = with_parsed_chats(row)
    fields = {name for name, value in row.items() if value is not None}
    kind = row_type(fields)
    is_completion = kind == "prompt" and fields.isdisjoint({"prompt_ids", "completion_ids"})
    return kind == "text" or (is_completion and isinstance(row["prompt"], str))


def encode_row(
    row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, chat_template: str | None = None
) -> EncodedRow | None:
    """The row as tokens, by the first type that its fields fit; None if the fields that it needs are there and null.

    Raises a RunError if the row has none of the fields needed or one has the wrong type (RefusedByTemplate if the chat
    template refuses it), and a UsageError if it needs a chat template and there is none.
    """
    row = with_parsed_chats(row)
    kind = row_type({name for name, value in row.items() if value is not None})
    if kind is None and row_type(row) is not None:
        return None
    both_are_chats = all(isinstance(row.get(field), list) for field in ("prompt", "completion"))
    is_chat = kind == "messages" or (kind == "prompt" and both_are_chats and row.get("prompt_ids") is None)
    if kind in ("messages", "text") or (kind == "prompt" and row.get("completion_ids") is None):
        _refuse_masks(row, (*_LOSS_MASKS, "prompt_mask"))  # whoever made them had other tokens
    if is_chat and (chat := chat_of(row)) is not None:
        ids, loss = encode_messages(chat.messages, tokenizer, chat_template, chat.tools)
        return EncodedRow(ids, loss, splittable=False)
    if kind == "prompt":
        return _encode_completion(row, tokenizer, chat_template)
    if kind == "text":
        text = _text(row, "text")
        ids = _with_end_token(tokenize(text, tokenizer, add_first=True), tokenizer) if text else []
        return EncodedRow(ids, [True] * len(ids), splittable=True)
    if kind == "input_ids":
        return _encode_ids(row)
    fields = one_line(", ".join(map(str, row)), 120) or "none"
    if any(row.get(question) is not None for question, _ in QUESTIONS):
        raise RunError(
            "prompts without answers: run mtp distill on them first, or rename the field that holds their answers:"
            f" expected rows with {ROW_TYPES}, got the fields {fields}."
        )
    raise RunError(f"expected rows with {ROW_TYPES}, got the fields {fields}.")


def _encode_completion(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, chat_template: str | None) -> EncodedRow:
    """A prompt without loss and its completion with loss."""
    is_chat = row.get("prompt_ids") is None and isinstance(row["prompt"], list)
    template = (tokenizer, chat_template, clean_tools(row.get("tools")) if is_chat else None)
    if row.get("completion_ids") is not None:
        completion = _token_ids(row, "completion_ids")
        has_prompt_ids = row.get("prompt_ids") is not None
        if has_prompt_ids:
            prompt: Sequence[int] | np.ndarray = _token_ids(row, "prompt_ids")
        elif is_chat:
            prompt = encode_chat_prompt(row["prompt"], *template)
        else:
            prompt = tokenize(_text(row, "prompt"), tokenizer, add_first=True)
        loss = np.concatenate([np.zeros(len(prompt), bool), _loss_of(row, len(completion), "completion_ids")])
        joined = np.concatenate([np.asarray(prompt, np.int64), completion])
        if not has_prompt_ids:
            _refuse_masks(row, ("attention_mask", "prompt_mask"))
            return EncodedRow(joined, loss, splittable=False)
        text = _without_padding(row, len(joined), "prompt_ids + completion_ids", len(prompt))
        return EncodedRow(joined[text], loss[text], splittable=False)
    prompt_text = render_chat_prompt(row["prompt"], *template) if is_chat else _text(row, "prompt")
    ids, counts = _encode_joined(prompt_text, _text(row, "completion"), tokenizer, add_first=not is_chat)
    end = completion_end(row["prompt"], tokenizer, chat_template)
    has_end = ids[-len(end) :] == end or (ids[-1:] == end[-1:] and end[-1] in tokenizer.added_tokens_decoder)
    if end and not (has_end and counts[-1]):
        ids, counts = [*ids, *end], [*counts, *[True] * len(end)]
    return EncodedRow(ids, counts, splittable=False)


def completion_end(
    prompt: str | Sequence[Message], tokenizer: PreTrainedTokenizerBase, chat_template: str | None = None
) -> list[int]:
    """Token ids that end a completion: behind messages the template's end of turn, else the tokenizer's end token."""
    try:
        end = [] if isinstance(prompt, str) else end_of_turn(prompt, tokenizer, chat_template)
    except RunError:  # the template rewrites answers
        end = []
    return end or ([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])


def _encode_joined(
    prompt: str, completion: str, tokenizer: PreTrainedTokenizerBase, add_first: bool
) -> tuple[list[int], list[bool]]:
    """Tokens of the joined text; those with a character of the completion carry loss."""
    if tokenizer.is_fast:
        ids, spans = tokenize_with_spans(prompt + completion, tokenizer, add_first)
        return ids, [end > len(prompt) for _, end in spans]
    ids, alone = (tokenize(text, tokenizer, add_first) for text in (prompt + completion, prompt))
    border = next(
        (n for n, pair in enumerate(zip(ids, alone, strict=False)) if pair[0] != pair[1]), min(len(ids), len(alone))
    )
    return ids, [place >= border for place in range(len(ids))]


def _encode_ids(row: Mapping[str, Any]) -> EncodedRow:
    """A row that is tokens already; without labels and masks it may be split, like text."""
    ids = _token_ids(row, "input_ids")
    loss, has_labels = _loss_of(row, len(ids), "input_ids"), row.get("labels") is not None
    if has_labels:
        labels = _token_ids(row, "labels")
        if len(labels) != len(ids):
            raise RunError(f"labels must be as long as input_ids ({len(ids)}), got {len(labels)}.")
        wrong = np.flatnonzero((labels != ids) & (labels != IGNORE_INDEX))
        if len(wrong):
            position = int(wrong[0])
            raise RunError(
                f"labels must be the token of the same position or {IGNORE_INDEX}, got {labels[position]} at position"
                f" {position} where input_ids has {ids[position]}. Do not shift the labels."
            )
        loss &= labels != IGNORE_INDEX
    splittable = not has_labels and all(row.get(name) is None for name in _LOSS_MASKS)
    _refuse_masks(row, ("prompt_mask",))
    text = _without_padding(row, len(ids), "input_ids")
    _check_single_document(row, text)
    return EncodedRow(ids[text], loss[text], splittable)


def _refuse_masks(row: Mapping[str, Any], names: Sequence[str]) -> None:
    """Raise a RunError for the first of these masks that the row has: it belongs to token ids that the row is not."""
    if found := [name for name in names if row.get(name) is not None]:
        raise RunError(
            f"{found[0]} masks token ids, and this row is not read as those: remove it, or the row's other fields."
        )


def _without_padding(row: Mapping[str, Any], length: int, field: str, prompt_length: int = 0) -> slice:
    """The tokens between the padding that ``attention_mask``, and for the prompt ``prompt_mask``, say."""
    is_text, names = np.ones(length, bool), []
    for name, part, of in (("attention_mask", length, field), ("prompt_mask", prompt_length, "prompt_ids")):
        if row.get(name) is not None:
            is_text[:part] &= _mask(row, name, part, of)
            names.append(name)
    inside = np.flatnonzero(is_text)
    begin, end = (int(inside[0]), int(inside[-1]) + 1) if len(inside) else (0, 0)
    if end - begin != len(inside):
        raise RunError(f"{', '.join(names)} may be 0 at the beginning and end of a row (padding), not in the middle.")
    return slice(begin, end)


def _loss_of(row: Mapping[str, Any], length: int, field: str) -> np.ndarray:
    """Where the row's loss masks are 1, [length] bool; everywhere without one."""
    loss = np.ones(length, bool)
    for name in _LOSS_MASKS:
        if row.get(name) is not None:
            loss &= _mask(row, name, length, field)
    return loss


def _mask(row: Mapping[str, Any], name: str, length: int, field: str) -> np.ndarray:
    """A mask of the tokens of a field, [length] bool."""
    mask = _array(row[name])
    if mask.shape != (length,) or not np.isin(mask, (0, 1)).all():
        raise RunError(
            f"{name} must be a list of 0 and 1 as long as {field} ({length}), got {one_line(repr(row[name]), 60)}."
        )
    return mask.astype(bool)


def _array(value: Any) -> np.ndarray:
    """The value as an array; one without dimensions if it is none."""
    try:
        return np.asarray(value)
    except (ValueError, OverflowError):  # lists of different lengths
        return np.asarray(None)


def _check_single_document(row: Mapping[str, Any], text: slice) -> None:
    """Rows that were packed by others would be trained as one text."""
    positions, lengths = row.get("position_ids"), row.get("seq_lengths")
    if positions is not None and (np.diff(_token_ids(row, "position_ids")[text]) != 1).any():
        raise RunError("position_ids must count up by one: packed rows are not read, data.packing packs documents.")
    if lengths is not None and np.size(lengths) > 1:
        raise RunError("seq_lengths names several documents: packed rows are not read, data.packing packs documents.")


def _with_end_token(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    end = tokenizer.eos_token_id
    return list(ids) if end is None or (ids and ids[-1] == end) else [*ids, end]


def _text(row: Mapping[str, Any], field: str) -> str:
    if not isinstance(row[field], str):
        raise RunError(f"{field} must be text, got {type(row[field]).__name__}.")
    return row[field]


def _token_ids(row: Mapping[str, Any], field: str) -> np.ndarray:
    """A list of whole numbers, [n] int64."""
    value, ids = row[field], _array(row[field])
    if ids.ndim != 1 or not (np.issubdtype(ids.dtype, np.signedinteger) or ids.dtype.kind == "u" or len(ids) == 0):
        raise RunError(f"{field} must be a list of token ids, got {one_line(repr(value), 60)}.")
    return ids.astype(np.int64)
