# SPDX-License-Identifier: Apache-2.0
"""Prompts: a file or standard input -> token ids to decode from.

* ``.txt``: one prompt a line; empty lines are left out.
* ``.jsonl``: one object a line with ``prompt`` (text, or a list of messages) or ``messages`` (rendered with the
  tokenizer's chat template; an assistant's answer at the end is left out), and optionally ``domain``.
* ``-``: standard input, one of the two: JSON where the first line begins with ``{``.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mtp_lightning.data.chat import check_roles, clean_messages, render, template_of
from mtp_lightning.errors import RunError, UsageError, one_line, os_reason
from mtp_lightning.json_text import read_json
from mtp_lightning.paths import resolve


class Prompt(NamedTuple):
    """What a text is generated from.

    Attributes:
        text: the prompt as text, a chat rendered.
        input_ids: its token ids, at least one.
        domain: its domain, or an empty string.
    """

    text: str
    input_ids: list[int]
    domain: str


class PromptRow(NamedTuple):
    """A prompt as it stands in its file.

    Attributes:
        location: file and line, for messages.
        content: text, or a list of messages.
        domain: its domain, or an empty string.
        row_id: the row's ``id``, or the number of its line.
    """

    location: str
    content: str | list[Any]
    domain: str
    row_id: str | int


def read_prompts(source: str, tokenizer: Any, limit: int | None = None, context: int | None = None) -> list[Prompt]:
    """The prompts of a source, tokenised as the tokenizer does it, less an end token that it may append.

    Args:
        source: a ``.txt`` or ``.jsonl`` file, ``package://...`` for one shipped with this package, or ``-``.
        tokenizer: the base's tokenizer.
        limit: at most so many prompts, evenly from the domains. None: all, in the order of the file.
        context: the model's context, which must leave room for a token after each. None: not looked at.

    Returns:
        At least one prompt.

    Raises:
        UsageError: a file of another kind, or a limit below 1.
        RunError: the file is missing or empty, a line can't be used or is too long, or there are messages and no chat
            template.
    """
    if limit is not None and limit < 1:
        raise UsageError(f"num_prompts must be 1 or more, got {limit}. Change num_prompts.")
    rows = read_prompt_rows(source)
    chosen = range(len(rows)) if limit is None else round_robin([row.domain for row in rows])[:limit]
    prompts = [encode_prompt_row(rows[i], tokenizer) for i in chosen]
    for i, prompt in zip(chosen, prompts, strict=True):
        if context is not None and len(prompt.input_ids) >= context:
            raise RunError(
                f"{rows[i].location}: the prompt has {len(prompt.input_ids)} tokens and the model's context is {context}:"
                f" shorten it to {context - 1} or less, or delete the line."
            )
    return prompts


def read_prompt_rows(source: str) -> list[PromptRow]:
    """The prompts of a source, before any tokenizer is needed.

    Args:
        source: a ``.txt`` or ``.jsonl`` file, ``package://...`` for one shipped with this package, or ``-``.

    Returns:
        At least one row, in the order of the file.

    Raises:
        RunError: the file is empty, or a line can't be used.
    """
    name, lines, as_json = _lines(source)
    rows = [_row(name, number, line, as_json) for number, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise RunError(f"{name}: expected at least one prompt, it is empty.")
    return rows


def round_robin(domains: Sequence[str]) -> list[int]:
    """Indices in an order that takes one of each domain in turn, domains in the order of their first appearance.

    ``[a, a, a, b, b] -> [0, 3, 1, 4, 2]``

    Args:
        domains: domain of each item.

    Returns:
        A permutation of the indices.
    """
    members: dict[str, list[int]] = {}
    for index, domain in enumerate(domains):
        members.setdefault(domain, []).append(index)
    longest = max(map(len, members.values()), default=0)
    return [indices[turn] for turn in range(longest) for indices in members.values() if turn < len(indices)]


def _lines(source: str) -> tuple[str, list[str], bool]:
    """Name for messages, lines, and whether they are JSON."""
    if source == "-":
        if sys.stdin is None or sys.stdin.closed:
            raise RunError("standard input: expected prompts, it is closed. Pipe them in, or give --prompts a file.")
        try:
            text = sys.stdin.read()
        except (OSError, UnicodeDecodeError) as error:
            raise RunError(f"standard input: expected UTF-8 text, it can't be read: {one_line(error)}.") from error
        # Not splitlines(): it also splits at characters that stand inside JSON strings.
        return "standard input", text.split("\n"), text.lstrip().startswith("{")
    path = Path(resolve(source))
    if path.is_dir():
        raise RunError(f"{source}: expected a .txt or .jsonl file of prompts, it is a folder. Name a file in it.")
    if path.suffix not in (".txt", ".jsonl"):
        raise UsageError(
            f"{source}: expected prompts in a .txt or .jsonl file, or - for standard input. Convert or rename it."
        )
    if not path.is_file():
        raise RunError(f"{source}: expected a file of prompts, nothing is there (looked in {Path.cwd()}). Check the path.")
    try:
        content = path.read_bytes()
        text = content.decode("utf-8-sig")
    except OSError as error:
        raise RunError(f"{source}: it can't be read: {os_reason(error)}. Change its permissions.") from error
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise RunError(f"{source}, line {line}: expected UTF-8 text, {one_line(error)}. Save it as UTF-8.") from error
    return source, text.split("\n"), path.suffix == ".jsonl"


def _row(source: str, number: int, line: str, as_json: bool) -> PromptRow:
    place = f"{source}, line {number}"
    if not as_json:
        return PromptRow(place, line.rstrip("\r"), "", number)
    value = read_json(line, source, number)
    if not isinstance(value, dict):
        raise RunError(f"{place}: expected an object with prompt or messages, got {type(value).__name__}.")
    content = value.get("messages") if value.get("messages") is not None else value.get("prompt")
    if content is None:
        got = ", ".join(f"{name} (null)" if value[name] is None else name for name in value) or "none"
        raise RunError(f"{place}: expected prompt or messages, got the fields: {got}. Rename or add a field.")
    if not isinstance(content, str | list) or (isinstance(content, str) and value.get("messages") is not None):
        raise RunError(f"{place}: expected prompt as text or messages as a list, got {type(content).__name__}.")
    domain = value.get("domain")
    if domain is not None and not isinstance(domain, str):
        raise RunError(f"{place}: expected domain as text, got {type(domain).__name__}.")
    name = value.get("id", number)
    if not isinstance(name, str | int):
        raise RunError(f"{place}: expected id as text or a number, got {type(name).__name__}.")
    if isinstance(name, str) and not _is_text(name):  # written down, two of them would be the same
        raise RunError(f"{place}: expected id as UTF-8 text, got half a character or other bytes. Correct or delete it.")
    return PromptRow(place, content, domain or "", name)


def _is_text(text: str) -> bool:
    """Whether it can be written: JSON's escapes, and what a terminal or pipe hands on undecoded, may be half a character."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _check_tokenizer(tokenizer: Any) -> None:
    if tokenizer is None:
        raise UsageError("a prompt needs a tokenizer, and the model was saved without one. Save it with its tokenizer.")


