# SPDX-License-Identifier: Apache-2.0
"""Conversations in the forms that files have: the same row whatever the form; tools, untrained messages, refused rows."""

from __future__ import annotations

import json

import pytest
from toy_tokenizers import CHATML, byte_tokenizer, word_tokenizer

from mtp_lightning.data.encoding import encode_row
from mtp_lightning.data.messages import NullContent, clean_messages
from mtp_lightning.data.preparing import prepare
from mtp_lightning.errors import RunError


def says(role: str, content: object, **more: object) -> dict:
    return {"role": role, "content": content} | more


def tokens(row: dict, template: str | None = None) -> list[int]:
    """Token ids; those without loss are negative."""
    encoded = encode_row(row, word_tokenizer(), template)
    assert encoded is not None
    return [int(token if loss else -token) for token, loss in zip(encoded.input_ids, encoded.loss, strict=True)]


CHAT = [says("system", "six"), says("user", "one\n\ntwo"), says("assistant", "three")]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": json.dumps(CHAT)},
        {"conversations": CHAT},
        {"conversation": [{"from": "human", "value": "one\n\ntwo"}, {"from": "gpt", "value": "three"}], "system": "six"},
        {"messages": [{"from": "system", "value": "six"}, *CHAT[1:]], "prompt": "one"},
        {"instruction": "one", "input": "two", "output": "three", "system": "six", "history": []},
        {"instruction": "one", "input": "two", "response": "three", "system": "six"},
        {"question": "one\n\ntwo", "answer": "three", "system": "six"},
        {"prompt": "one\n\ntwo", "response": "three", "system": "six"},
        {"prompt": CHAT[:2], "completion": CHAT[2:]},
        {"prompt": json.dumps(CHAT[:2]), "completion": json.dumps(CHAT[2:])},
        {"messages": [CHAT[0], says("user", '[{"type": "text", "text": "one\\n\\ntwo"}]'), CHAT[2]]},
        {"messages": [says("system", [{"type": "text", "text": "six", "image": None}]), *CHAT[1:]]},
    ],
)
def test_forms(row: dict) -> None:
    assert tokens(row) == tokens({"messages": CHAT}) and sum(token > 0 for token in tokens(row)) == 2


def test_alpaca_with_history() -> None:
    row = {"instruction": "two", "input": "", "output": "three", "history": [["one", "six"]]}
    chat = [says("user", "one"), says("assistant", "six"), says("user", "two"), says("assistant", "three")]
    assert tokens(row) == tokens({"messages": chat})


TURNS = [says("user", "one"), says("assistant", "two"), says("user", "one"), says("assistant", "three")]


@pytest.mark.parametrize("mark", [{"weight": 0}, {"train": False}, {"loss": False}])
@pytest.mark.parametrize(
    "template",
    [
        CHATML,
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
        "<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    ],
)
def test_untrained_messages(mark: dict, template: str) -> None:
    found = tokens({"messages": [TURNS[0], TURNS[1] | mark, *TURNS[2:]]}, template)
    assert [token for token in found if token > 0] == [11, 4]
    assert list(map(abs, found)) == list(map(abs, tokens({"messages": TURNS}, template)))
    assert [token for token in tokens({"messages": [*TURNS[:3], TURNS[3] | {"weight": 1}]}) if token > 0] == [10, 4, 11, 4]


def test_only_the_completion_of_a_conversational_prompt_is_trained() -> None:
    found = tokens({"prompt": TURNS[:3], "completion": TURNS[3:]})
    assert [token for token in found if token > 0] == [11, 4]


TOOLS = "{% for t in tools or [] %}{{ t.name }}\n{% endfor %}" + CHATML


@pytest.mark.parametrize("tools", [[{"name": "six"}], '[{"name": "six"}]', {"name": "six"}, ['{"name": "six"}']])
def test_tools_reach_the_template(tools: object) -> None:
    row = {"messages": TURNS[:2], "tools": tools}
    assert tokens(row, TOOLS)[:2] == [-14, -5] and tokens(row, TOOLS)[2:] == tokens({"messages": TURNS[:2]})
    prompt = {"prompt": TURNS[:1], "completion": "two", "tools": tools}
    assert tokens(prompt, TOOLS) == tokens(row, TOOLS)[:-1]


def test_tools_without_a_place_in_the_template() -> None:
    with pytest.warns(UserWarning, match="tools"):
        assert tokens({"messages": TURNS[:2], "tools": [{"name": "six"}]}) == tokens({"messages": TURNS[:2]})


def test_arguments_as_json_text_are_not_quoted_again() -> None:
    template = CHATML.replace(
        "{{ m.content }}", "{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.arguments | tojson }}{% endfor %}"
    )

    def row(arguments: object) -> dict:
        return {"messages": [TURNS[0], says("assistant", "two ", tool_calls=[{"arguments": arguments}])]}

    assert tokens(row('{"x": 1}'), template) == tokens(row({"x": 1}), template)


# who speaks first

REFUSES_NONE = "{{ '' if messages[0].role }}" + CHATML + "{{ '' if messages else raise_exception('no message') }}"
ALTERNATES = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}" + CHATML
)
ASKS = (
    "{% if messages | selectattr('role', 'eq', 'user') | list | length == 0 %}"
    "{{ raise_exception('no question') }}{% endif %}"
)


