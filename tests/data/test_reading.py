# SPDX-License-Identifier: Apache-2.0
"""Reading: every kind of source gives its rows, and every mistake gives one line that says what to change."""

from __future__ import annotations

import re
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mtp_lightning.data import reading
from mtp_lightning.data.reading import read_source, row_kind
from mtp_lightning.errors import RunError, UsageError


def rows_of(source: str) -> list[dict]:
    return [row for part in read_source(source) for row in part]


def test_json_lines(write) -> None:
    path = write("a.jsonl", [{"text": "one", "domain": "d", "other": 1}, {"text": "two", "domain": None, "other": 2}])
    assert rows_of(path) == [{"text": "one", "domain": "d"}, {"text": "two", "domain": None}]


def test_json_array_over_several_lines(write) -> None:
    path = write("a.json", '[\n  {"text": "one"},\n  {"text": "two"}\n]\n')
    assert rows_of(path) == [{"text": "one"}, {"text": "two"}]


def test_rows_of_different_kinds(write) -> None:
    path = write("a.jsonl", [{"text": "one"}, {"prompt": "two", "completion": "three"}])
    found = [{name: value for name, value in row.items() if value is not None} for row in rows_of(path)]
    assert found == [{"text": "one"}, {"prompt": "two", "completion": "three"}]


def test_parquet(tmp_path: Path) -> None:
    pq.write_table(pa.table({"input_ids": [[1, 2], [3]], "labels": [[-100, 2], [3]]}), tmp_path / "a.parquet")
    assert rows_of(str(tmp_path / "a.parquet")) == [
        {"input_ids": [1, 2], "labels": [-100, 2]},
        {"input_ids": [3], "labels": [3]},
    ]


def test_text_with_and_without_document_marks(write) -> None:
    assert rows_of(write("a.txt", "one\n\ntwo\n<|endoftext|>\nthree\n<|endoftext|>\n")) == [
        {"text": "one\n\ntwo"},
        {"text": "three"},
    ]
    assert rows_of(write("b.txt", "one\n\ntwo\n")) == [{"text": "one\n\ntwo"}]


def test_folder_takes_all_files_in_order(write, tmp_path: Path) -> None:
    write("b.jsonl", [{"text": "b"}])
    write("a/z.jsonl", [{"text": "z"}])
    write("c.txt", "c")
    write("README.md", "not data")
    assert [row["text"] for row in rows_of(str(tmp_path))] == ["z", "b", "c"]


def test_glob(write, tmp_path: Path) -> None:
    for name in ("a2.jsonl", "a4.jsonl", "a1.jsonl", "b.jsonl", "a3.jsonl", "a5.csv"):  # no order that a disk would list
        write(name, [{"text": name}])
    assert [row["text"] for row in rows_of(f"{tmp_path}/a*")] == ["a1.jsonl", "a2.jsonl", "a3.jsonl", "a4.jsonl"]


def test_a_path_with_glob_letters_that_exists(write) -> None:
    assert rows_of(write("a[1].txt", "one")) == [{"text": "one"}]


def test_shipped_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, write) -> None:
    write("demo/a.jsonl", [{"text": "one"}])
    monkeypatch.setattr("mtp_lightning.paths.files", lambda package: tmp_path if package == "mtp_lightning" else None)
    assert rows_of("package://demo/a.jsonl") == [{"text": "one"}]
    with pytest.raises(RunError, match=r"^package://demo/b.jsonl: expected a file or folder, nothing is there"):
        read_source("package://demo/b.jsonl")


def test_a_changed_file_is_read_anew(write) -> None:
    assert rows_of(write("a.jsonl", [{"text": "one"}])) == [{"text": "one"}]
    assert rows_of(write("a.jsonl", [{"text": "six"}])) == [{"text": "six"}]


