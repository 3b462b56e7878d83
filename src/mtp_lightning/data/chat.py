# SPDX-License-Identifier: Apache-2.0
"""Chat: messages -> token ids and which of them the assistant wrote, through the base's chat template.

Three ways, the first that fits:

1. The template has ``{% generation %}`` markers: it says itself what the assistant wrote. Where they leave out the
   end-of-turn token behind it, that is added.
2. Prefixes: the text of the messages before an assistant turn, with the generation prompt, ends where the turn begins;
   the text up to and with the turn ends where it ends. Both must be prefixes of the whole text, which is checked.
3. Another content: templates that drop the thinking of earlier turns (Qwen3) write a turn differently once messages
   follow. The conversation is then rendered with a mark as that turn's content: what stands before the mark and after
   the turn must be the whole text's beginning and end, which is checked too. What fits none is refused, not mislabelled.

The text is always the template's own: an earlier turn whose thinking it drops is trained without it. The assistant's
end-of-turn token carries loss, the newline that some templates put after it does not.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mtp_lightning.errors import RunError, UsageError, one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]

_GENERATION = re.compile(r"\{%-?\s*generation\b")
_ROLES = {"system", "developer", "user", "assistant", "tool", "function", "ipython", "environment"}
_MARK = "turnmark0turnmark"  # letters only, so that no template trims, splits or escapes it
_MARKERS = "Give data.chat_template a template with {% generation %} .. {% endgeneration %} around what the assistant says"


def encode_messages(
    messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, chat_template: str | None = None
) -> tuple[list[int], list[bool]]:
    """Token ids of a conversation, and which of them the assistant wrote.

    Args:
        messages: ``{"role": ..., "content": ...}`` in order; roles as the template knows them.
        tokenizer: the base's tokenizer.
        chat_template: a template's text, or None for the base's own.

    Returns:
        Token ids, and for each whether it carries loss. Without an assistant turn none does.

    Raises:
        UsageError: there is no template.
        RunError: the messages have another form, the template refuses them, or the assistant's part cannot be found.
    """
    messages = clean_messages(messages)
    template = template_of(tokenizer, chat_template)
    check_roles(messages, template)
    if _GENERATION.search(template):
        ids, loss = _encode_marked(messages, tokenizer, template)
    else:
        text = render(messages, tokenizer, template)
        ids, offsets = _tokenize(text, tokenizer)
        spans = _assistant_spans(messages, text, tokenizer, template)
        loss = _inside([begin for begin, _ in offsets], spans)
    if all(loss) and any(message["role"] != "assistant" for message in messages):
        roles = ", ".join(str(message["role"]) for message in messages)
        raise RunError(
            f"every token carries loss, though not all messages are the assistant's (roles: {roles}): the chat template"
            f" marks all, or writes the assistant's turns alone. {_MARKERS} and nothing else."
        )
    return ids, loss


def encode_chat_prompt(
    messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, chat_template: str | None = None
) -> list[int]:
    """Token ids of a conversation that waits for the assistant, generation prompt included.

    Args:
        messages: ``{"role": ..., "content": ...}`` in order.
        tokenizer: the base's tokenizer.
        chat_template: a template's text, or None for the base's own.

    Returns:
        Token ids.
    """
    text = render(clean_messages(messages), tokenizer, template_of(tokenizer, chat_template), generation_prompt=True)
    # The template writes the special tokens that the base wants, the first one too: adding them again would double them.
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def end_of_turn(
    messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, chat_template: str | None = None
) -> list[int]:
    """Token ids that the template writes after an answer of the assistant, as far as they carry loss.

    Args:
        messages: the conversation before the answer.
        tokenizer: the base's tokenizer.
        chat_template: a template's text, or None for the base's own.

    Returns:
        Token ids, usually one.

    Raises:
        RunError: the template does not write the answer as it is.
    """
    answer = {"role": "assistant", "content": _MARK}
    text = render(clean_messages([*messages, answer]), tokenizer, template_of(tokenizer, chat_template))
    if text.count(_MARK) != 1:
        raise RunError("the chat template does not write the assistant's content once and as it is.")
    after = text[text.index(_MARK) + len(_MARK) :]
    return tokenizer(after[: _turn_end(after, tokenizer)], add_special_tokens=False, verbose=False)["input_ids"]


def clean_messages(messages: Sequence[Message]) -> list[Message]:
    """The messages without the empty fields that a table fills in, contents as text, checked for their form.

    Args:
        messages: what stands in a row.

    Returns:
        New dictionaries.

    Raises:
        RunError: it is not a list of ``{role, content}``; an assistant that calls a tool needs no content.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise RunError(f"messages must be a list of {{role, content}}, got {_short(messages)}.")
    cleaned = []
    for message in messages:
        fields = {key: value for key, value in message.items() if value is not None} if isinstance(message, dict) else {}
        calls = fields.get("role") == "assistant" and any(fields.get(name) for name in ("tool_calls", "function_call"))
        if "role" not in fields or not ("content" in fields or calls):
            raise RunError(f"each of messages must be {{role, content}}, got {_short(message)}.")
        for name, kinds in (("role", str), ("content", str | list)):
            if name in fields and not isinstance(fields[name], kinds):
                raise RunError(f"{name} of a message must be text, got {type(fields[name]).__name__}: {_short(message)}.")
        if isinstance(fields.get("content"), list):
            fields["content"] = _joined(fields["content"])
        cleaned.append(fields)
    return cleaned


