# SPDX-License-Identifier: Apache-2.0
"""Files as people have them: fields that change, padding nulls, compression, line ends; read at once and as a stream."""

from __future__ import annotations

import bz2
import gzip
import json
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from toy_tokenizers import CHATML, word_tokenizer

from mtp_lightning.data.documents import Encoder
from mtp_lightning.data.preparing import Prepared, prepare
from mtp_lightning.data.reading import open_source
from mtp_lightning.data.streaming import RowStream
from mtp_lightning.errors import RunError, UsageError

ONE, TWO, THREE = 9, 10, 11


def ids(prepared: Prepared, first: int = 0) -> list[list[int]]:
    return [prepared.rows.row(number).input_ids.tolist() for number in range(first, len(prepared.rows))]


def both(source: str, template: str | None = None) -> Prepared:
    """The rows read at once; as a stream they are the same."""
    prepared = prepare(source, word_tokenizer(), max_length=300, chat_template=template)[0]
    stream = RowStream(source, Encoder(word_tokenizer(), 300, template)).take(len(prepared.rows))
    assert ids(stream) == ids(prepared)
    return prepared


def fields(path: Path) -> list[dict]:
    return [row.fields for part in open_source(str(path)) for row in part.rows()]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, {"domain": "d"}),
        ({"domain": None, "note": None}, {"domain": "d", "note": "text"}),
        ({"id": 1}, {"id": "text"}),
        ({"extra": {"a": 1}}, {"extra": [1, "a", {"b": None}], "text": "two"}),
        ({"date": "2024-01-05"}, {"date": "none"}),
    ],
)
def test_fields_may_change_late(write, before: dict, after: dict) -> None:
    """After the first 10 MB, from which a reader that guesses types has guessed them."""
    common = {"text": "one"} | before | {"unused": "x" * 900}
    rows = both(write("a.jsonl", [common] * 12_000 + [{"text": "two"} | after]))
    assert len(rows.rows) == 12_001 and ids(rows, 11_999) == [[1, ONE, 2], [1, TWO, 2]]
    assert rows.rows.row(12_000).domain == after.get("domain", "")


def test_content_as_text_first_and_in_parts_later(write) -> None:
    def chat(content: object) -> dict:
        return {
            "messages": [{"role": "user", "content": content}, {"role": "assistant", "content": content}],
            "x": "x" * 900,
        }

    rows = both(write("a.jsonl", [chat("one")] * 12_000 + [chat([{"type": "text", "text": "one"}])]))
    assert ids(rows, 12_000) == ids(rows)[:1]


ARGUMENTS = CHATML.replace(
    "{{ m.content }}",
    "{{ m.content or '' }}{% for c in m.tool_calls or [] %}{% for k, v in c.arguments.items() %} {{ k }} {{ v }}"
    "{% endfor %}{% endfor %}",
)


def test_padding_nulls_of_tables_are_dropped(tmp_path: Path) -> None:
    def call(arguments: dict) -> dict:
        says = [{"role": "user", "content": "six"}, {"role": "assistant", "tool_calls": [{"arguments": arguments}]}]
        return {"messages": says}

    rows = [call({"one": "two"}), call({"three": "two", "six": ["one", None]})]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    messages = [row["messages"][1]["tool_calls"][0]["arguments"] for row in fields(tmp_path / "a.parquet")]
    assert messages == [{"one": "two"}, {"three": "two", "six": ["one", None]}]
    assert ids(both(str(tmp_path / "a.parquet"), ARGUMENTS))[0][-5:] == [5, ONE, TWO, 4, 5]


def test_nulls_that_a_user_wrote_are_kept(write, tmp_path: Path) -> None:
    write("a.jsonl", [{"messages": [{"role": "assistant", "tool_calls": [{"arguments": {"x": None}}]}]}])
    assert fields(tmp_path / "a.jsonl")[0]["messages"][0]["tool_calls"] == [{"arguments": {"x": None}}]