MARKED = (  # and the end of the turn behind the marks, which carries loss too
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %}<|im_end|>{{ '\n' }}{% endfor %}"
)


@pytest.mark.parametrize("template", [CHATML, REFUSES_NONE, ASKS + CHATML, ASKS + MARKED])
def test_the_assistant_may_speak_first(template: str) -> None:
    row = {"messages": [TURNS[1], TURNS[0], TURNS[3]]}
    assert [token for token in tokens(row, template) if token > 0] == [10, 4, 11, 4]


def test_refused_rows_are_counted_and_shown(write) -> None:
    rows = [{"messages": TURNS[1:]}] * 5 + [{"messages": TURNS}]
    prepared, _ = prepare(write("a.jsonl", rows), word_tokenizer(), max_length=64, chat_template=ALTERNATES)
    assert prepared.report.skipped == {"refused by the chat template": 5} and prepared.report.rows == 1
    assert len(prepared.report.examples) == 3
    for line, example in enumerate(prepared.report.examples, 1):
        assert f"a.jsonl, line {line}: " in example and "roles must alternate" in example
    with pytest.raises(RunError, match="line 1: .*roles must alternate"):
        prepare(write("b.jsonl", rows[:5]), word_tokenizer(), max_length=64, chat_template=ALTERNATES)
    with pytest.raises(RunError, match="jinja"):
        prepare(write("c.jsonl", rows), word_tokenizer(), max_length=64, chat_template="{% for")


# tool calls

CALLS = CHATML.replace(
    "{{ m.content }}", "{{ m.content or '' }}{% if 'tool_calls' in m %}six {{ m.tool_calls[0].name }}{% endif %}"
)


@pytest.mark.parametrize("calls", ['[{"name": "two"}]', {"name": "two"}, '{"name": "two"}', ['{"name": "two"}']])
def test_tool_calls_in_any_form(calls: object) -> None:
    row = {"messages": [TURNS[0], {"role": "assistant", "tool_calls": calls}]}
    assert [token for token in tokens(row, CALLS) if token > 0] == [14, 10, 4]


@pytest.mark.parametrize("calls", [[], "[]", "null", None])
def test_empty_lists_of_calls_are_none(calls: object) -> None:
    row = {"messages": [message | {"tool_calls": calls, "annotations": []} for message in TURNS]}
    template = CALLS + "{% for m in messages %}{% if 'annotations' in m %}six{% endif %}{% endfor %}"
    assert tokens(row, template) == tokens({"messages": TURNS})


@pytest.mark.parametrize("calls", ["two", ["two"], 2])
def test_what_is_no_call_is_refused(calls: object) -> None:
    with pytest.raises(RunError, match="tool_calls"):
        tokens({"messages": [TURNS[0], says("assistant", "two", tool_calls=calls)]}, CALLS)


@pytest.mark.parametrize("template", [CHATML, MARKED])
@pytest.mark.parametrize("call", [{"tool_calls": [{"name": "two"}]}, {"function_call": {"name": "two"}}])
@pytest.mark.parametrize("content", [{"content": ""}, {"content": None}, {}, {"role": None, "from": "gpt"}])
def test_calls_that_the_template_does_not_write(template: str, call: dict, content: dict) -> None:
    """An answer of nothing else is not trained: it would teach to say nothing."""
    calling = {"role": "assistant", **content, **call}
    with pytest.warns(UserWarning, match="tool calls"):
        found = tokens({"messages": [TURNS[0], calling, *TURNS[2:]]}, template)
    assert [token for token in found if token > 0] == [11, 4]
    with pytest.warns(UserWarning, match="tool calls"):
        assert max(tokens({"messages": [TURNS[0], calling]}, template)) < 0
        assert tokens({"messages": [TURNS[0], TURNS[1] | call]}, template) == tokens({"messages": TURNS[:2]}, template)


def test_values_as_text() -> None:
    row = {"messages": [TURNS[0], TURNS[1] | {"weight": "0"}, TURNS[2], TURNS[3] | {"train": "true"}], "tools": "null"}
    assert [token for token in tokens(row) if token > 0] == [11, 4]


def test_a_prompt_of_messages_as_json_text() -> None:
    as_list = {"prompt": CHAT[:2], "completion": "three"}
    assert tokens(as_list | {"prompt": json.dumps(CHAT[:2])}) == tokens(as_list)


@pytest.mark.parametrize(
    "text", ["[1, 2]", '[{"type": "dog"}]', '[{"role": "user"}]', '["text"]', "[]", "[one]", "[" * 3000, '{"role": "user"}']
)
def test_other_json_text_is_text(text: str) -> None:
    tokenizer = byte_tokenizer(["<|im_end|>"], "<|im_end|>")
    for row in ({"prompt": text, "completion": text}, {"messages": [says("user", text), says("assistant", text)]}):
        encoded = encode_row(row, tokenizer, CHATML)
        assert tokenizer.decode(encoded.input_ids).count(text) == 2


def test_text_under_another_name_is_no_null_content() -> None:
    for name in ("value", "text", "contents"):
        with pytest.raises(RunError) as raised:
            clean_messages([{"role": "user", name: "one"}])
        assert not isinstance(raised.value, NullContent)
