# SPDX-License-Identifier: Apache-2.0
"""Chat: messages -> token ids and which of them the assistant wrote, through the base's chat template.

Three methods, the first that fits:

1. Markers: the template has ``{% generation %}`` and marks what the assistant wrote. Where the markers leave out the
   end-of-turn token that follows, it is added.
2. Prefixes: the text of the messages before an assistant turn, with the generation prompt, ends where the turn begins;
   the text up to and including the turn ends where it ends. Both must be prefixes of the full text, which is checked.
3. Placeholder: templates that drop the thinking of earlier turns (Qwen3) write a turn differently once messages follow,
   and some refuse the messages before a turn alone. The conversation is then rendered with a placeholder as that turn's
   content: what precedes the placeholder and what follows the turn must be the full text's beginning and end, which is
   checked too. Anything else is an error.

The text is always the template's own: an earlier turn whose thinking it drops is trained without it. The assistant's
end-of-turn token carries loss, the newline that some templates put after it does not.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mtp_lightning.data.messages import CALLS, Message, clean_messages, trained_messages
from mtp_lightning.data.tokenizing import tokenize, tokenize_with_spans
from mtp_lightning.errors import RunError, UsageError, one_line, os_reason
from mtp_lightning.paths import resolve

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Tools = list[dict[str, Any]]

_GENERATION = re.compile(r"\{%-?\s*generation\b")
_ROLES = {"system", "developer", "user", "assistant", "tool", "function", "ipython", "environment"}
_PLACEHOLDER = "turnmark0turnmark"  # letters and a digit only, so that no template trims, splits or escapes it
_ANSWERED = [{"role": "user", "content": "question"}, {"role": "assistant", "content": _PLACEHOLDER}]
_MARKERS = "Give data.chat_template a template with {% generation %} .. {% endgeneration %} around what the assistant says"


class RefusedByTemplate(RunError):
    """The chat template itself refuses a conversation, for a reason that the message quotes."""


class _Template(NamedTuple):
    """A chat template with the tokenizer and the tools of a conversation."""

    source: str
    tokenizer: PreTrainedTokenizerBase
    tools: Tools | None

    def render(self, messages: Sequence[Message], generation_prompt: bool = False) -> str:
        return render(messages, self.tokenizer, self.source, generation_prompt, self.tools)

    def try_render(self, messages: Sequence[Message], generation_prompt: bool = False) -> str | None:
        """None where the template refuses the messages."""
        try:
            return self.render(messages, generation_prompt)
        except RefusedByTemplate:
            return None


def encode_messages(
    messages: Sequence[Message],
    tokenizer: PreTrainedTokenizerBase,
    chat_template: str | None = None,
    tools: Tools | None = None,
) -> tuple[list[int], list[bool]]:
    """Token ids of a conversation, and for each True if it carries loss: if the assistant wrote it.

    ``tools`` are the functions that the template tells the assistant of; see ``trained_messages`` for messages without
    loss. Raises a UsageError if there is no template, RefusedByTemplate if it refuses the messages, and a RunError if they
    are malformed or the assistant's part cannot be found.
    """
    cleaned = clean_messages(messages)
    template = _Template(template_of(tokenizer, chat_template, tools), tokenizer, tools)
    check_roles(cleaned, template.source)
    cleaned, emptied = _without_unwritten_calls(cleaned, template.source)
    is_trained = np.array(trained_messages(messages)) & ~np.array(emptied)
    text = template.render(cleaned)
    turns = [number for number, message in enumerate(cleaned) if message["role"] == "assistant"]
    has_markers = _GENERATION.search(template.source) is not None
    if not tokenizer.is_fast and not has_markers:
        raise RunError("rows with messages need a fast tokenizer: give prompt + completion or input_ids + labels.")
    if has_markers:
        ids, loss = _encode_with_markers(cleaned, turns, template)
    else:
        ids, token_spans = tokenize_with_spans(text, tokenizer, add_first=False)
        spans = _assistant_spans(cleaned, [turn for turn in turns if is_trained[turn]], text, template)
        loss = _inside(spans, token_spans)
    if all(loss) and len(turns) < len(cleaned):
        raise RunError(f"every token carries loss, though the messages' roles are {_roles(cleaned)}. {_MARKERS} only.")
    if has_markers and (untrained := [turn for turn in turns if not is_trained[turn]]):
        marked_ids, token_spans = tokenize_with_spans(text, tokenizer, add_first=False)
        if marked_ids != ids:
            raise RunError("the place of messages without loss is unknown: their text gives other tokens than the markers.")
        cleared = _inside(_assistant_spans(cleaned, untrained, text, template), token_spans)
        loss = [flag and not off for flag, off in zip(loss, cleared, strict=True)]
    return ids, loss


def render_chat_prompt(
    messages: Sequence[Message],
    tokenizer: PreTrainedTokenizerBase,
    chat_template: str | None = None,
    tools: Tools | None = None,
) -> str:
    """A conversation that the assistant is to continue as text, generation prompt included."""
    template = template_of(tokenizer, chat_template, tools)
    cleaned, _ = _without_unwritten_calls(clean_messages(messages), template)
    check_roles(cleaned, template)
    return render(cleaned, tokenizer, template, generation_prompt=True, tools=tools)


def encode_chat_prompt(
    messages: Sequence[Message],
    tokenizer: PreTrainedTokenizerBase,
    chat_template: str | None = None,
    tools: Tools | None = None,
) -> list[int]:
    """Token ids of ``render_chat_prompt``."""
    return tokenize(render_chat_prompt(messages, tokenizer, chat_template, tools), tokenizer, add_first=False)


def end_of_turn(
    messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, chat_template: str | None = None
) -> list[int]:
    """Token ids that the template writes after an assistant answer to ``messages`` and that carry loss, usually one.

    Raises a RunError if the template does not write the answer unchanged.
    """
    template = _Template(template_of(tokenizer, chat_template), tokenizer, None)
    cleaned = clean_messages(messages) if messages else []
    text = template.try_render([*cleaned, _ANSWERED[1]]) or template.render(_ANSWERED)
    if text.count(_PLACEHOLDER) != 1:
        raise RunError("the chat template does not write the assistant's content once and unchanged.")
    after = text.split(_PLACEHOLDER)[1]
    end = after[: _turn_length(after, tokenizer)]
    # Behind an answer, because a text's first token may be written differently.
    answer, answer_and_end = (tokenize(part, tokenizer, add_first=False) for part in (_PLACEHOLDER, _PLACEHOLDER + end))
    if answer_and_end[: len(answer)] == answer:
        return answer_and_end[len(answer) :]
    return tokenize(end, tokenizer, add_first=False)


def read_template(file: str, key: str) -> str:
    """The source of a chat template in a file; RunError, with the option's name ``key``, if it can't be read."""
    try:
        return Path(resolve(file)).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = os_reason(error) if isinstance(error, OSError) else one_line(error)
        raise RunError(f"{key} {file!r} can't be read: {reason}.") from error


def template_of(tokenizer: PreTrainedTokenizerBase, chat_template: str | None, tools: Tools | None = None) -> str:
    """The source of the template: the given one, or the base's own, which may be another one for tools.

    A UsageError if there is none.
    """
    if chat_template is not None:
        return chat_template
    try:
        return tokenizer.get_chat_template(tools=tools or None)
    except ValueError as error:
        raise UsageError(
            "rows of messages, or of a question and its answer, need a chat template, and the base has none: set"
            " data.chat_template to a jinja file."
        ) from error


def render(
    messages: Sequence[Message],
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    generation_prompt: bool = False,
    tools: Tools | None = None,
) -> str:
    """The conversation as text, special tokens included; RefusedByTemplate if the template rejects it.

    A RunError if the template is not valid jinja.
    """
    import jinja2

    if tools and "tools" not in template:
        warnings.warn("the chat template has no place for tools: those of the rows are left out", stacklevel=2)
    # Servers write a call's arguments as JSON text. A template that writes them as JSON would quote that text again.
    if "tojson" in template and "is string" not in template:
        messages = [_with_parsed_arguments(message) for message in messages]
    try:
        return tokenizer.apply_chat_template(
            messages, tools=tools, tokenize=False, add_generation_prompt=generation_prompt, chat_template=template
        )
    except jinja2.TemplateSyntaxError as error:
        raise RunError(f"the chat template is not valid jinja: line {error.lineno}: {one_line(error)}.") from error
    except Exception as error:  # templates raise whatever jinja and their own checks raise
        roles = _roles(messages) or "none"
        raise RefusedByTemplate(f"the chat template refuses the messages (roles: {roles}): {one_line(error)}") from error


def _with_parsed_arguments(message: Message) -> Message:
    """The message with the arguments of its tool calls as objects."""
    if not isinstance(calls := message.get("tool_calls"), list):
        return message
    return {**message, "tool_calls": [_with_object(call) for call in calls]}


def _with_object(call: Any) -> Any:
    if isinstance(call, dict) and isinstance(call.get("function"), dict):
        return {**call, "function": _with_object(call["function"])}
    if isinstance(call, dict) and isinstance(arguments := call.get("arguments"), str):
        try:
            return {**call, "arguments": json.loads(arguments)}
        except ValueError:
            return call
    return call


def _without_unwritten_calls(messages: list[Message], template: str) -> tuple[list[Message], list[bool]]:
    """The messages without the tool calls that the template does not write, and for each True if nothing is left of it."""
    unwritten = {name for name in CALLS if not re.search(rf"\b{name}\b", template)}
    has_calls = [not unwritten.isdisjoint(message) for message in messages]
    if not any(has_calls):
        return messages, has_calls
    warnings.warn(
        "the chat template has no place for tool calls: those of the rows are left out, answers without text not trained",
        stacklevel=2,
    )
    without = [{"content": "", **{key: message[key] for key in message if key not in unwritten}} for message in messages]
    return without, [had and not message["content"].strip() for had, message in zip(has_calls, without, strict=True)]


def check_roles(messages: Sequence[Message], template: str) -> None:
    """Raise a RunError for an unknown role: most templates would write it without complaint, and it would carry no loss."""
    for number, message in enumerate(messages, 1):
        role = message["role"]
        if role not in _ROLES and f"'{role}'" not in template and f'"{role}"' not in template:
            raise RunError(
                f"message {number} has the role {role!r}, not in the template; expected one of {', '.join(sorted(_ROLES))}."
            )


def _encode_with_markers(messages: list[Message], turns: list[int], template: _Template) -> tuple[list[int], list[bool]]:
    """Method 1: the template's own generation markers."""
    tokenizer = template.tokenizer
    out = tokenizer.apply_chat_template(
        messages,
        tools=template.tools,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        chat_template=template.source,
    )
    ids, loss = list(out["input_ids"]), [bool(flag) for flag in out["assistant_masks"]]
    if ids[:2] == [tokenizer.bos_token_id] * 2:  # as ``tokenize`` does it
        ids, loss = ids[1:], loss[1:]

    # Markers in the wrong place.
    if not any(loss) and any(messages[turn] != {"role": "assistant", "content": ""} for turn in turns):
        raise RunError("the chat template has generation markers, but they mark no token of the assistant.")
    before = messages[: turns[0]] if turns else messages
    if any(loss) and before and (text_before := template.try_render(before)) is not None:
        num_before = len(tokenize(text_before, tokenizer, add_first=False))
        if loss.index(True) < num_before - 1:  # the last token may be a different one where text follows
            raise RunError(f"the template's generation markers mark token {loss.index(True)}, before the assistant's turns.")

    # The end-of-turn token carries loss even if it follows the marked part: otherwise no answer learns to stop.
    try:
        end = end_of_turn(messages[: turns[-1]], tokenizer, template.source) if turns else []
    except RunError:  # the template rewrites contents: there is nothing to go by but its markers
        end = []
    borders = [place for place in range(1, len(ids)) if loss[place - 1] and not loss[place]]
    for place in borders if end else []:
        if ids[place : place + len(end)] == end and ids[place - len(end) : place] != end:
            loss[place : place + len(end)] = [True] * len(end)
    return ids, loss