def test_parquet_with_tables_of_other_types(tmp_path: Path) -> None:
    """Binary text, lists of other widths and with nulls, a map, unused columns of any type; two row groups."""
    table = pa.table(
        {
            "text": pa.array([b"one", None, b"two"], pa.binary()),
            "input_ids": pa.array([None, [ONE, TWO], None], pa.large_list(pa.uint16())),
            "domain": pa.array(["d", None, "d"]).dictionary_encode(),
            "tools": pa.array([None, None, [[("name", "f")]]], pa.list_(pa.map_(pa.string(), pa.string()))),
            "time": pa.array([1, 2, 3], pa.timestamp("s")),
        }
    )
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    assert ids(both(str(tmp_path / "a.parquet"))) == [[1, ONE, 2], [ONE, TWO], [1, TWO, 2]]
    assert fields(tmp_path / "a.parquet")[2]["tools"] == [{"name": "f"}]
    assert [row.place for row in open_source(str(tmp_path / "a.parquet"))[0].rows(start=1)] == [2, 3]


ROWS = [{"text": "one"}, {"text": "two"}]
BOM = b"\xef\xbb\xbf"
LINES = b'{"text": "one"}\n{"text": "two"}\n'


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.jsonl", b'\xef\xbb\xbf{"text": "one"}\r\n\r\n \r\n{"text": "two"}'),
        ("a.NDJSON", LINES),
        ("a.jsonl.gz", gzip.compress(LINES, mtime=0)),
        ("a.jsonl", gzip.compress(LINES, mtime=0)),  # by its content
        ("a.jsonl.zst", pa.compress(LINES, codec="zstd", asbytes=True)),
        (
            "a.jsonl.zst",
            b"\x50\x2a\x4d\x18\x03\0\0\0any" + pa.compress(LINES, codec="zstd", asbytes=True),
        ),  # a skippable frame
        ("a.jsonl", bz2.compress(LINES)),
        ("a.JSONL.BZ2", bz2.compress(LINES)),
        ("a.json", LINES),
        ("a.jsonl", json.dumps(ROWS).encode()),
        ("a.json", json.dumps(ROWS, indent=2).encode()),
        ("a.json", "".join(json.dumps(row, indent=2) + "\n" for row in ROWS).encode()),
        ("a.json.gz", gzip.compress(json.dumps(ROWS, indent=2).encode(), mtime=0)),
        ("a.txt", b"\xef\xbb\xbfone\r\n<|endoftext|>two"),
        ("a.txt", BOM + b"one\n<|endoftext|>\n" + BOM + b"two<|endoftext|>" + BOM),  # files that were joined
        ("a.jsonl", b"".join(BOM + line for line in LINES.splitlines(keepends=True))),
        ("a.json", b"".join(BOM + json.dumps(row, indent=2).encode() for row in ROWS)),
        ("a.jsonl", b'{"text": "three", "text": "one", "n": NaN}\n{"text": "two", "n": ' + b"9" * 5000 + b"}"),
        ("a.jsonl", b'{"text": "one", "unused": "\\ud800\t"}\n{"text": "two", "messages": NaN}'),
    ],
)
def test_files_as_they_are(tmp_path: Path, name: str, data: bytes) -> None:
    (tmp_path / name).write_bytes(data)
    assert ids(both(str(tmp_path / name))) == [[1, ONE, 2], [1, TWO, 2]]


def test_a_long_array_is_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mtp_lightning.data.formats._CHUNK", 7)
    rows = [{"text": 'one [two], {three} \\ " ' * (n % 3 + 1), "n": [n, {"x": None}]} for n in range(30)]
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=1))
    assert fields(tmp_path / "a.json") == rows
    (tmp_path / "b.json").write_text("\n\n" + json.dumps(rows)[:-40])
    with pytest.raises(RunError, match="b.json, line 3: expected JSON"):
        fields(tmp_path / "b.json")


def test_an_array_on_one_line_is_not_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"text": "one " * 25_000}] * 200))
    (part,) = open_source(str(path))
    tracemalloc.start()
    assert part.count() == 200
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < path.stat().st_size / 2


def test_a_huge_number_leaves_the_others_integers(write) -> None:
    text = '{"text": "one", "id": %s, "messages": [{"seed": 123456789012345678901, "x": 1}]}' % ("9" * 5000)
    (message,) = fields(Path(write("a.jsonl", text)))[0]["messages"]
    assert json.dumps(message) == '{"seed": 123456789012345678901, "x": 1}'


def test_rows_of_nulls_are_counted(write) -> None:
    path = write("a.jsonl", [{"text": None}, {"text": "one"}, {"prompt": "one", "completion": None}, {"input_ids": None}])
    report = both(path).report
    assert (report.rows_read, report.skipped, report.rows) == (4, {"null instead of text": 3}, 1)


