# SPDX-License-Identifier: Apache-2.0
"""Chat: messages -> token ids and which of them the assistant wrote, through the base's chat template.

Three methods, the first that fits:

1. Markers: the template has ``{% generation %}`` and marks what the assistant wrote. Where the markers leave out the
   end-of-turn token that follows, it is added.
2. Prefixes: the text of the messages before an assistant turn, with the generation prompt, ends where the turn begins;
   the text up to and including the turn ends where it ends. Both must be prefixes of the full text, which is checked.
3. Placeholder: templates that drop the thinking of earlier turns (Qwen3) write a turn differently once messages follow.
   The conversation is then rendered with a placeholder as that turn's content: what precedes the placeholder and what
   follows the turn must be the full text's beginning and end, which is checked too. Anything else is an error.

The text is always the template's own: an earlier turn whose thinking it drops is trained without it. The assistant's
end-of-turn token carries loss, the newline that some templates put after it does not.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mtp_lightning.errors import RunError, UsageError, one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]

_GENERATION = re.compile(r"\{%-?\s*generation\b")
_ROLES = {"system", "developer", "user", "assistant", "tool", "function", "ipython", "environment"}
_PLACEHOLDER = "turnmark0turnmark"  # letters and a digit only, so that no template trims, splits or escapes it
_MARKERS = "Give data.chat_template a template with {% generation %} .. {% endgeneration %} around what the assistant says"


def encode_messages(
    messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, chat_template: str | None = None
) -> tuple[list[int], list[bool]]:
    """Token ids of a conversation, and for each True if it carries loss: if the assistant wrote it.

    Raises a UsageError if there is no template, and a RunError if the messages are malformed, the template rejects them,
    or the assistant's part cannot be found.
    """
    messages = clean_messages(messages)
    template = template_of(tokenizer, chat_template)
    check_roles(messages, template)
    text = render(messages, tokenizer, template)
    if _GENERATION.search(template):
        ids, loss = _encode_with_markers(messages, tokenizer, template)
    elif not tokenizer.is_fast:
        raise RunError("rows with messages need a fast tokenizer: give prompt + completion or input_ids + labels.")
    else:
        out = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids = out["input_ids"]
        # A token lies in a span if an odd number of span borders is at or before its first character.
        borders = np.ravel(_assistant_spans(messages, text, tokenizer, template))
        first_characters = [begin for begin, _ in out["offset_mapping"]]
        loss = (np.searchsorted(borders, first_characters, side="right") % 2 == 1).tolist()
    if all(loss) and any(message["role"] != "assistant" for message in messages):
        raise RunError(f"every token carries loss, though the messages' roles are {_roles(messages)}. {_MARKERS} only.")
    return ids, loss


def encode_chat_prompt(
    messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, chat_template: str | None = None
) -> list[int]:
    """Token ids of a conversation that the assistant is to continue, generation prompt included."""
    text = render(clean_messages(messages), tokenizer, template_of(tokenizer, chat_template), generation_prompt=True)
    return _tokenize(text, tokenizer)


def end_of_turn(
    messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, chat_template: str | None = None
) -> list[int]:
    """Token ids that the template writes after an assistant answer to ``messages`` and that carry loss, usually one.

    Raises a RunError if the template does not write the answer unchanged.
    """
    answer = {"role": "assistant", "content": _PLACEHOLDER}
    text = render(clean_messages([*messages, answer]), tokenizer, template_of(tokenizer, chat_template))
    if text.count(_PLACEHOLDER) != 1:
        raise RunError("the chat template does not write the assistant's content once and unchanged.")
    after = text.split(_PLACEHOLDER)[1]
    return _tokenize(after[: _turn_length(after, tokenizer)], tokenizer)


def clean_messages(messages: Sequence[Message]) -> list[Message]:
    """The messages without null fields (tables fill them in), contents as text; a RunError if they are malformed.

    An assistant message that calls a tool needs no content.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise RunError(f"messages must be a list of {{role, content}}, got {one_line(repr(messages), 80)}.")
    cleaned = []
    for message in messages:
        fields = {key: value for key, value in message.items() if value is not None} if isinstance(message, dict) else {}
        role, content = fields.get("role"), fields.get("content")
        calls_tool = role == "assistant" and (fields.get("tool_calls") or fields.get("function_call"))
        has_content = isinstance(content, str | list) or (content is None and calls_tool)
        if not isinstance(role, str) or not has_content:
            raise RunError(
                f"each of messages must be {{role, content}} with text in both, got {one_line(repr(message), 80)}."
            )
        if isinstance(content, list):
            fields["content"] = _joined(content)
        cleaned.append(fields)
    return cleaned


def _joined(parts: list[Any]) -> str:
    """The text of a content in parts: many templates would write the list itself."""
    texts = []
    for part in parts or [parts]:
        text = part
        if isinstance(part, dict):
            text = part.get("text") if (part.get("type") or "text") == "text" else None
        if not isinstance(text, str):
            raise RunError(f"content of a message must be text or parts of text, got {one_line(repr(part), 80)}.")
        texts.append(text)
    return "".join(texts)


def template_of(tokenizer: PreTrainedTokenizerBase, chat_template: str | None) -> str:
    """The source of the template: the given one, or the base's own; a UsageError if there is none."""
    if chat_template is not None:
        return chat_template
    try:
        return tokenizer.get_chat_template()
    except ValueError as error:
        raise UsageError("rows with messages need a chat template: set data.chat_template to a jinja file.") from error


