# SPDX-License-Identifier: Apache-2.0
"""Chat: messages -> token ids and which of them the assistant wrote, through the base's chat template.

Two ways, the first that fits:

1. The template has ``{% generation %}`` markers: it says itself what the assistant wrote.
2. Prefixes: the text of the messages before an assistant turn, with the generation prompt, ends where the turn begins;
   the text up to and with the turn ends where it ends. Both must be prefixes of the whole text, which is checked:
   templates that drop the thinking of earlier turns are not like that, and are refused instead of mislabelled.

The assistant's end-of-turn token carries loss, the newline that some templates put after it does not.
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
    if _GENERATION.search(template):
        return _encode_marked(messages, tokenizer, template)
    text = render(messages, tokenizer, template)
    ids, offsets = _tokenize(text, tokenizer)
    spans = _assistant_spans(messages, text, tokenizer, template)
    return ids, [any(start <= begin < end for start, end in spans) for begin, _ in offsets]


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


def clean_messages(messages: Sequence[Message]) -> list[Message]:
    """The messages without the empty fields that a table fills in, checked for their form.

    Args:
        messages: what stands in a row.

    Returns:
        New dictionaries.

    Raises:
        RunError: it is not a list of ``{role, content}``.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise RunError(f"messages must be a list of {{role, content}}, got {_short(messages)}.")
    cleaned = []
    for message in messages:
        fields = {key: value for key, value in message.items() if value is not None} if isinstance(message, dict) else {}
        if "role" not in fields or len(fields) < 2:
            raise RunError(f"each of messages must be {{role, content}}, got {_short(message)}.")
        cleaned.append(fields)
    return cleaned


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


def _encode_marked(
    messages: list[Message], tokenizer: PreTrainedTokenizerBase, template: str
) -> tuple[list[int], list[bool]]:
    render(messages, tokenizer, template)  # for its error, if there is one
    out = tokenizer.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, chat_template=template
    )
    loss = [bool(flag) for flag in out["assistant_masks"]]
    if not any(loss) and any(message["role"] == "assistant" for message in messages):
        raise RunError(
            "the chat template has generation markers, but they mark no token of the assistant. Correct the template."
        )
    return list(out["input_ids"]), loss


def _assistant_spans(
    messages: list[Message], text: str, tokenizer: PreTrainedTokenizerBase, template: str
) -> list[tuple[int, int]]:
    """Where in the text the assistant's turns stand, [begin, end) in characters."""
    special = {token.content for token in tokenizer.added_tokens_decoder.values()} | set(tokenizer.all_special_tokens)
    spans = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = render(messages[:index], tokenizer, template, generation_prompt=True)
        through = render(messages[: index + 1], tokenizer, template)
        if not (text.startswith(through) and through.startswith(before)):
            raise RunError(
                f"the text of the chat template up to message {index + 1} changes when messages follow (it may drop"
                f" earlier thinking), so what the assistant wrote cannot be found. {_MARKERS}, or make a row of each"
                " assistant turn."
            )
        trimmed = through.rstrip()
        ends_in_special = any(trimmed.endswith(token) for token in special if token)
        spans.append((len(before), len(trimmed) if ends_in_special else len(through)))
    return spans


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