def _joined(parts: list[Any]) -> str:
    """The text of a content in parts: many templates would write the list itself."""
    texts = []
    for part in parts:
        kind = part.get("type") or "text" if isinstance(part, dict) else "text"
        text = part.get("text") if isinstance(part, dict) else part
        if kind != "text" or not isinstance(text, str):
            raise RunError(f"content of a message must be text or parts of text, got a part {_short(part)}.")
        texts.append(text)
    if not texts:
        raise RunError("content of a message must be text or parts of text, got an empty list.")
    return "".join(texts)


def template_of(tokenizer: PreTrainedTokenizerBase, chat_template: str | None) -> str:
    """The template's text: the one given, or the base's own.

    Args:
        tokenizer: the base's tokenizer.
        chat_template: a template's text, or None.

    Returns:
        The text.

    Raises:
        UsageError: there is none.
    """
    if chat_template is not None:
        return chat_template
    try:
        return tokenizer.get_chat_template()
    except ValueError as error:
        raise UsageError(
            "rows with messages need a chat template, and the base's tokenizer has none."
            " Set data.chat_template to a jinja file, or give rows with prompt + completion."
        ) from error


def render(
    messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, template: str, generation_prompt: bool = False
) -> str:
    """The conversation as the base's text.

    Args:
        messages: ``{"role": ..., "content": ...}`` in order.
        tokenizer: the base's tokenizer.
        template: the template's text.
        generation_prompt: end with what stands before an assistant turn.

    Returns:
        The text, special tokens included.

    Raises:
        RunError: the template refuses the messages.
    """
    try:
        return tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=generation_prompt, chat_template=template
        )
    except Exception as error:  # templates raise whatever jinja and their own checks raise
        roles = ", ".join(str(message["role"]) for message in messages) or "none"
        raise RunError(f"the chat template refuses the messages (roles: {roles}): {one_line(error)}") from error


def check_roles(messages: Sequence[Message], template: str) -> None:
    """Refuse a role that nobody uses: most templates write whatever stands there.

    Args:
        messages: ``{"role": ..., "content": ...}`` in order.
        template: the template's text; a role that it names is fine.

    Raises:
        RunError: a role that neither is a usual one nor stands in the template.
    """
    for number, message in enumerate(messages, 1):
        role = message["role"]
        if role not in _ROLES and f"'{role}'" not in template and f'"{role}"' not in template:
            raise RunError(
                f"message {number} has the role {role!r}, which the chat template does not name; expected one of"
                f" {', '.join(sorted(_ROLES))}. Rename it: turns of 'assistant' carry loss."
            )


def _encode_marked(
    messages: list[Message], tokenizer: PreTrainedTokenizerBase, template: str
) -> tuple[list[int], list[bool]]:
    render(messages, tokenizer, template)  # for its error, if there is one
    out = tokenizer.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, chat_template=template
    )
    ids, loss = list(out["input_ids"]), [bool(flag) for flag in out["assistant_masks"]]
    turns = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    if not any(loss) and turns:
        raise RunError(
            "the chat template has generation markers, but they mark no token of the assistant. Correct the template."
        )
    before = messages[: turns[0]] if turns else messages
    if any(loss) and before:
        length = len(tokenizer(render(before, tokenizer, template), add_special_tokens=False, verbose=False)["input_ids"])
        if loss.index(True) < length - 1:  # the last token may be another one where text follows
            raise RunError(
                f"the generation markers of the chat template mark token {loss.index(True)}, which stands before the first"
                " turn of the assistant. Correct the template: they belong around what the assistant says."
            )
    if turns:
        _mark_ends(ids, loss, messages[: turns[-1]], tokenizer, template)
    return ids, loss


