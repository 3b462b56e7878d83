# SPDX-License-Identifier: Apache-2.0
"""Messages: the conversation that a row holds, in any of its usual forms -> clean messages and tools. Knows no template.

| fields | form |
|---|---|
| ``messages`` | a list of {role, content}, or the same as JSON text |
| ``conversations``, ``conversation`` | ShareGPT's list of {from, value}, or {role, content} |
| ``QUESTIONS``: ``instruction`` (+ ``input``, ``history``) and ``output``, .. | question and answer |
| ``prompt``, ``completion``, both lists of messages | TRL's form; only the completion is trained |

Each with ``tools`` (a list of functions, or the same as JSON text) and, except ``messages``, with ``system``, both optional.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from mtp_lightning.errors import RunError, one_line

Message = dict[str, Any]

QUESTIONS = (
    ("instruction", "output"),
    ("instruction", "response"),
    ("question", "answer"),
    ("prompt", "response"),
    ("prompt", "answer"),
)
"""The fields of a question and of its answer: Alpaca's, GPTeacher's, GSM8K's. A prompt needs the question alone."""

_SPEAKERS = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "observation": "tool"}
"""ShareGPT's names of the roles that have another one here."""

_TRAINED = ("weight", "train", "loss")
"""Fields of a message that say whether it is trained: OpenAI's weight, Axolotl's train, ms-swift's loss."""

CALLS = ("tool_calls", "function_call")
"""Fields of a message in which the assistant calls tools: a list of calls; a single one, as OpenAI had it at first."""

_SWITCHES = {"0": 0, "0.0": 0, "false": 0, "1": 1, "1.0": 1, "true": 1}  # as text, from tables of text

_TEXT_PARTS = ("text", "input_text", "output_text")


class NullContent(RunError):
    """The content of a message is null: there is no text to train on or to answer."""


class Chat(NamedTuple):
    """A conversation as it is in a row; see ``clean_messages`` and ``trained_messages``."""

    messages: Any  # a list of messages, not checked yet
    tools: list[dict[str, Any]] | None = None  # functions that the assistant may call


def chat_of(row: Mapping[str, Any]) -> Chat | None:
    """The conversation in the fields of a row, or None if it holds none; a RunError if it or its tools can't be read."""
    get = row.get
    shared = next((get(name) for name in ("messages", "conversations", "conversation") if get(name) is not None), None)
    prompt, completion = get("prompt"), get("completion")
    if shared is not None:
        messages = _from_json(shared)
    elif isinstance(prompt, list) and isinstance(completion, list):
        messages = [*({**message, "weight": 0} if isinstance(message, dict) else message for message in prompt), *completion]
    elif names := next((pair for pair in QUESTIONS if all(get(name) is not None for name in pair)), None):
        messages = _of_question(row, *names)
    else:
        return None
    if isinstance(get("system"), str) and row["system"] and get("messages") is None and isinstance(messages, list):
        messages = [{"role": "system", "content": row["system"]}, *messages]
    return Chat(messages, clean_tools(get("tools")))


