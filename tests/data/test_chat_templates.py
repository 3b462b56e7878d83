# SPDX-License-Identifier: Apache-2.0
"""What carries loss under four chat templates, against texts written by hand: between ``[[`` and ``]]``.

The templates are our own, of the structure of those that Qwen 3, Mistral, Gemma and plain ChatML models ship.
"""

from __future__ import annotations

import pytest
from toy_tokenizers import CHATML, byte_tokenizer
from transformers import PreTrainedTokenizerFast

from mtp_lightning.data.chat import encode_chat_prompt, end_of_turn, render_chat_prompt
from mtp_lightning.data.encoding import encode_row
from mtp_lightning.data.preparing import prepare
from mtp_lightning.errors import RunError

# Thinking is written for turns after the last question only; the last turn always gets a block; tools answer as users.
QWEN = """\
{%- if tools %}{{ '<|im_start|>system\\nTools: ' ~ tools ~ '<|im_end|>\\n' }}{% endif %}
{%- set ns = namespace(query=-1) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.query = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
{%- if m.role == 'assistant' %}
{%- set content = m.content or '' %}{% set thinking = '' %}
{%- if '</think>' in content %}
{%- set thinking = content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
{%- set content = content.split('</think>')[-1].lstrip('\\n') %}{% endif %}
{{- '<|im_start|>assistant\\n' }}
{%- if loop.index0 > ns.query and (loop.last or thinking) %}{{ '<think>\\n' ~ thinking ~ '\\n</think>\\n\\n' }}{% endif %}
{{- content }}
{%- for call in m.tool_calls or [] %}
{{- ('\\n' if content or not loop.first else '') ~ '<tool_call>' ~ call.name ~ '</tool_call>' }}{% endfor %}
{{- '<|im_end|>\\n' }}
{%- elif m.role == 'tool' %}
{{- '<|im_start|>user\\n<tool_response>' ~ m.content ~ '</tool_response><|im_end|>\\n' }}
{%- else %}{{ '<|im_start|>' ~ m.role ~ '\\n' ~ m.content ~ '<|im_end|>\\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""


# No generation prompt; the system message goes into the first question.
MISTRAL = """\
{{- '<s>' }}
{%- set ns = namespace(system='') %}
{%- for m in messages %}
{%- if m.role == 'system' %}{% set ns.system = m.content ~ '\\n\\n' %}
{%- elif m.role == 'user' %}{{ '[INST] ' ~ ns.system ~ m.content ~ '[/INST]' }}{% set ns.system = '' %}
{%- elif m.role == 'tool' %}{{ '[TOOL_RESULTS] ' ~ m.content ~ '[/TOOL_RESULTS]' }}
{%- elif m.role == 'assistant' %}{{ ' ' ~ m.content ~ '</s>' }}
{%- else %}{{ raise_exception('Only system, user, tool and assistant roles are supported!') }}{% endif %}
{%- endfor %}"""

# The assistant is called model, and a system message goes before the first question.
GEMMA = """\
{{- '<bos>' }}
{%- if messages[0].role == 'system' %}{% set first = messages[0].content ~ '\\n\\n' %}{% set rest = messages[1:] %}
{%- else %}{% set first = '' %}{% set rest = messages %}{% endif %}
{%- for m in rest %}
{%- if m.role == 'tool' %}{{ raise_exception('Tools are not supported!') }}{% endif %}
{{- '<start_of_turn>' ~ ('model' if m.role == 'assistant' else m.role) ~ '\\n' ~ (first if loop.first else '') }}
{{- (m.content | trim) ~ '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"""

FAMILIES = {
    "qwen": (QWEN, ["<|im_start|>", "<|im_end|>", "<think>", "</think>", "<tool_call>", "</tool_call>"], "<|im_end|>"),
    "mistral": (MISTRAL, ["<s>", "</s>", "[INST]", "[/INST]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"], "</s>"),
    "gemma": (GEMMA, ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"], "<eos>"),
    "chatml": (CHATML, ["<|im_start|>", "<|im_end|>"], "<|im_end|>"),
}


def tokenizer_of(family: str) -> PreTrainedTokenizerFast:
    template, special, eos = FAMILIES[family]
    tokenizer = byte_tokenizer(special, eos)
    tokenizer.chat_template = template
    return tokenizer


def shown(tokenizer: PreTrainedTokenizerFast, ids: list[int], loss: list[bool]) -> str:
    """The text, with [[ and ]] around what carries loss."""
    out, inside = "", False
    for token, flag in zip(ids, loss, strict=True):
        out += "" if flag == inside else "[[" if flag else "]]"
        out, inside = out + tokenizer.decode([token]), flag
    return out + ("]]" if inside else "")


def encoded(family: str, messages: list[dict]) -> str:
    tokenizer = tokenizer_of(family)
    row = encode_row({"messages": messages}, tokenizer)
    assert row.input_ids == tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]
    return shown(tokenizer, row.input_ids, row.loss)


def says(role: str, content: object = None, **more: object) -> dict:
    return {"role": role, "content": content} | more


ONE = [says("user", "hi ab"), says("assistant", "ab.\nyes")]
TWO = [*ONE, says("user", "more"), says("assistant", "no")]
SYSTEM = [says("system", "be"), *ONE]
TOOL = [says("user", "sum"), says("assistant", "look"), says("tool", "4"), says("assistant", "four")]

EXPECTED = {
    ("qwen", "two"): "<|im_start|>user\nhi ab<|im_end|>\n<|im_start|>assistant\n[[ab.\nyes<|im_end|>]]\n"
    "<|im_start|>user\nmore<|im_end|>\n<|im_start|>assistant\n[[<think>\n\n</think>\n\nno<|im_end|>]]\n",
    ("qwen", "tool"): "<|im_start|>user\nsum<|im_end|>\n<|im_start|>assistant\n[[look<|im_end|>]]\n"
    "<|im_start|>user\n<tool_response>4</tool_response><|im_end|>\n"
    "<|im_start|>assistant\n[[<think>\n\n</think>\n\nfour<|im_end|>]]\n",
    ("mistral", "system"): "<s>[INST] be\n\nhi ab[/INST][[ ab.\nyes</s>]]",
    ("mistral", "tool"): "<s>[INST] sum[/INST][[ look</s>]][TOOL_RESULTS] 4[/TOOL_RESULTS][[ four</s>]]",
    ("gemma", "system"): "<bos><start_of_turn>user\nbe\n\nhi ab<end_of_turn>\n"
    "<start_of_turn>model\n[[ab.\nyes<end_of_turn>]]\n",
    ("chatml", "two"): "<|im_start|>user\nhi ab<|im_end|>\n<|im_start|>assistant\n[[ab.\nyes<|im_end|>]]\n"
    "<|im_start|>user\nmore<|im_end|>\n<|im_start|>assistant\n[[no<|im_end|>]]\n",
}
CONVERSATIONS = {"two": TWO, "system": SYSTEM, "tool": TOOL}


@pytest.mark.parametrize(("family", "conversation"), EXPECTED)
def test_what_carries_loss(family: str, conversation: str) -> None:
    assert encoded(family, CONVERSATIONS[conversation]) == EXPECTED[family, conversation]


# thinking, as Qwen 3 has it

THOUGHT = "<think>\nwhy\n</think>\n\nab"


def test_earlier_thinking_is_dropped_as_the_template_drops_it() -> None:
    messages = [says("user", "q"), says("assistant", THOUGHT), says("user", "r"), says("assistant", THOUGHT)]
    assert encoded("qwen", messages) == (
        "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n[[ab<|im_end|>]]\n"
        "<|im_start|>user\nr<|im_end|>\n<|im_start|>assistant\n[[<think>\nwhy\n</think>\n\nab<|im_end|>]]\n"
    )


def test_tool_calls_carry_loss() -> None:
    call = [{"name": "add"}]
    messages = [says("user", "q"), says("assistant", None, tool_calls=call), says("tool", "4"), says("assistant", "four")]
    assert encoded("qwen", messages) == (
        "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n[[<tool_call>add</tool_call><|im_end|>]]\n"
        "<|im_start|>user\n<tool_response>4</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n[[<think>\n\n</think>\n\nfour<|im_end|>]]\n"
    )


def test_a_content_in_parts_is_their_text(write) -> None:
    """Also as a table gives it: with the fields of every other part in each."""
    parts = [{"type": "text", "text": "hi "}, {"type": "text", "text": "ab", "image": None}]
    row = {"messages": [says("user", parts), says("assistant", [{"type": "text", "text": ONE[1]["content"]}])]}
    expected = encode_row({"messages": ONE}, tokenizer_of("qwen"))
    assert encode_row(row, tokenizer_of("qwen")) == expected
    assert encode_row({"messages": [says("user", ["hi ", "ab"]), ONE[1]]}, tokenizer_of("qwen")) == expected
    rows = prepare(write("a.jsonl", [row]), tokenizer_of("qwen"), max_length=64)[0].rows
    assert rows.row(0).input_ids.tolist() == expected.input_ids


def test_equal_answers_are_distinguished() -> None:
    messages = [says(role, "ab") for _ in range(3) for role in ("user", "assistant")]
    assert encoded("qwen", messages).count("<|im_start|>assistant\n[[ab<|im_end|>]]\n<|im_start|>user\nab<|im_end|>") == 2


def test_an_empty_answer_carries_loss_on_its_end() -> None:
    assert encoded("chatml", [says("user", ""), says("assistant", "")]) == (
        "<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n[[<|im_end|>]]\n"
    )
    assert "assistant\n[[<|im_end|>]]\n<|im_start|>user" in encoded("qwen", [says("user", ""), says("assistant", ""), *ONE])


def test_a_token_that_the_generation_prompt_begins_carries_loss() -> None:
    """The same tokens carry loss as those of prompt and completion."""
    tokenizer = byte_tokenizer(["<|im_end|>"], "<|im_end|>")
    template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}assistant: a{% endif %}"  # ``ab`` is one token
    ).replace("{{ m.content }}", "{{ 'a' if m.role == 'assistant' }}{{ m.content }}")
    chat = [says("user", "x"), says("assistant", "by"), says("user", "x"), says("assistant", "b")]
    row = encode_row({"messages": chat}, tokenizer, template)
    assert shown(tokenizer, row.input_ids, row.loss) == (
        "user: x<|im_end|>assistant: [[aby<|im_end|>]]user: x<|im_end|>assistant: [[ab<|im_end|>]]"
    )
    assert encode_row({"prompt": chat[:3], "completion": "b"}, tokenizer, template).loss[-2:] == [True, True]