def _inside(spans: list[tuple[int, int]], token_spans: list[tuple[int, int]]) -> list[bool]:
    """For each token True if it has a character of one of the spans of the text, which are in order and disjoint.

    A token may begin before a span: the space that ends a generation prompt is often part of the answer's first token.
    """
    begins, ends = np.reshape(np.asarray(token_spans, np.int64), (-1, 2)).T
    span_begins, span_ends = np.reshape(np.asarray([span for span in spans if span[0] < span[1]], np.int64), (-1, 2)).T
    # More spans have begun before the token's end than have ended by its first character.
    begun = np.searchsorted(span_begins, np.maximum(ends, begins + 1), side="left")
    return (begun > np.searchsorted(span_ends, begins, side="right")).tolist()


def _assistant_spans(messages: list[Message], turns: list[int], text: str, template: _Template) -> list[tuple[int, int]]:
    """The turns of the assistant in the text, in order and disjoint, as [begin, end) in characters."""
    spans = []
    for turn in turns:
        before = template.try_render(messages[:turn], generation_prompt=True)
        through = template.try_render(messages[: turn + 1])
        if before is not None and through is not None and text.startswith(through) and through.startswith(before):
            length = _turn_length(through[len(before) :], template.tokenizer)  # method 2: prefixes
            spans.append((len(before), len(before) + length))
        else:
            spans.append(_span_by_placeholder(messages, turn, text, before, template))
    if any(begin < end for (_, end), (begin, _) in zip(spans, spans[1:], strict=False)):
        raise _not_found("the messages")
    return spans


