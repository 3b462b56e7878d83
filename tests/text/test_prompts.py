# SPDX-License-Identifier: Apache-2.0
"""Reading prompts: every form, the order, the special tokens, and a message for everything that can be wrong."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import processors
from toy_tokenizers import word_tokenizer
from transformers import PreTrainedTokenizerFast

from mtp_lightning.errors import MTPError, RunError, UsageError
from mtp_lightning.text.prompts import (
    Prompt,
    PromptRow,
    UnusablePrompt,
    encode_prompt,
    encode_prompt_row,
    fields_line,
    read_prompt_rows,
    read_prompts,
)

BOS, EOS, START, END, NEWLINE, ONE, TWO = 1, 2, 3, 4, 5, 9, 10
USER, ASSISTANT = 7, 8


def appending_tokenizer() -> PreTrainedTokenizerFast:
    """Appends an end token, as T5's and some of Llama's do; without a chat template."""
    tokenizer = word_tokenizer(bos=False)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", EOS)]
    )
    tokenizer.chat_template = None
    return tokenizer


def chat(*contents: str | None) -> list[dict[str, str | None]]:
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


def test_text_file_has_one_prompt_a_line(write) -> None:
    source = write("prompts.txt", "one two\r\n\n  \ntwo\n")
    prompts = read_prompts(source, word_tokenizer(), raw=True)
    assert prompts == [Prompt("one two", [BOS, ONE, TWO], ""), Prompt("two", [BOS, TWO], "")]


def test_jsonl_with_prompts_and_messages(write) -> None:
    rows = [{"prompt": "one", "domain": "code", "raw": True}, {"messages": chat("two"), "more": 3}, {"prompt": chat("two")}]
    source = write("p.jsonl", [*rows, {"prompt": "two"}])
    rendered = "<|im_start|>user\ntwo<|im_end|>\n<|im_start|>assistant\n"
    ids = [START, USER, NEWLINE, TWO, END, NEWLINE, START, ASSISTANT, NEWLINE]  # and no second <bos>
    text, *chats = read_prompts(source, word_tokenizer())
    assert text == Prompt("one", [BOS, ONE], "code") and chats == [Prompt(rendered, ids, "", "two")] * 3
    assert (text.shown, chats[0].shown) == ("one", "> two\n")
    assert read_prompts(source, word_tokenizer(), raw=True)[-1] == Prompt("two", [BOS, TWO], "")
    assert read_prompts(write("q.txt", "two"), appending_tokenizer()) == [Prompt("two", [TWO], "")]  # has no template


def test_an_answer_at_the_end_is_dropped(write) -> None:
    null = {"conversations": [{"from": "human", "value": "one"}, {"from": "gpt", "value": None}]}
    rows = [{"messages": chat("one", "two")}, {"messages": chat("one", None)}, null, {"messages": chat("one")}]
    *answered, unanswered = read_prompts(write("p.jsonl", rows), word_tokenizer())
    assert answered == [unanswered] * 3


def test_a_question_with_a_system_message_earlier_turns_or_tools_is_a_conversation(write) -> None:
    """As in training rows of the same fields, whose system message was left out here, or which were refused."""
    system, asked, tools = {"role": "system", "content": "two"}, chat("one"), [{"name": "f"}]
    rows = [
        {"prompt": asked, "system": "two"},
        {"prompt": json.dumps(asked), "system": "two"},
        {"prompt": "one", "system": "two", "response": "x"},
        {"question": "one", "system": "two"},
        {"instruction": "one", "system": "", "history": [], "tools": "[]"},
        {"instruction": "one", "history": [["x", "y"]]},
        {"prompt": "one", "tools": tools},
    ]
    read = [(row.content, row.tools) for row in read_prompt_rows(write("p.jsonl", rows))]
    with_system = ([system, *asked], None)
    assert read == [*[with_system] * 4, ("one", None), (chat("x", "y", "one"), None), (asked, tools)]


def test_texts_alone(write) -> None:
    for name, content in (("p.json", '["one", "two"]'), ("p.jsonl", '"one"\n"two"\n')):
        assert [row.content for row in read_prompt_rows(write(name, content))] == ["one", "two"]


def test_a_suffix_in_capitals(write) -> None:
    assert [row.content for row in read_prompt_rows(write("P.JSONL", '{"prompt": "one"}'))] == ["one"]


def test_line_separators_inside_json_strings_do_not_split(write) -> None:
    text = "one\u2028two\x85"
    assert [p.text for p in read_prompts(write("p.jsonl", f'{{"prompt": "{text}"}}'), word_tokenizer(), raw=True)] == [text]


def test_an_appended_end_token_is_stripped_and_one_in_the_text_is_not(write) -> None:
    source = write("p.txt", "one two\none <eos>\n")
    tokenizer = appending_tokenizer()
    assert tokenizer("one two")["input_ids"] == [ONE, TWO, EOS]
    assert [p.input_ids for p in read_prompts(source, tokenizer)] == [[ONE, TWO], [ONE, EOS]]
    assert [p.input_ids for p in read_prompts(source, word_tokenizer(bos=False), raw=True)] == [[ONE, TWO], [ONE, EOS]]


@pytest.mark.parametrize("text, ids", [("one\ntwo\n", [[BOS, ONE], [BOS, TWO]]), ('\n{"prompt": "one"}\n', [[BOS, ONE]])])
def test_standard_input(text: str, ids: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    assert [p.input_ids for p in read_prompts("-", word_tokenizer(), raw=True)] == ids


def test_a_limit_takes_evenly_from_the_domains(write) -> None:
    domains = "aaaabbc"
    source = write("p.jsonl", [{"prompt": "one " * (i + 1), "domain": domain} for i, domain in enumerate(domains)])

    def taken(limit: int | None) -> list[int]:
        return [len(p.input_ids) - 2 for p in read_prompts(source, word_tokenizer(), limit, raw=True)]

    assert taken(None) == list(range(7))
    assert taken(5) == [0, 4, 6, 1, 5]
    assert sorted(taken(99)) == list(range(7))


def test_a_category_is_a_domain_where_there_is_none(write) -> None:
    rows = [{"category": "a"}, {"category": "a", "domain": "b"}, {"category": ["c"]}]
    source = write("p.jsonl", [{"prompt": "one", **row} for row in rows])
    assert [prompt.domain for prompt in read_prompts(source, word_tokenizer(), raw=True)] == ["a", "b", ""]


def user(content: object) -> str:
    return json.dumps({"messages": [{"role": "user", "content": content}]})


@pytest.mark.parametrize(
    "content, named",
    [
        ("\n\n", ": .* is empty"),
        ('{"prompt": "one"}\n\n{"prompt"\n', ", line 3: .* JSON"),
        ('{"prompt": "one', ", line 1: expected JSON, got Unterminated string at column 12"),
        ("[1]\n", ", line 1: .* list"),
        ('{"text": "one", "domain": null}\n', r", line 1: .* text, domain \(null\)"),
        ('{"prompt": 3}\n', ", line 1: .* prompt .* int"),
        ('{"turns": "one"}\n', ", line 1: .* turns as a list"),
        ('{"prompt": "one", "domain": 3}\n', ", line 1: .*domain .* int"),
        ('{"prompt": "one", "id": "\\ud800"}\n', ", line 1: .*id .*ud800"),
        (user("\ud800"), ", line 1: .*surrogate"),
        (user(" "), ", line 1: message 1 .* empty"),
        ('{"prompt": "one"}\n{"prompt": "one", "id": ' + "9" * 5_000 + "}\n", ", line 2: .* id "),
        ('{"messages": [{"role": "usr", "content": "one"}]}\n', ", line 1: message 1 .*'usr'"),
        ('{"prompt": "one"}\n{"prompt": "  ", "raw": true}\n', ", line 2: .* token"),
        ('{"prompt": "one"}\n{"prompt": "  "}\n', ", line 2: .* empty"),
        ('{"prompt": "one", "id": 1.5}\n', ", line 1: .*id .*1.5"),
        ('{"prompt": "one", "raw": 1}\n', ", line 1: .*raw .*1"),
        ('{"messages": [{"role": "user", "content": "one"}], "raw": true}\n', ", line 1: .*raw .*True"),
    ],
)
def test_rejected_lines_are_named(write, content: str, named: str) -> None:
    source = write("p.jsonl", content)
    with pytest.raises(RunError, match="^" + re.escape(source) + named):
        read_prompts(source, word_tokenizer(bos=False))


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": None},
        {"prompt": ""},
        {"prompt": []},
        {"prompt": None, "messages": None},
        {"messages": []},
        {"messages": "[]"},
        {"messages": chat("one", "two")[1:]},
        {"messages": chat("one", "two")[1:] * 2},
        {"messages": chat(" ")},
        {"messages": chat(None)},
        {"messages": chat("one", "two", None)},
        {"messages": chat("one", None, "two")},
        {"messages": [{"role": "user", "content": None, "weight": 1}]},
        {"messages": [{"role": "user"}]},
        {"conversations": [{"from": "human", "value": None}]},
        {"messages": [{"role": "system", "content": "one"}]},
        {"prompt": "\ud800"},
    ],
)
def test_a_row_without_a_prompt_is_named(write, row: dict) -> None:
    with pytest.raises(UnusablePrompt, match="line 2: "):
        read_prompts(write("p.jsonl", [{"prompt": "one"}, row]), word_tokenizer(bos=False))


def test_ids_that_pandas_wrote(write) -> None:
    rows = '{"prompt": "one", "id": 7.0}\n{"prompt": "one", "id": NaN}\n{"prompt": "one", "id": null}\n'
    assert [repr(row.row_id) for row in read_prompt_rows(write("p.jsonl", rows))] == ["7", "2", "3"]


def test_messages_without_a_template_or_refused_by_it(write) -> None:
    source = write("p.jsonl", [{"messages": chat("one")}])
    strict = word_tokenizer()
    strict.chat_template = "{{ raise_exception('only systems') }}"
    for tokenizer, named in ((appending_tokenizer(), "no chat template"), (strict, "only systems")):
        with pytest.raises(RunError, match=f"line 1: .*{named}"):
            read_prompts(source, tokenizer)


def test_rows_of_every_format_and_field(tmp_path: Path, write) -> None:
    rows = [
        {"instruction": "one", "input": "two", "response": "two", "id": 7, "category": "a"},
        {"instruction": "one", "output": "two"},
        {"question": "one", "answer": "two"},
    ]
    expected = [("one\n\ntwo", "a", 7), ("one", "", 2), ("one", "", 3)]
    table = {name: [row.get(name) for row in rows] for name in ("instruction", "input", "question", "category", "id")}
    pq.write_table(pa.table(table), tmp_path / "p.parquet")
    sources = [write("p.json", json.dumps(rows, indent=1)), write("p.ndjson", rows), str(tmp_path / "p.parquet")]
    for source in sources:
        assert [(row.content, row.domain, row.row_id) for row in read_prompt_rows(source)] == expected
    source = write("p.csv", 'Category,Question\na,"one, ""two"""\nb,three\n')
    assert [(row.content, row.domain) for row in read_prompt_rows(source)] == [('one, "two"', "a"), ("three", "b")]
    with pytest.raises(RunError, match="p.json, row 1: .*question.* rounds"):
        read_prompt_rows(write("p.json", json.dumps([{"rounds": ["one"]}], indent=1)))