def _mark_ends(
    ids: list[int], loss: list[bool], before: list[Message], tokenizer: PreTrainedTokenizerBase, template: str
) -> None:
    """Let the end of a turn carry loss where it stands right behind what is marked: else no answer learns to stop."""
    try:
        end = end_of_turn(before, tokenizer, template)
    except RunError:  # the template does not write every content as it is: what it marks is all that is known
        return
    borders = [place for place in range(1, len(ids)) if loss[place - 1] and not loss[place]]
    for place in borders:
        if end and ids[place : place + len(end)] == end and ids[place - len(end) : place] != end:
            loss[place : place + len(end)] = [True] * len(end)


def _assistant_spans(
    messages: list[Message], text: str, tokenizer: PreTrainedTokenizerBase, template: str
) -> list[tuple[int, int]]:
    """Where in the text the assistant's turns stand, [begin, end) in characters."""
    spans = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = render(messages[:index], tokenizer, template, generation_prompt=True)
        through = render(messages[: index + 1], tokenizer, template)
        if text.startswith(through) and through.startswith(before):
            turn = through[len(before) :]
            spans.append((len(before), len(before) + _turn_end(turn, tokenizer)))
        else:
            spans.append(_marked_span(messages, index, text, before, tokenizer, template))
    for (_, end), (begin, _) in zip(spans, spans[1:], strict=False):
        if begin < end:
            raise _not_found(messages, None)
    return spans


def _marked_span(
    messages: list[Message], index: int, text: str, before: str, tokenizer: PreTrainedTokenizerBase, template: str
) -> tuple[int, int]:
    """Where a turn stands that the template writes differently once messages follow."""
    marked = [*messages[:index], {**messages[index], "content": _MARK}, *messages[index + 1 :]]
    whole = render(marked, tokenizer, template)
    alone = render(marked[: index + 1], tokenizer, template)
    if _MARK in text or whole.count(_MARK) != 1 or alone.count(_MARK) != 1:
        raise _not_found(messages, index)
    head, tail = whole.split(_MARK)
    turn_end = alone.split(_MARK)[1]
    rest = tail.removeprefix(turn_end)
    begin = len(before) if text.startswith(before) else len(head)
    end = len(text) - len(rest)
    proved = tail.startswith(turn_end) and text.startswith(head) and text.endswith(rest) and begin <= end
    if not (proved and text[:end].endswith(turn_end)):
        raise _not_found(messages, index)
    return begin, begin + _turn_end(text[begin:end], tokenizer)


def _not_found(messages: list[Message], index: int | None) -> RunError:
    place = "the messages" if index is None else f"message {index + 1} of {len(messages)}"
    return RunError(
        f"the chat template writes {place} in a way that changes when messages follow, so what the assistant wrote cannot be"
        f" found. {_MARKERS}, or make a row of each assistant turn."
    )


def _turn_end(turn: str, tokenizer: PreTrainedTokenizerBase) -> int:
    """Where in the text of a turn its last token with loss ends: white space after an end-of-turn token has none."""
    special = {token.content for token in tokenizer.added_tokens_decoder.values()} | set(tokenizer.all_special_tokens)
    trimmed = turn.rstrip()
    return len(trimmed) if any(trimmed.endswith(token) for token in special if token) else len(turn)


def _inside(places: list[int], spans: list[tuple[int, int]]) -> list[bool]:
    """Which places, in order, lie in one of the spans, in order and apart."""
    borders = [border for span in spans for border in span]
    inside, crossed = [], 0
    for place in places:
        while crossed < len(borders) and place >= borders[crossed]:
            crossed += 1
        inside.append(crossed % 2 == 1)
    return inside


def _tokenize(text: str, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[tuple[int, int]]]:
    if not tokenizer.is_fast:
        raise RunError(
            "finding what the assistant wrote needs a fast tokenizer (with offsets), the base has a slow one."
            " Give rows with prompt + completion or input_ids + labels."
        )
    out = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return out["input_ids"], out["offset_mapping"]


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
