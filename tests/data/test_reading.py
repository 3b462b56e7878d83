# SPDX-License-Identifier: Apache-2.0
"""Reading: every kind of source gives its rows, and every mistake one line that names the source."""

from __future__ import annotations

import gzip
import re
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mtp_lightning.data.reading import open_source
from mtp_lightning.errors import RunError, UsageError
from mtp_lightning.text.prompts import read_prompt_rows


def rows_of(source: str) -> list[dict]:
    return [row.fields for part in open_source(source) for row in part.rows()]


def test_json_lines_and_arrays(write) -> None:
    path = write("a.jsonl", [{"text": "one", "domain": "d", "other": 1}, {"text": "two", "domain": None, "other": 2}])
    assert [row["text"] for row in rows_of(path)] == ["one", "two"]
    assert rows_of(write("a.json", '[\n  {"text": "one"},\n  {"text": "two"}\n]\n')) == [{"text": "one"}, {"text": "two"}]


def test_rows_of_different_types(write) -> None:
    path = write("a.jsonl", [{"text": "one"}, {"prompt": "two", "completion": "three"}])
    rows = [{name: value for name, value in row.items() if value is not None} for row in rows_of(path)]
    assert rows == [{"text": "one"}, {"prompt": "two", "completion": "three"}]


def test_parquet(tmp_path: Path) -> None:
    rows = [{"input_ids": [1, 2], "labels": [-100, 2]}, {"input_ids": [3], "labels": [3]}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    found = rows_of(str(tmp_path / "a.parquet"))
    assert [{field: values.tolist() for field, values in row.items()} for row in found] == rows


def test_csv(write, tmp_path: Path) -> None:
    content = 'Prompt,completion,other\n"one, ""two""",three,4\n' + f'"x\ny",{"long " * 50_000},\nsix,,\n'
    expected = [('one, "two"', "three"), ("x\ny", "long " * 50_000), ("six", None)]
    assert [(row["prompt"], row["completion"]) for row in rows_of(write("a.csv", content))] == expected
    write("labels.csv", "image,label\na.png,3\n")
    with pytest.warns(UserWarning, match="labels.csv: left out"):
        assert len(rows_of(str(tmp_path))) == 3
    (tmp_path / "prices.csv").write_bytes("name,price\ncaf\u00e9,1,2\n".encode("latin-1"))
    (tmp_path / "sizes.csv").write_text("name,size\na,1\n", encoding="utf-16")
    with pytest.warns(UserWarning) as warned:
        assert len(rows_of(str(tmp_path))) == 3
    left_out = "".join(str(each.message) for each in warned)
    assert all(f"{name}.csv" in left_out for name in ("labels", "prices", "sizes"))
    (tmp_path / "a.csv").unlink()
    with pytest.warns(UserWarning), pytest.raises(RunError, match=re.escape(str(tmp_path))):
        open_source(str(tmp_path))
    with pytest.raises(RunError, match="b.csv, row 2: "):
        rows_of(write("b.csv", "prompt,completion\none,two\nHi,Hello, you\n"))
    # A quote that is not closed would swallow the rows behind it; one in the middle would be dropped from the text.
    for row in ('"three,four', '"three" four,five'):
        with pytest.raises(RunError, match="b.csv, line 3: "):
            rows_of(write("b.csv", f"prompt,completion\none,two\n{row}\nsix,seven\n"))


@pytest.mark.parametrize(("separator", "name"), [(";", "semicolon"), ("\t", "tab")])
def test_csv_of_excel_in_other_languages(write, tmp_path: Path, separator: str, name: str) -> None:
    lines = ["Prompt|completion|domain, topic", '"one| two, ""three"""|four, five|', "six, seven|one|two"]
    content = "\ufeff" + "\r\n".join(lines).replace("|", separator) + "\r\n"
    expected = [(f'one{separator} two, "three"', "four, five"), ("six, seven", "one")]
    (tmp_path / "b.csv.gz").write_bytes(gzip.compress(content.encode()))
    for source in (write("a.csv", content), str(tmp_path / "b.csv.gz")):
        assert [(row["prompt"], row["completion"]) for row in rows_of(source)] == expected
    assert [row.content for row in read_prompt_rows(str(tmp_path / "a.csv"))] == [prompt for prompt, _ in expected]
    with pytest.raises(RunError, match=f"row 1: more values .* a text with a {name} needs quotes"):
        rows_of(write("c.csv", f"prompt{separator}completion\none{separator}two{separator}three\n"))


def test_text_with_and_without_separators(write) -> None:
    documents = rows_of(write("a.txt", "one\n\ntwo\n<|endoftext|>\nthree\n<|endoftext|>\n"))
    assert documents == [{"text": "one\n\ntwo"}, {"text": "three"}]
    assert rows_of(write("b.txt", "one\n\ntwo\n")) == [{"text": "one\n\ntwo"}]


def test_folders_and_globs_take_files_in_order(write, tmp_path: Path) -> None:
    write("b.jsonl", [{"text": "b"}])
    write("a/z.jsonl", [{"text": "z"}])
    write("c.txt", "c")
    write("README.md", "not data")
    assert [row["text"] for row in rows_of(str(tmp_path))] == ["z", "b", "c"]
    for name in ("g2.jsonl", "g4.jsonl", "g1.jsonl", "h.jsonl", "g3.jsonl", "g5.csv"):  # not the order of any disk
        write(name, [{"text": name}])
    assert [row["text"] for row in rows_of(f"{tmp_path}/g*")] == ["g1.jsonl", "g2.jsonl", "g3.jsonl", "g4.jsonl"]
    assert rows_of(write("a[1].txt", "one")) == [{"text": "one"}]  # a file that exists is not a glob


def test_a_folder_gives_each_row_once(write, tmp_path: Path) -> None:
    """Links to files and folders, also to the folder itself, and compressed files beside what was unpacked from them."""
    path = Path(write("d/a.jsonl", [{"text": "a"}]))
    Path(f"{path}.gz").write_bytes(gzip.compress(path.read_bytes()))
    Path(write("d/z.jsonl", [{"text": "z"}])).with_suffix(".jsonl.gz").write_bytes(b"")
    (tmp_path / "d" / "0").symlink_to(path)
    (tmp_path / "d" / "b.jsonl").symlink_to(path)
    write("elsewhere/c.jsonl", [{"text": "c"}])
    (tmp_path / "d" / ".hidden").symlink_to(tmp_path / "elsewhere")  # not the first link that counts
    (tmp_path / "d" / "sub").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "d" / "again").symlink_to(tmp_path / "d")
    with pytest.warns(UserWarning, match="jsonl.gz"):
        assert [row["text"] for row in rows_of(str(tmp_path / "d"))] == ["a", "c", "z"]
    assert [row["text"] for row in rows_of(f"{tmp_path}/d/a.jsonl.*")] == ["a"]