def encode_prompt(text: str, tokenizer: Any) -> list[int]:
    """Token ids of a prompt, with what the tokenizer puts before a text and without an end token that it puts after it.

    Args:
        text: the prompt.
        tokenizer: the base's tokenizer.

    Returns:
        Token ids.

    Raises:
        UsageError: there is no tokenizer, or the prompt is no text.
    """
    _check_tokenizer(tokenizer)
    if not _is_text(text):
        raise UsageError("the prompt must be UTF-8 text, got half a character or other bytes. Change the prompt.")
    ids = list(tokenizer(text)["input_ids"])
    plain = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    appended = len(ids) > 1 and ids[-1] == tokenizer.eos_token_id and (not plain or plain[-1] != ids[-1])
    return ids[:-1] if appended else ids


def encode_prompt_row(row: PromptRow, tokenizer: Any) -> Prompt:
    """A row as text and token ids.

    Args:
        row: the row.
        tokenizer: the base's tokenizer.

    Returns:
        The prompt.

    Raises:
        UsageError: there is no tokenizer.
        RunError: it is no text or has no token, or there are messages and no chat template.
    """
    _check_tokenizer(tokenizer)
    text = row.content if isinstance(row.content, str) else _render(row, tokenizer)
    if not _is_text(text):
        raise RunError(f"{row.location}: expected UTF-8 text, got half a character or other bytes. Correct or delete it.")
    if isinstance(row.content, str):
        ids = encode_prompt(text, tokenizer)
    else:
        # The template writes the special tokens that the base wants: adding them again would double the first.
        ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    if not ids:
        raise RunError(f"{row.location}: expected at least one token, the prompt has none. Delete the line or add text.")
    return Prompt(text, ids, row.domain)


def drop_final_answer(content: str | list[Any]) -> list[Any]:
    """The messages of a prompt without an answer of the assistant at their end.

    Args:
        content: messages.

    Returns:
        Messages that wait for the assistant.
    """
    messages = list(content)
    answered = messages and isinstance(messages[-1], dict) and messages[-1].get("role") == "assistant"
    return messages[:-1] if answered else messages


def render_messages(messages: list[Any], tokenizer: Any) -> Prompt:
    """A conversation as a prompt, by the tokenizer's chat template; an assistant's answer at the end is left out.

    Args:
        messages: objects with ``role`` and ``content``.
        tokenizer: the base's tokenizer.

    Returns:
        The prompt.

    Raises:
        RunError: there is no chat template, or it does not take these messages.
    """
    return encode_prompt_row(PromptRow("messages", messages, "", 0), tokenizer)


def _render(row: PromptRow, tokenizer: Any) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise RunError(
            f"{row.location}: there are messages, and the base's tokenizer has no chat template."
            " Give prompts of text alone (a prompt field; in a configuration trainer.callbacks.prompts names the file),"
            " or take a base model made for chat."
        )
    messages = drop_final_answer(row.content)
    if not messages:
        raise RunError(f"{row.location}: expected messages of which one is to be answered, got none.")
    try:
        messages, template = clean_messages(messages), template_of(tokenizer, None)
        check_roles(messages, template)
        for number, message in enumerate(messages, 1):
            if message["role"] == "user" and not message["content"].strip():
                raise RunError(f"message {number} is the user's and empty. Add text, or delete the line.")
        return render(messages, tokenizer, template, generation_prompt=True)
    except RunError as error:
        raise RunError(f"{row.location}: {error}") from error