def render(
    messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, template: str, generation_prompt: bool = False
) -> str:
    """The conversation as text, special tokens included; a RunError if the template rejects the messages."""
    try:
        return tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=generation_prompt, chat_template=template
        )
    except Exception as error:  # templates raise whatever jinja and their own checks raise
        roles = _roles(messages) or "none"
        raise RunError(f"the chat template refuses the messages (roles: {roles}): {one_line(error)}") from error


def check_roles(messages: Sequence[Message], template: str) -> None:
    """Raise a RunError for an unknown role: most templates would write it without complaint, and it would carry no loss."""
    for number, message in enumerate(messages, 1):
        role = message["role"]
        if role not in _ROLES and f"'{role}'" not in template and f'"{role}"' not in template:
            raise RunError(
                f"message {number} has the role {role!r}, not in the template; expected one of {', '.join(sorted(_ROLES))}."
            )


def _encode_with_markers(
    messages: list[Message], tokenizer: PreTrainedTokenizerBase, template: str
) -> tuple[list[int], list[bool]]:
    """Method 1: the template's own generation markers."""
    out = tokenizer.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, chat_template=template
    )
    ids, loss = list(out["input_ids"]), [bool(flag) for flag in out["assistant_masks"]]
    turns = [number for number, message in enumerate(messages) if message["role"] == "assistant"]

    # Markers in the wrong place.
    if not any(loss) and turns:
        raise RunError("the chat template has generation markers, but they mark no token of the assistant.")
    before = messages[: turns[0]] if turns else messages
    if any(loss) and before:
        num_before = len(_tokenize(render(before, tokenizer, template), tokenizer))
        if loss.index(True) < num_before - 1:  # the last token may be a different one where text follows
            raise RunError(f"the template's generation markers mark token {loss.index(True)}, before the assistant's turns.")

    # The end-of-turn token carries loss even if it follows the marked part: otherwise no answer learns to stop.
    try:
        end = end_of_turn(messages[: turns[-1]], tokenizer, template) if turns else []
    except RunError:  # the template rewrites contents: there is nothing to go by but its markers
        end = []
    borders = [place for place in range(1, len(ids)) if loss[place - 1] and not loss[place]]
    for place in borders if end else []:
        if ids[place : place + len(end)] == end and ids[place - len(end) : place] != end:
            loss[place : place + len(end)] = [True] * len(end)
    return ids, loss


def _assistant_spans(
    messages: list[Message], text: str, tokenizer: PreTrainedTokenizerBase, template: str
) -> list[tuple[int, int]]:
    """The assistant's turns in the text, in order and disjoint, as [begin, end) in characters."""
    spans = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = render(messages[:index], tokenizer, template, generation_prompt=True)
        through = render(messages[: index + 1], tokenizer, template)
        if text.startswith(through) and through.startswith(before):  # method 2: prefixes
            spans.append((len(before), len(before) + _turn_length(through[len(before) :], tokenizer)))
        else:
            spans.append(_span_by_placeholder(messages, index, text, before, tokenizer, template))
    if any(begin < end for (_, end), (begin, _) in zip(spans, spans[1:], strict=False)):
        raise _not_found("the messages")
    return spans


def _span_by_placeholder(
    messages: list[Message], index: int, text: str, before: str, tokenizer: PreTrainedTokenizerBase, template: str
) -> tuple[int, int]:
    """Method 3: a turn that the template writes differently once messages follow."""
    error = _not_found(f"message {index + 1} of {len(messages)}")
    marked = [*messages[:index], {**messages[index], "content": _PLACEHOLDER}, *messages[index + 1 :]]
    full = render(marked, tokenizer, template)
    alone = render(marked[: index + 1], tokenizer, template)  # without the messages that follow
    if _PLACEHOLDER in text or full.count(_PLACEHOLDER) != 1 or alone.count(_PLACEHOLDER) != 1:
        raise error

    # The full text is head, content, turn_end, rest.
    head, tail = full.split(_PLACEHOLDER)
    turn_end = alone.split(_PLACEHOLDER)[1]
    rest = tail.removeprefix(turn_end)
    begin = len(before) if text.startswith(before) else len(head)
    end = len(text) - len(rest)
    pieces_match = tail.startswith(turn_end) and text.startswith(head) and text.endswith(rest) and begin <= end
    if not pieces_match or not text[:end].endswith(turn_end):
        raise error
    return begin, begin + _turn_length(text[begin:end], tokenizer)


def _not_found(place: str) -> RunError:
    return RunError(f"the chat template writes {place} differently once messages follow. {_MARKERS}.")


def _turn_length(turn: str, tokenizer: PreTrainedTokenizerBase) -> int:
    """Length of a turn's text up to its last token with loss: white space after an end-of-turn token has none."""
    special = {token.content for token in tokenizer.added_tokens_decoder.values()} | set(tokenizer.all_special_tokens)
    trimmed = turn.rstrip()
    return len(trimmed) if any(trimmed.endswith(token) for token in special if token) else len(turn)


def _tokenize(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    # The template writes the special tokens that the base expects: adding them again would double the first.
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _roles(messages: Sequence[Message]) -> str:
    return ", ".join(str(message["role"]) for message in messages)