def test_shipped_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, write) -> None:
    write("demo/a.jsonl", [{"text": "one"}])
    monkeypatch.setattr("mtp_lightning.paths.files", lambda package: tmp_path if package == "mtp_lightning" else None)
    assert rows_of("package://demo/a.jsonl") == [{"text": "one"}]
    with pytest.raises(RunError, match="^package://demo/b.jsonl: "):
        open_source("package://demo/b.jsonl")


def test_a_changed_file_is_read_again(write) -> None:
    assert rows_of(write("a.jsonl", [{"text": "one"}])) == [{"text": "one"}]
    assert rows_of(write("a.jsonl", [{"text": "six"}])) == [{"text": "six"}]


@pytest.mark.parametrize(
    ("source", "requested"),
    [
        ("name", ("name", None, "train")),
        ("owner/name/config", ("owner/name", "config", "train")),
        ("owner/name/20220301.en:train[:10]", ("owner/name", "20220301.en", "train[:10]")),
    ],
)
def test_hub_ids(monkeypatch: pytest.MonkeyPatch, source: str, requested: tuple) -> None:
    seen = []

    def load_dataset(name: str, config: str | None = None, *, split: str, streaming: bool) -> datasets.Dataset:
        seen.append((name, config, split))
        return datasets.Dataset.from_dict({"text": ["one"], "id": [0]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert rows_of(source) == [{"text": "one"}] and seen == [requested]


def test_hub_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*args: object, **options: object) -> None:
        raise ConnectionError("Couldn't reach\n'owner/name' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(RunError, match="^owner/name: .*: Couldn't reach 'owner/name' on the Hub"):
        open_source("owner/name")


@pytest.mark.parametrize(
    ("source", "error"),
    [(source, RunError) for source in ("nothing.jsonl", "./nothing", "/nothing/at/all", "a/b/c/d", "nothing/", "x/y.csv")]
    + [("./*.jsonl", RunError), (" ", UsageError), ("{a.jsonl: x}", UsageError), ("owner//name", UsageError)],
)
def test_sources_that_name_nothing(source: str, error: type[Exception], tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=re.escape(source)):
        open_source(source)


def test_folders_and_files_without_data(write, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=f"^{tmp_path}: .*.parquet"):
        open_source(str(tmp_path))
    with pytest.raises(UsageError, match="a.tsv: .*.parquet"):
        open_source(write("a.tsv", "x"))