@pytest.mark.parametrize(
    ("source", "asked"),
    [
        ("name", ("name", None, "train")),
        ("owner/name", ("owner/name", None, "train")),
        ("owner/name:validation", ("owner/name", None, "validation")),
        ("owner/name/config", ("owner/name", "config", "train")),
        ("owner/name/20220301.en:train[:10]", ("owner/name", "20220301.en", "train[:10]")),
    ],
)
def test_hub_ids(monkeypatch: pytest.MonkeyPatch, source: str, asked: tuple) -> None:
    seen = []

    def load_dataset(name: str, config: str | None, split: str) -> datasets.Dataset:
        seen.append((name, config, split))
        return datasets.Dataset.from_dict({"text": ["one"], "id": [0]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert rows_of(source) == [{"text": "one"}] and seen == [asked]


def test_hub_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*args: object, **options: object) -> None:
        raise ConnectionError("Couldn't reach\n'owner/name' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(RunError) as error:
        read_source("owner/name")
    assert str(error.value) == (
        "owner/name: no such file here, and as a data set on the Hugging Face hub it could not be loaded: Couldn't reach"
        " 'owner/name' on the Hub. Check the name, config and split (owner/name/config:split), the network, or give a local"
        " path."
    )


@pytest.mark.parametrize(
    "source", ["nothing.jsonl", "./nothing", "/nothing/at/all", "a/b/c/d", "nothing/", "data/nothing.csv"]
)
def test_missing_path(source: str) -> None:
    with pytest.raises(RunError, match=rf"^{re.escape(source)}: expected a file or folder, nothing is there \(looked in /"):
        read_source(source)


def test_nothing_matches(tmp_path: Path) -> None:
    with pytest.raises(
        RunError, match=r"\*\.jsonl: expected a glob that matches .jsonl, .json, .parquet, .txt files, it matches"
    ):
        read_source(f"{tmp_path}/*.jsonl")
    with pytest.raises(RunError, match=r"expected a folder with .jsonl, .json, .parquet, .txt files, found none in it"):
        read_source(str(tmp_path))


def test_sources_that_name_nothing(write) -> None:
    with pytest.raises(UsageError, match=r"a.csv: expected a file that ends in one of .jsonl, .*, got '.csv'. Convert it."):
        read_source(write("a.csv", "x"))
    with pytest.raises(UsageError, match="must be a file, folder, glob or hub id, got an empty string"):
        read_source(" ")
    with pytest.raises(UsageError, match="^owner//name: expected a path, or a hub id like owner/name"):
        read_source("owner//name")


@pytest.mark.parametrize(
    ("name", "content"), [("a.jsonl", ""), ("a.json", "\n \n"), ("a.txt", "\n"), ("b.txt", "<|endoftext|>")]
)
def test_empty_file(write, name: str, content: str) -> None:
    path = write(name, content)
    with pytest.raises(RunError, match=rf"^{re.escape(path)}: expected at least one (row|document), it is empty"):
        read_source(path)


def test_empty_table(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "a.parquet")
    with pytest.raises(RunError, match=r"a.parquet: expected a .parquet file, it cannot be read: it has no rows"):
        read_source(str(tmp_path / "a.parquet"))


def test_json_that_does_not_parse_is_named_with_its_line(write, caplog) -> None:
    path = write("a.jsonl", '{"text": "one"}\n\n{"text": "two"\n{"text": "three"}\n')
    with pytest.raises(RunError) as error:
        read_source(path)
    assert caplog.records == []  # datasets would log its own line beside ours
    assert (
        str(error.value)
        == f"{path}, line 3: expected JSON, got Expecting ',' delimiter at column 15. Correct or delete the line."
    )


def test_json_array_that_does_not_parse_is_named_with_its_line(write) -> None:
    path = write("a.json", '[\n  {"text": "one"},\n  {"text": two}\n]\n')
    with pytest.raises(RunError, match=rf"^{re.escape(path)}, line 3: expected JSON, got Expecting value at column 12."):
        read_source(path)


@pytest.mark.parametrize(("content", "line"), [('{"text": "one"}\n[1, 2]\n', 2), ('"one"\n"two"\n', 1)])
def test_json_rows_that_are_no_objects(write, content: str, line: int) -> None:
    path = write("a.jsonl", content)
    with pytest.raises(
        RunError, match=rf"^{re.escape(path)}, line {line}: expected an object with fields \(messages .*, got (list|str)\.$"
    ):
        read_source(path)


def test_files_that_are_not_what_their_name_says(write, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"a.parquet: expected a .parquet file, it cannot be read: "):
        read_source(write("a.parquet", "no table"))
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(
        RunError, match=r"a.txt: expected UTF-8 text, it cannot be decoded: 'utf-8' codec can't decode byte 0xff"
    ):
        read_source(str(tmp_path / "a.txt"))


def test_rows_without_the_fields_needed(write) -> None:
    path = write("a.jsonl", [{"question": "one", "answer": "two"}])
    with pytest.raises(RunError) as error:
        read_source(path)
    assert str(error.value) == (
        f"{path}: expected rows with messages | prompt + completion (or completion_ids) | text | input_ids (+ labels),"
        " got the fields question, answer. Rename or add a field."
    )


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({"messages", "text", "prompt", "completion"}, "messages"),
        ({"prompt", "completion", "text"}, "prompt"),
        ({"prompt", "completion_ids"}, "prompt"),
        ({"prompt", "text"}, "text"),
        ({"text", "input_ids"}, "text"),
        ({"input_ids", "labels"}, "input_ids"),
        ({"prompt"}, None),
        ({"completion", "labels"}, None),
    ],
)
def test_row_kind(fields: set[str], kind: str | None) -> None:
    assert row_kind(fields) == kind


def test_docstring_names_every_suffix() -> None:
    assert all(suffix in reading.__doc__ for suffix in reading.SUFFIXES)
