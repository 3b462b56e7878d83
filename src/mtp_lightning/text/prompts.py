# SPDX-License-Identifier: Apache-2.0
"""Prompts: a file or standard input -> token ids to decode from.

* ``.txt``: one prompt per line; empty lines are skipped.
* ``.jsonl``, ``.json``, ``.parquet``, ``.csv``: rows with ``prompt`` (text, or a list of messages), ``instruction`` (+
  ``input``, or self-instruct's ``instances``, of which the first one's ``input`` is read), ``question``, ``messages`` or
  ``conversations`` (rendered with the tokenizer's chat template; an assistant's answer at the end is dropped) or ``turns``
  (MT-bench's list of texts, of which the first is read), and optionally ``system``, ``tools``, ``raw`` and ``domain`` (or
  ``category``); in JSON also a text alone.
* ``-``: standard input, one of the two: JSON where the first line begins with ``{``.

Where the base has a chat template, a text is a user's turn, unless it is raw.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mtp_lightning.data.chat import render_chat_prompt
from mtp_lightning.data.formats import CsvFile, File, JsonFile
from mtp_lightning.data.messages import (
    Chat,
    NullContent,
    chat_of,
    clean_messages,
    clean_tools,
    first_instance,
    question_of,
    with_parsed_chats,
    without_null_answer,
)
from mtp_lightning.data.tables import ParquetFile
from mtp_lightning.data.tokenizing import is_utf8, tokenize
from mtp_lightning.errors import RunError, UsageError, one_line, os_reason
from mtp_lightning.json_text import read_json
from mtp_lightning.paths import resolve
from mtp_lightning.text.prompt_source import check_source

_FIELDS = ("prompt", "instruction", "question", "messages", "conversations", "conversation", "turns")
"""The fields of a line that hold its prompt."""
_MORE = {"id", "domain", "category", "tools", "system", "history", "raw"}
"""Other fields that are read."""
_SHOWN = 4  # of the fields that are not used


class UnusablePrompt(RunError):
    """A row whose prompt is null, empty or not UTF-8: there is nothing to answer."""


class Prompt(NamedTuple):
    """What a text is generated from."""

    text: str  # the prompt as text, a chat rendered
    input_ids: list[int]  # its token ids, at least one
    domain: str  # its domain, or an empty string
    question: str | None = None  # of a chat its last message; None for a text that is continued

    @property
    def shown(self) -> str:
        """What a terminal shows in front of the generated text: the text, or the question on a line of its own."""
        return self.text if self.question is None else f"> {self.question}\n"


class PromptRow(NamedTuple):
    """A prompt as it is in its file."""

    location: str  # file and line, for messages
    content: str | list[Any]  # text, or a list of messages without an answer at their end
    domain: str  # its domain, or an empty string
    row_id: str | int  # the row's ``id``, or its line number
    tools: list[dict[str, Any]] | None = None  # functions that the assistant may call
    raw: bool = False  # a text that the base continues as it is, without its chat template
    read: tuple[str, ...] = ()  # the fields that hold the prompt; none in a file of text
    unused: tuple[str, ...] = ()  # other fields with a value that nothing reads


def read_prompts(
    source: str, tokenizer: Any, limit: int | None = None, context: int | None = None, raw: bool = False
) -> list[Prompt]:
    """The prompts of a source, at least one, tokenised as the tokenizer does it, without an end token that it may append.

    The source is a file (``prompt_source.SUFFIXES``), ``package://...`` or ``-``. At most ``limit`` prompts are taken,
    evenly from the domains; None: all, in order of the file. With a ``context``, each must leave space in it for a token.
    ``raw``: no text is a user's turn.
    UsageError for another file format, RunError if the file is missing or empty or a line can't be used.
    """
    if limit is not None and limit < 1:
        raise UsageError(f"num_prompts must be 1 or more, got {limit}.")
    rows = read_prompt_rows(source, raw)
    if limit is not None:
        rows = [rows[i] for i in round_robin([row.domain for row in rows])[:limit]]
    prompts = [encode_prompt_row(row, tokenizer) for row in rows]
    for row, prompt in zip(rows, prompts, strict=True):
        if context is not None and len(prompt.input_ids) >= context:
            raise RunError(f"{row.location}: the prompt has {len(prompt.input_ids)} tokens, the context is {context}.")
    return prompts


def read_prompt_rows(source: str, raw: bool = False) -> list[PromptRow]:
    """The prompts of a source in the order of the file, at least one, before any tokenizer is needed; ``raw``: all are.

    Raises a UsageError for an unsupported file format, and a RunError if the file is missing or empty or a line can't be
    used.
    """
    suffix = check_source(source)
    if suffix in (".json", ".ndjson", ".csv", ".parquet"):
        name, part = source, _file(Path(resolve(source)), suffix)
        rows = [_parse_fields(row.fields, f"{source}, {part.unit} {row.place}", row.place) for row in part.rows()]
    else:
        name, text, is_json = _read_text(source)
        # Not splitlines(): it also splits at characters that may occur inside JSON strings.
        lines = enumerate(text.split("\n"), 1)
        rows = [_parse_line(name, number, line, is_json) for number, line in lines if line.strip()]
    if not rows:
        raise RunError(f"{name}: expected at least one prompt, it is empty.")
    return [row._replace(raw=raw or row.raw) for row in rows]


def _file(path: Path, suffix: str) -> File:
    """The reader of a file that is not read line by line."""
    if suffix == ".csv":
        return CsvFile(path)
    if suffix == ".parquet":
        return ParquetFile(path, ("id", "category", "raw", "turns", "instances"))
    return JsonFile(path, text_field="prompt")


def round_robin(domains: Sequence[str]) -> list[int]:
    """Indices in an order that takes one of each domain in turn, domains in the order of their first appearance.

    ``[a, a, a, b, b] -> [0, 3, 1, 4, 2]``
    """
    turns = itertools.zip_longest(*by_domain(domains).values())
    return [index for turn in turns for index in turn if index is not None]


def by_domain(domains: Sequence[str]) -> dict[str, list[int]]:
    """Domain -> indices of its members, domains in the order of their first appearance."""
    members: dict[str, list[int]] = {}
    for index, domain in enumerate(domains):
        members.setdefault(domain, []).append(index)
    return members


def _read_text(source: str) -> tuple[str, str, bool]:
    """Name for messages, text, and True if its lines are JSON."""
    if source == "-":
        if sys.stdin is None or sys.stdin.closed:
            raise RunError("standard input: expected prompts, it is closed.")
        try:
            text = sys.stdin.read()
        except (OSError, UnicodeDecodeError) as error:
            raise RunError(f"standard input: expected UTF-8 text, it can't be read: {one_line(error)}.") from error
        return "standard input", text, text.lstrip().startswith("{")
    path = Path(resolve(source))
    try:
        content = path.read_bytes()
        return source, content.decode("utf-8-sig"), path.suffix.lower() == ".jsonl"
    except OSError as error:
        raise RunError(f"{source}: it can't be read: {os_reason(error)}.") from error
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise RunError(f"{source}, line {line}: expected UTF-8 text, {one_line(error)}.") from error


def _parse_line(source: str, number: int, line: str, is_json: bool) -> PromptRow:
    location = f"{source}, line {number}"
    if not is_json:
        return PromptRow(location, line.rstrip("\r"), "", number)
    value = read_json(line, source, number)
    return _parse_fields({"prompt": value} if isinstance(value, str) else value, location, number)


def _parse_fields(value: Any, location: str, number: int) -> PromptRow:
    if not isinstance(value, dict):
        raise RunError(f"{location}: expected an object with prompt or messages, got {type(value).__name__}.")
    content, tools = _content(value, location)
    domain = value.get("domain")
    if domain is None and isinstance(value.get("category"), str):  # as benchmarks of chat models name it
        domain = value["category"]
    if not isinstance(domain, str | None):
        raise RunError(f"{location}: expected domain as text, got {type(domain).__name__}.")
    raw = value.get("raw") or False
    if not isinstance(raw, bool) or (raw and not isinstance(content, str)):
        raise RunError(f"{location}: expected raw as true or false, true with a prompt of text alone, got {raw!r}.")
    row_id = number if value.get("id") is None else value["id"]
    if isinstance(row_id, float) and row_id.is_integer():  # pandas writes whole numbers like this next to missing ones
        row_id = int(row_id)
    if not isinstance(row_id, str | int) or not is_utf8(str(row_id)):
        raise RunError(f"{location}: expected id as UTF-8 text or a number, got {row_id!r}.")
    read = _fields_read(value)
    unused = (name for name in value if value[name] is not None and name not in _MORE and name not in read)
    return PromptRow(location, content, domain or "", row_id, tools, raw, read, tuple(unused))


def fields_line(rows: Sequence[PromptRow]) -> str:
    """Which fields the prompts of a file were read from, and which ones are not used; empty for a file of text."""
    read = list(dict.fromkeys(name for row in rows for name in row.read))
    unused = [name for name in dict.fromkeys(name for row in rows for name in row.unused) if name not in read]
    shown = ", ".join(unused[:_SHOWN]) + (f" and {len(unused) - _SHOWN} more" if len(unused) > _SHOWN else "")
    line = f"prompts from {', '.join(map(repr, read))}" + (f"; not used: {one_line(shown, 120)}" if unused else "")
    return line if read else ""


def _fields_read(value: dict[str, Any]) -> tuple[str, ...]:
    """The fields of a line that ``_content`` reads its prompt from."""
    if name := _field_of_turns(value):
        return (name,)
    given = {name for name in _FIELDS if value.get(name) is not None}
    if "prompt" in given and (isinstance(value["prompt"], list) or "messages" not in given):
        return ("prompt",)
    name = next((name for name in ("messages", "conversations", "conversation", *_FIELDS) if name in given), None)
    if name != "instruction":
        return (name,) if name else ()
    inputs = ("input",) if value.get("input") else ("instances",) if first_instance(value).get("input") else ()
    return (name, *inputs)


def _content(value: dict[str, Any], location: str) -> tuple[str | list[Any], list[dict[str, Any]] | None]:
    """The text, or the messages without an answer at their end, and the tools of a line; empty if it asks nothing."""
    value = dict(with_parsed_chats(value))
    if name := _field_of_turns(value):
        return value[name][0], None  # later turns would follow answers that are not there yet
    try:
        chat = _chat(value)
        if isinstance(chat, str):
            return chat, None
        if chat is not None:
            messages = drop_final_answer(clean_messages(without_null_answer(chat.messages)) if chat.messages != [] else [])
            is_asked = any(message["role"] not in ("assistant", "system") for message in messages)
            return messages if is_asked else [], chat.tools
    except NullContent:
        return "", None
    except RunError as error:
        raise RunError(f"{location}: {error}") from error
    if any(name in value for name in _FIELDS) and all(value.get(name) is None for name in _FIELDS):
        return "", None
    if (name := next((name for name in _FIELDS if value.get(name) is not None), None)) is not None:
        kind = "a list of texts" if name == "turns" else "text"
        raise RunError(f"{location}: expected {name} as {kind}, got {type(value[name]).__name__}.")
    fields = ", ".join(f"{name} (null)" if value[name] is None else name for name in value) or "none"
    raise RunError(f"{location}: expected one of {', '.join(_FIELDS)}, got the fields: {fields}.")


def _field_of_turns(value: dict[str, Any]) -> str | None:
    """The field of a line that is a list of texts, or None."""
    lists = {name: value[name] for name in ("prompt", "turns") if isinstance(value.get(name), list) and value[name]}
    return next((name for name, turns in lists.items() if all(isinstance(turn, str) for turn in turns)), None)


def _chat(value: dict[str, Any]) -> str | Chat | None:
    """The text or the conversation in the fields of a line, None if it has neither; a RunError if they can't be read.

    A question with a system message, earlier turns or tools is a conversation, as in a row with its answer.
    """
    prompt = value.get("prompt")
    if isinstance(prompt, list):
        return chat_of({**value, "messages": None, "conversations": prompt})
    if isinstance(prompt, str) and value.get("messages") is None:
        question: str | None = prompt
    elif any(value.get(name) is not None for name in ("prompt", "messages", "conversations", "conversation")):
        return chat_of(value)
    else:
        question = question_of(value)
    more = {"system": value.get("system"), "history": value.get("history"), "tools": clean_tools(value.get("tools"))}
    if question is None or not any(more.values()):
        return question
    return chat_of({"instruction": question, "output": "", **more})


def encode_prompt(text: str, tokenizer: Any, raw: bool = False) -> Prompt:
    """A text as a prompt: a user's turn where the base has a chat template, unless it is ``raw``.

    Raises a UsageError if there is no tokenizer, or the prompt is empty or not valid UTF-8.
    """
    try:
        return encode_prompt_row(PromptRow("the prompt", text, "", 0, raw=raw), tokenizer)
    except UnusablePrompt as error:
        raise UsageError(str(error)) from error


def as_turn(row: PromptRow, tokenizer: Any) -> PromptRow:
    """A row of text as a user's turn where the base has a chat template, unless it is raw; any other row as it is."""
    if tokenizer is None:
        raise UsageError("a prompt needs a tokenizer, and the model was saved without one.")
    if row.raw or not row.content or not isinstance(row.content, str) or not has_chat_template(tokenizer):
        return row
    return row._replace(content=[{"role": "user", "content": row.content}])