def test_the_input_of_self_instruct(tmp_path: Path, write) -> None:
    rows = [
        {"id": "s0", "instruction": "one", "input": None, "instances": [{"input": "two", "output": "x"}]},
        {"instruction": "one", "input": "three", "instances": [{"input": "two"}]},
        {"instruction": "one", "instances": [{"input": "", "output": "x"}]},
        {"instruction": "one", "instances": []},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "p.parquet")
    for source in (write("p.jsonl", rows), str(tmp_path / "p.parquet")):
        assert [row.content for row in read_prompt_rows(source)] == ["one\n\ntwo", "one\n\nthree", "one", "one"]
    with pytest.raises(RunError, match="line 1: input must be text"):
        read_prompt_rows(write("p.jsonl", [{"instruction": "one", "instances": [{"input": 3}]}]))


@pytest.mark.parametrize(
    ("rows", "line"),
    [
        (
            [{"prompt": "one", "question": "two", "id": 3, "x": None}],
            "prompts from 'prompt'; not used: question",
        ),
        ([{"prompt": chat("one"), "turns": ["two"]}], "prompts from 'turns'; not used: prompt"),
        ([{"prompt": "one", "messages": chat("two")}, {"prompt": "one"}], "prompts from 'messages', 'prompt'"),
        ([{"conversations": chat("one")}, {"prompt": ["one"]}], "prompts from 'conversations', 'prompt'"),
        ([{"turns": ["one"], "question": "two"}], "prompts from 'turns'; not used: question"),
        (
            [{"instruction": "one", "instances": [{"input": "two"}], **dict.fromkeys("abcdef", 1)}],
            "prompts from 'instruction', 'instances'; not used: a, b, c, d and 2 more",
        ),
        ([{"instruction": "one", "instances": [{"output": "two"}]}], "prompts from 'instruction'; not used: instances"),
        ("one", ""),
    ],
)
def test_the_fields_are_named(write, rows: list[dict] | str, line: str) -> None:
    assert fields_line(read_prompt_rows(write("p.txt" if rows == "one" else "p.jsonl", rows))) == line