def with_parsed_chats(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """The row with a ``prompt`` that is JSON text of messages as these messages, then its ``completion`` too.

    Text of any other kind stays: it is what the model reads.
    """
    parsed: dict[str, Any] = {}
    for name in ("prompt", "completion"):
        value = _from_json(row[name]) if isinstance(row.get(name), str) else None
        if not isinstance(value, list) or not value or not all(map(_is_message, value)):
            break
        parsed[name] = value
    return {**row, **parsed} if parsed else row


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and any(
        isinstance(value.get(role), str) and content in value for role, content in (("role", "content"), ("from", "value"))
    )


def question_of(row: Mapping[str, Any]) -> str | None:
    """The question in the fields of a row, with its ``input``; None if it has none. A RunError if it is not text.

    The input may be in the first of ``instances``, as self-instruct has it.
    """
    name = next((name for name, _ in QUESTIONS if row.get(name) is not None), None)
    if name is None:
        return None
    parts = [_text_of(row, name)]
    if name == "instruction":
        parts.append(_text_of(row, "input") or _text_of(first_instance(row), "input"))
    return "\n\n".join(filter(None, parts))


def first_instance(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """The first of a row's ``instances``, empty if it has none."""
    instances = row.get("instances")
    first = instances[0] if isinstance(instances, list) and instances else None
    return first if isinstance(first, dict) else {}


def _text_of(row: Mapping[str, Any], name: str) -> str:
    value = row.get(name) or ""
    if not isinstance(value, str):
        raise RunError(f"{name} must be text, got {one_line(repr(value), 80)}.")
    return value


def _of_question(row: Mapping[str, Any], question: str, answer: str) -> list[Message]:
    """Question and answer, after the ``history`` of earlier ones."""
    asked = question_of({question: row[question], "input": row.get("input")})
    history = row.get("history") or []
    if not isinstance(history, list) or not all(isinstance(turn, list | tuple) and len(turn) == 2 for turn in history):
        raise RunError(f"history must be a list of questions with answers, got {one_line(repr(history), 80)}.")
    turns = [*history, [asked, _text_of(row, answer)]]
    return [
        {"role": role, "content": text} for turn in turns for role, text in zip(("user", "assistant"), turn, strict=True)
    ]


def clean_tools(tools: Any) -> list[dict[str, Any]] | None:
    """A row's tools as a list of functions, None if there are none; JSON text is parsed, also in the list."""
    return _objects(tools, "tools")


def _objects(value: Any, name: str) -> list[dict[str, Any]] | None:
    """A list of objects, or one of them alone, or JSON text of either; None if there are none."""
    if isinstance(value, str):
        value = None if value.strip() in ("", "null") else _from_json(value)
    if isinstance(value, dict) and value:
        value = [value]
    if not value:
        return None
    objects = [_from_json(item) for item in value] if isinstance(value, list) else []
    if not objects or not all(isinstance(item, dict) for item in objects):
        raise RunError(f"{name} must be a list of functions, or JSON text of one, got {one_line(repr(value), 80)}.")
    return objects


def clean_messages(messages: Any) -> list[Message]:
    """The messages as {role, content, ..}, contents as text; a RunError if they are malformed.

    ``NullContent``, which is a RunError too, if the content of one is null.

    Fields that are null or empty lists are left out, tool calls are lists of objects, also where they came as JSON text.

    {from, value} is accepted too. An assistant message that calls a tool needs no content.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise RunError(f"messages must be a list of {{role, content}}, got {one_line(repr(messages), 80)}.")
    return [_clean_message(message) for message in messages]


def _clean_message(message: Any) -> Message:
    fields = {key: value for key, value in message.items() if value is not None} if isinstance(message, dict) else {}
    if "role" not in fields and isinstance(fields.get("from"), str):
        speaker = fields.pop("from")
        said = {"content": fields.pop("value")} if "value" in fields else {}
        fields = {"role": _SPEAKERS.get(speaker, speaker)} | said | fields
    for name in CALLS:
        if name in fields:
            calls = _objects(fields.pop(name), f"{name} of a message")
            fields |= {name: calls if name == "tool_calls" or len(calls) > 1 else calls[0]} if calls else {}
    # A template may ask whether a field is there at all.
    fields = {key: value for key, value in fields.items() if key == "content" or value or not isinstance(value, list | dict)}
    role, content = fields.get("role"), fields.get("content")
    calls_tool = role == "assistant" and (fields.get("tool_calls") or fields.get("function_call"))
    has_content = isinstance(content, str | list) or (content is None and calls_tool)
    if isinstance(role, str) and content is None and not calls_tool and _is_null(message, fields):
        raise NullContent(f"the content of a message is null: {one_line(repr(message), 80)}.")
    if not isinstance(role, str) or not has_content:
        raise RunError(f"each of messages must be {{role, content}} with text in both, got {one_line(repr(message), 80)}.")
    parts = _from_json(content)
    if isinstance(content, list) or _is_parts(parts):
        fields["content"] = _joined(parts)
    return {key: value for key, value in fields.items() if key not in _TRAINED}


def _is_null(message: Mapping[str, Any], fields: Mapping[str, Any]) -> bool:
    """True if the content is null, or missing with all else: Parquet drops what is null in an object."""
    if "value" in fields:  # text under the name that goes with ``from``
        return False
    return "content" in message or "value" in message or not fields.keys() - {"role", *_TRAINED}


def without_null_answer(messages: Any) -> Any:
    """The messages without an answer at their end that has neither text nor calls."""
    last = messages[-1] if isinstance(messages, list) and len(messages) > 1 else None
    if not isinstance(last, dict) or any(last.get(name) for name in ("content", "value", *CALLS)):
        return messages
    speaker = last.get("role", last.get("from"))
    return messages[:-1] if speaker == "assistant" or _SPEAKERS.get(str(speaker)) == "assistant" else messages


def trained_messages(messages: Sequence[Message]) -> list[bool]:
    """For each message False if it says that it is not trained: ``weight: 0``, ``train: false``, ``loss: false``.

    A RunError for a weight between: a message carries loss or not.
    """
    trained = []
    for message in messages:
        marks = {name: message[name] for name in _TRAINED if message.get(name) is not None}
        for name, value in marks.items():
            marks[name] = _SWITCHES.get(value.strip().lower()) if isinstance(value, str) else value
            if not isinstance(marks[name], bool | int | float) or marks[name] not in (0, 1):
                raise RunError(f"{name} of a message must be 0 or 1, got {one_line(repr(value), 80)}.")
        trained.append(all(marks.values()))
    return trained


def _is_parts(value: Any) -> bool:
    """True for a list of parts with types, texts among them: what JSON text must hold to be read as a content in parts."""
    if not isinstance(value, list) or not all(
        isinstance(part, dict) and isinstance(part.get("type"), str) for part in value
    ):
        return False
    return any(part["type"] in _TEXT_PARTS and isinstance(part.get("text"), str) for part in value)


def _joined(parts: list[Any]) -> str:
    """The text of a content in parts: many templates would write the list itself."""
    texts = []
    for part in parts or [parts]:
        text = part
        if isinstance(part, dict):
            text = part.get("text") if (part.get("type") or "text") in _TEXT_PARTS else None
        if not isinstance(text, str):
            raise RunError(f"content of a message must be text or parts of text, got {one_line(repr(part), 80)}.")
        texts.append(text)
    return "".join(texts)


def _from_json(value: Any) -> Any:
    """The value of JSON text that holds a list or an object; anything else as it is."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value
