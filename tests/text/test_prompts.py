# SPDX-License-Identifier: Apache-2.0
"""Reading prompts: every form, the order, the special tokens, and a message for everything that can be wrong."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from toy_tokenizers import word_tokenizer

from mtp_lightning.errors import MTPError, RunError, UsageError
from mtp_lightning.text.prompts import Prompt, PromptRow, encode_prompt, encode_prompt_row, read_prompts, round_robin

BOS, EOS, START, END, NEWLINE, ONE, TWO = 1, 2, 3, 4, 5, 9, 10
USER, ASSISTANT = 7, 8


class AppendingTokenizer:
    """Appends an end token, as T5's and some of Llama's do."""

    eos_token_id = EOS
    chat_template = None

    def __init__(self) -> None:
        self.inner = word_tokenizer(bos=False)

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": self.inner(text)["input_ids"] + ([EOS] if add_special_tokens else [])}


@pytest.fixture
def write(tmp_path: Path):
    def write_file(content: str | list, name: str = "prompts.jsonl") -> str:
        path = tmp_path / name
        text = (
            content if isinstance(content, str) else "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content)
        )
        path.write_bytes(text.encode())
        return str(path)

    return write_file


def chat(*contents: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


def test_text_file_has_one_prompt_a_line(write) -> None:
    source = write("one two\r\n\n  \ntwo\n", "prompts.txt")
    assert read_prompts(source, word_tokenizer()) == [Prompt("one two", [BOS, ONE, TWO], ""), Prompt("two", [BOS, TWO], "")]


def test_jsonl_with_prompts_and_messages(write) -> None:
    source = write([{"prompt": "one", "domain": "code"}, {"messages": chat("two"), "more": 3}, {"prompt": chat("two")}])
    rendered = "<|im_start|>user\ntwo<|im_end|>\n<|im_start|>assistant\n"
    ids = [START, USER, NEWLINE, TWO, END, NEWLINE, START, ASSISTANT, NEWLINE]  # and no second <bos>
    expected = [Prompt("one", [BOS, ONE], "code"), Prompt(rendered, ids, ""), Prompt(rendered, ids, "")]
    assert read_prompts(source, word_tokenizer()) == expected


def test_an_answer_at_the_end_is_left_out(write) -> None:
    with_answer, without = (
        write([{"messages": chat("one", "two")}], "a.jsonl"),
        write([{"messages": chat("one")}], "b.jsonl"),
    )
    assert read_prompts(with_answer, word_tokenizer()) == read_prompts(without, word_tokenizer())


def test_line_separators_inside_json_strings_do_not_split(write) -> None:
    text = "one\u2028two\x85"
    assert [p.text for p in read_prompts(write([{"prompt": text}]), word_tokenizer())] == [text]


def test_byte_order_mark_is_no_token(write) -> None:
    assert read_prompts(write("\ufeffone\n", "p.txt"), word_tokenizer())[0].input_ids == [BOS, ONE]


def test_an_appended_end_token_is_stripped_and_one_in_the_text_is_not(write) -> None:
    source = write("one two\none <eos>\n", "p.txt")
    tokenizer = AppendingTokenizer()
    assert tokenizer("one two")["input_ids"] == [ONE, TWO, EOS]
    assert [p.input_ids for p in read_prompts(source, tokenizer)] == [[ONE, TWO], [ONE, EOS, EOS]]
    assert [p.input_ids for p in read_prompts(source, word_tokenizer(bos=False))] == [[ONE, TWO], [ONE, EOS]]


@pytest.mark.parametrize("text, ids", [("one\ntwo\n", [[BOS, ONE], [BOS, TWO]]), ('\n{"prompt": "one"}\n', [[BOS, ONE]])])
def test_standard_input(text: str, ids: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    assert [p.input_ids for p in read_prompts("-", word_tokenizer())] == ids


def test_a_shipped_file(write, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write([{"prompt": "one"}])
    monkeypatch.setattr("mtp_lightning.text.prompts.resolve", {"package://demo/p.jsonl": path}.__getitem__)
    assert len(read_prompts("package://demo/p.jsonl", word_tokenizer())) == 1


def test_round_robin() -> None:
    assert round_robin("aaabb") == [0, 3, 1, 4, 2]
    assert round_robin("ba") == [0, 1]
    assert round_robin([]) == []


def test_a_limit_takes_evenly_from_the_domains(write) -> None:
    domains = "aaaabbc"
    source = write([{"prompt": "one " * (i + 1), "domain": domain} for i, domain in enumerate(domains)])

    def taken(limit: int | None) -> list[int]:
        return [len(p.input_ids) - 2 for p in read_prompts(source, word_tokenizer(), limit)]

    assert taken(None) == list(range(7))
    assert taken(5) == [0, 4, 6, 1, 5]
    assert sorted(taken(99)) == list(range(7))


@pytest.mark.parametrize(
    "content, message",
    [
        ("", "expected at least one prompt, it is empty"),
        ("\n\n", "expected at least one prompt, it is empty"),
        ('{"prompt": "one"}\n\n{"prompt"\n', "line 3: expected JSON, got Expecting ':' delimiter at column 10"),
        ("[1]\n", "line 1: expected an object with prompt or messages, got list"),
        ('{"text": "one", "domain": "code"}\n', "line 1: expected prompt or messages, got the fields: text, domain"),
        ('{"prompt": null}\n', "line 1: expected prompt or messages, got the fields: prompt (null)"),
        ("{}\n", "line 1: expected prompt or messages, got the fields: none"),
        ('{"prompt": 3}\n', "line 1: expected prompt as text or messages as a list, got int"),
        ('{"messages": "one"}\n', "line 1: expected prompt as text or messages as a list, got str"),
        ('{"messages": []}\n', "line 1: expected messages of which one is to be answered, got none."),
        ('{"messages": ["one"]}\n', "line 1: each of messages must be {role, content}, got 'one'."),
        ('{"prompt": "one", "domain": 3}\n', "line 1: expected domain as text, got int"),
        ('{"prompt": "one", "id": "\\ud800"}\n', "line 1: expected id as UTF-8 text, got half a character or other bytes"),
        ('{"prompt": "\\ud800"}\n', "line 1: expected UTF-8 text, got half a character or other bytes"),
        ('{"messages": [{"role": "user", "content": "\\ud800"}]}\n', "line 1: expected UTF-8 text, got half a character"),
        ("[" * 100_000, "line 1: expected JSON, got brackets in one another without end"),
        (
            '{"prompt": "one"}\n{"prompt": "one", "id": ' + "9" * 5_000 + "}\n",
            "line 2: expected numbers of at most 4300 digits, got one of 5000. Correct or delete the line.",
        ),
        ('{"messages": [{"role": "user"}]}\n', "line 1: each of messages must be {role, content}, got {'role': 'user'}"),
        (
            '{"messages": [{"role": "user", "content": null, "name": "a"}]}\n',
            "line 1: each of messages must be {role, content}, got {'role': 'user', 'content': None, 'name': 'a'}",
        ),
        (
            '{"messages": [{"role": "assistant", "tool_calls": []}, {"role": "user", "content": "one"}]}\n',
            "line 1: each of messages must be {role, content}, got {'role': 'assistant', 'tool_calls': []}",
        ),
        ('{"messages": [{"role": "user", "content": " "}]}\n', "line 1: message 1 is the user's and empty. Add text, or"),
        ('{"messages": [{"role": "user", "content": []}]}\n', "line 1: content of a message must be text or parts of text"),
        (
            '{"messages": [{"role": "user", "content": [{"type": "image_url", "text": "one"}]}]}\n',
            "line 1: content of a message must be text or parts of text, got a part {'type': 'image_url', 'text': 'one'}.",
        ),
        ('{"messages": [{"role": 1, "content": "one"}]}\n', "line 1: role of a message must be text, got int"),
        ('{"messages": [{"role": "user", "content": 3}]}\n', "line 1: content of a message must be text, got int"),
        ('{"messages": [{"role": "usr", "content": "one"}]}\n', "line 1: message 1 has the role 'usr', which the chat"),
        ('{"prompt": "one"}\n{"prompt": "  "}\n', "line 2: expected at least one token, the prompt has none"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(write, content: str, message: str) -> None:
    source = write(content)
    with pytest.raises(RunError) as caught:
        read_prompts(source, word_tokenizer(bos=False))
    assert message in str(caught.value) and str(caught.value).startswith(source) and "\n" not in str(caught.value)


def test_a_content_in_parts_is_their_text(write) -> None:
    parts = [{"type": "text", "text": "one "}, {"type": None, "text": "two", "image": None}, " three"]
    rows = [{"messages": [{"role": "user", "content": content}]} for content in (parts, "one two three")]
    first, second = read_prompts(write(rows), word_tokenizer())
    assert first == second and "one two three" in first.text


def test_messages_without_a_template_or_refused_by_it(write) -> None:
    source = write([{"messages": chat("one")}])
    with pytest.raises(RunError, match="line 1: there are messages, and the base's tokenizer has no chat template"):
        read_prompts(source, AppendingTokenizer())
    strict = word_tokenizer()
    strict.chat_template = "{{ raise_exception('only systems') }}"
    with pytest.raises(RunError, match="line 1: the chat template refuses the messages .*: only systems"):
        read_prompts(source, strict)


def test_wrong_sources(write, tmp_path: Path) -> None:
    wrong: list[tuple[str, type[MTPError], str]] = [
        (str(tmp_path / "none.jsonl"), RunError, "expected a file of prompts, nothing is there"),
        (write("one", "p.csv"), UsageError, "expected prompts in a .txt or .jsonl file"),
        (str(tmp_path), RunError, "expected a .txt or .jsonl file of prompts, it is a folder. Name a file in it."),
    ]
    for source, kind, message in wrong:
        with pytest.raises(kind, match=message):
            read_prompts(source, word_tokenizer())
    latin = tmp_path / "latin.txt"
    latin.write_bytes("one\n\xe9t\xe9".encode("latin-1"))
    with pytest.raises(RunError, match="latin.txt, line 2: expected UTF-8 text, .* Save it as UTF-8"):
        read_prompts(str(latin), word_tokenizer())
    with pytest.raises(UsageError, match="must be 1 or more, got 0. Change num_prompts."):
        read_prompts(write("one", "p.txt"), word_tokenizer(), 0)


def test_a_model_without_a_tokenizer() -> None:
    for content in ("one", [{"role": "user", "content": "one"}]):
        with pytest.raises(UsageError, match="a prompt needs a tokenizer, and the model was saved without one"):
            encode_prompt_row(PromptRow("here", content, "", 1), None)
    with pytest.raises(UsageError, match="a prompt needs a tokenizer"):
        encode_prompt("one", None)


def test_a_prompt_that_leaves_no_room_in_the_context(write) -> None:
    source = write("one\none one one\n", "p.txt")
    assert len(read_prompts(source, word_tokenizer(), context=5)) == 2
    with pytest.raises(
        RunError, match="p.txt, line 2: the prompt has 4 tokens and the model's context is 4: shorten it to 3"
    ):
        read_prompts(source, word_tokenizer(), context=4)


def test_a_prompt_that_is_no_text() -> None:
    with pytest.raises(UsageError, match="the prompt must be UTF-8 text, got half a character or other bytes. Change"):
        encode_prompt("\udcff", word_tokenizer())