def _span_by_placeholder(
    messages: list[Message], turn: int, text: str, before: str | None, template: _Template
) -> tuple[int, int]:
    """Method 3: a turn that the template writes differently once messages follow, or whose beginning it refuses alone."""
    error = _not_found(f"message {turn + 1} of {len(messages)}")
    marked = [*messages[:turn], {**messages[turn], "content": _PLACEHOLDER}, *messages[turn + 1 :]]
    full = template.try_render(marked) or ""
    # What ends a turn, from one that nothing follows: this turn, or where that is refused, the answer to any question.
    alone = template.try_render(marked[: turn + 1]) or template.try_render(_ANSWERED) or ""
    if _PLACEHOLDER in text or full.count(_PLACEHOLDER) != 1 or alone.count(_PLACEHOLDER) != 1:
        raise error

    # The full text is head, content, turn_end, rest.
    head, tail = full.split(_PLACEHOLDER)
    turn_end = alone.split(_PLACEHOLDER)[1]
    rest = tail.removeprefix(turn_end)
    begin = len(before) if before is not None and text.startswith(before) else len(head)
    end = len(text) - len(rest)
    pieces_match = tail.startswith(turn_end) and text.startswith(head) and text.endswith(rest) and begin <= end
    if not pieces_match or not text[:end].endswith(turn_end):
        raise error
    return begin, begin + _turn_length(text[begin:end], template.tokenizer)


def _not_found(place: str) -> RunError:
    return RunError(f"the chat template writes {place} differently once messages follow. {_MARKERS}.")


def _turn_length(turn: str, tokenizer: PreTrainedTokenizerBase) -> int:
    """Length of a turn's text up to its last token with loss: white space after an end-of-turn token has none."""
    special = {token.content for token in tokenizer.added_tokens_decoder.values()} | set(tokenizer.all_special_tokens)
    trimmed = turn.rstrip()
    return len(trimmed) if any(trimmed.endswith(token) for token in special if token) else len(turn)


def _roles(messages: Sequence[Message]) -> str:
    return ", ".join(str(message["role"]) for message in messages)