def has_chat_template(tokenizer: Any) -> bool:
    """True if the base has a chat template."""
    return bool(getattr(tokenizer, "chat_template", None))


def encode_prompt_row(row: PromptRow, tokenizer: Any) -> Prompt:
    """A row as text and token ids: those of a text with what the tokenizer puts before one, without an end that it appends.

    UnusablePrompt if it has no token or is not valid UTF-8, another RunError if its messages can't be rendered.
    """
    row = as_turn(row, tokenizer)
    if not row.content:
        raise UnusablePrompt(f"{row.location}: expected a prompt, it is null, empty or without a user's turn.")
    text = row.content if isinstance(row.content, str) else _render(row, tokenizer)
    if not is_utf8(text):
        raise UnusablePrompt(f"{row.location}: expected UTF-8 text, the prompt contains an unpaired surrogate.")
    # A template writes the special tokens that the base expects.
    ids = tokenize(text, tokenizer, add_first=isinstance(row.content, str))
    if not ids:
        raise UnusablePrompt(f"{row.location}: expected at least one token, the prompt has none.")
    question = None if isinstance(row.content, str) else str(clean_messages(row.content)[-1].get("content") or "")
    return Prompt(text, ids, row.domain, question)


def drop_final_answer(messages: list[Any]) -> list[Any]:
    """The messages without an assistant answer at their end."""
    is_answered = messages and isinstance(messages[-1], dict) and messages[-1].get("role") == "assistant"
    return messages[:-1] if is_answered else messages


def render_messages(messages: list[Any], tokenizer: Any) -> Prompt:
    """A conversation as a prompt, by the tokenizer's chat template; an assistant's answer at the end is dropped."""
    return encode_prompt_row(PromptRow("messages", drop_final_answer(messages), "", 0), tokenizer)


def _render(row: PromptRow, tokenizer: Any) -> str:
    if not has_chat_template(tokenizer):
        raise RunError(f"{row.location}: the base's tokenizer has no chat template for messages: give text.")
    try:
        for number, message in enumerate(clean_messages(row.content), 1):
            if message["role"] == "user" and not message["content"].strip():
                raise UnusablePrompt(f"message {number} is the user's and empty.")
        return render_chat_prompt(clean_messages(row.content), tokenizer, tools=row.tools)
    except RunError as error:
        raise type(error)(f"{row.location}: {error}") from error