# refusals

ALL_MARKED = f"{{% generation %}}{CHATML}{{% endgeneration %}}"


@pytest.mark.parametrize(
    ("template", "named"),
    [
        # A turn is written twice; earlier answers are shortened.
        (
            "{{ messages[1].content if messages[3] }}"
            "{% for m in messages %}{{ m.role }} {{ m.content }}<|im_end|>{% endfor %}",
            "message 2 of 4",
        ),
        (
            "{% for m in messages %}<|im_start|>{{ m.role }} {{ m.content[: 9 if loop.last else 1] }}<|im_end|>{% endfor %}",
            "message 2 of 4",
        ),
        (ALL_MARKED, "token 0"),
        ("<|im_start|>" + ALL_MARKED, "token 1"),
        (CHATML + "{% generation %}{% endgeneration %}", "generation markers"),
        (
            "{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content }}<|im_end|>{% endif %}{% endfor %}",
            "roles are user",
        ),
        (GEMMA.replace("'tool'", "'user'"), "roles: user, assistant, user, assistant.*: Tools are not"),
    ],
)
def test_refused_templates(template: str, named: str) -> None:
    with pytest.raises(RunError, match=named):
        encode_row({"messages": TWO}, tokenizer_of("chatml"), template)


def test_a_role_that_the_template_names_is_accepted() -> None:
    template = CHATML.replace("{{ m.role }}", "{{ 'context' if m.role == 'context' else m.role }}")
    row = encode_row({"messages": [says("context", "x"), *ONE]}, tokenizer_of("chatml"), template)
    assert sum(row.loss) == len("ab.\nyes") - 1 + 1  # ab is one token; the end-of-turn token counts