NULLS = ({"content": None}, {}, {"weight": 1}, {"content": None, "tool_calls": [], "refusal": "no"})


def test_conversations_with_null_contents_are_counted(write) -> None:
    asked = {"role": "user", "content": "one"}
    unanswered = [{"messages": [asked, {"role": "assistant", **more}]} for more in NULLS]
    unasked = {"conversations": [{"from": "human", "value": None}, {"from": "gpt", "value": "two"}]}
    path = write("a.jsonl", [*unanswered, unasked, {"messages": [asked, {"role": "assistant", "content": "two"}]}])
    report = both(path, CHATML).report
    assert (report.rows_read, report.skipped, report.rows) == (6, {"null instead of text": 5}, 1)


def test_text_stays_text(write) -> None:
    tokenizer = word_tokenizer()
    row = {"prompt": "one ", "completion": "2024-01-05"}
    rows = prepare(write("a.jsonl", [row] * 3), tokenizer, max_length=16)[0].rows
    assert rows.row(2).input_ids.tolist() == [1, ONE, 0, 2]


# folders


def test_folders_as_they_are(write, tmp_path: Path) -> None:
    write("d/a.jsonl", [{"text": "one", "x": 1}])
    write("d/b.jsonl", [{"prompt": "one ", "completion": "two", "x": "text"}])
    write("d/c.jsonl", "\n")
    write("d/d.json", [{"text": "two"}])
    write("d/.ipynb_checkpoints/a-checkpoint.jsonl", [{"text": "one"}])
    write("d/__MACOSX/._a.jsonl", "\0")
    write("d/dataset_infos.json", '{"default": {"features": {}}}')
    (tmp_path / "d" / "empty.parquet").write_bytes(b"")
    pq.write_table(pa.table({}), tmp_path / "d" / "none.parquet")
    rows = both(str(tmp_path / "d"))
    assert ids(rows) == [[1, ONE, 2], [1, ONE, TWO, 2], [1, TWO, 2]]
    assert rows.report.empty_files == 3
    write("d/about.json", '{\n "name": "d"\n}')
    with pytest.warns(UserWarning, match="about.json"):
        assert ids(both(str(tmp_path / "d" / "*"))) == ids(rows)
    for name in ("c.jsonl", "none.parquet"):
        with pytest.raises(RunError, match=f"{name}: .*empty"):
            both(str(tmp_path / "d" / name))


@pytest.mark.parametrize("kind", ["torch", "numpy", "pandas", "arrow"])
def test_saved_datasets_with_a_format(tmp_path: Path, kind: str) -> None:
    import datasets

    row = {
        "input_ids": [1, ONE, TWO, 0],
        "attention_mask": [1, 1, 1, 0],
        "labels": [-100, -100, TWO, -100],
        "tools": [{"name": "f"}],
    }
    datasets.Dataset.from_list([row]).with_format(kind, columns=["input_ids"]).save_to_disk(tmp_path / "d")
    assert fields(tmp_path / "d") == [row]


def test_a_saved_dataset_of_no_rows(tmp_path: Path) -> None:
    import datasets

    datasets.Dataset.from_dict({"text": []}).save_to_disk(tmp_path / "d")
    with pytest.raises(RunError, match="d: .*empty"):
        open_source(str(tmp_path / "d"))


def test_saved_datasets(tmp_path: Path) -> None:
    import datasets

    rows = datasets.Dataset.from_list([{"text": "one", "id": 1}, {"text": "two", "id": 2}])
    rows.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=rows, test=rows.select([1])).save_to_disk(tmp_path / "both")
    assert ids(both(str(tmp_path / "one"))) == ids(both(str(tmp_path / "both"))) == [[1, ONE, 2], [1, TWO, 2]]
    assert ids(both(str(tmp_path / "both" / "test"))) == [[1, TWO, 2]]


def test_a_file_in_two_sources_is_refused(write, tmp_path: Path) -> None:
    path = write("d/a.jsonl", ROWS)
    for sources in ([path, path], [path, f"{tmp_path}/d"], {path: 1, f"{tmp_path}/d/*.jsonl": 2}):
        with pytest.raises(UsageError, match="^data.train.*a.jsonl"):
            prepare(sources, word_tokenizer(), max_length=16)