@pytest.mark.parametrize("name", ["turns", "prompt"])
def test_the_first_of_several_turns(tmp_path: Path, write, name: str) -> None:
    """MT-bench's own form, and that of its copy on the hub."""
    rows = [{"question_id": 81, "category": "writing", name: ["one two", "three"], "reference": []}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "p.parquet")
    for source in (write("p.jsonl", rows), str(tmp_path / "p.parquet")):
        assert [(row.content, row.domain) for row in read_prompt_rows(source)] == [("one two", "writing")]
    with pytest.raises(RunError, match="p.jsonl, line 1: "):
        read_prompt_rows(write("p.jsonl", [{name: [3]}]))


def test_wrong_sources(write, tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("one\n\xe9t\xe9".encode("latin-1"))
    wrong: list[tuple[str, type[MTPError], str]] = [
        (str(tmp_path / "none.jsonl"), RunError, "nothing is there"),
        (write("p.md", "one"), UsageError, ".jsonl"),
        (str(tmp_path), RunError, "folder"),
        (str(tmp_path / "latin.txt"), RunError, "line 2: .*UTF-8"),
    ]
    for source, error, named in wrong:
        with pytest.raises(error, match=f"^{source}.* {named}"):
            read_prompts(source, word_tokenizer())
    with pytest.raises(UsageError, match="num_prompts .* 0"):
        read_prompts(write("p.txt", "one"), word_tokenizer(), 0)


def test_prompts_that_cannot_be_encoded(write) -> None:
    for content in ("one", [{"role": "user", "content": "one"}]):
        with pytest.raises(UsageError, match="tokenizer"):
            encode_prompt_row(PromptRow("here", content, "", 1), None)
    with pytest.raises(UsageError, match="surrogate"):
        encode_prompt("\udcff", word_tokenizer())
    source = write("p.txt", "one\none one one\n")
    assert len(read_prompts(source, word_tokenizer(), context=5, raw=True)) == 2
    with pytest.raises(RunError, match="p.txt, line 2: .* 4 tokens"):
        read_prompts(source, word_tokenizer(), context=4, raw=True)