# prompts and ends


@pytest.mark.parametrize("family", FAMILIES)
def test_prompt_answer_and_end_of_turn_make_the_row(family: str) -> None:
    """What ``mtp distill`` puts together: prompt, the answer's text, the end of the turn."""
    tokenizer = tokenizer_of(family)
    answer = {"qwen": "<think>\n\n</think>\n\nab.\nyes", "mistral": " ab.\nyes"}.get(family, "ab.\nyes")
    ids = encode_chat_prompt(ONE[:1], tokenizer) + tokenizer(answer, add_special_tokens=False)["input_ids"]
    row = encode_row({"messages": ONE}, tokenizer)
    last = len(row.loss) - row.loss[::-1].index(True)
    assert ids + end_of_turn(ONE[:1], tokenizer) == row.input_ids[:last]


def test_a_template_of_its_own_for_tools() -> None:
    tokenizer = byte_tokenizer(["<eos>", "<|im_start|>", "<|im_end|>"], "<|im_end|>")
    tokenizer.chat_template = {"default": CHATML, "tool_use": "{{ tools | tojson }}" + CHATML}
    messages, tools = [{"role": "user", "content": "a"}], [{"type": "function", "function": {"name": "f"}}]
    for given in (None, tools, []):
        expected = tokenizer.apply_chat_template(messages, tools=given or None, tokenize=False, add_generation_prompt=True)
        assert render_chat_prompt(messages, tokenizer, tools=given) == expected
    assert '"f"' in render_chat_prompt(messages, tokenizer, tools=tools)
