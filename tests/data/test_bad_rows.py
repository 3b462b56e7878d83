# SPDX-License-Identifier: Apache-2.0
"""Bad rows and bad disks: each ends in one line that names the row or the folder, or is counted, as docs/data.md says."""

from __future__ import annotations

import json
import re
import subprocess
import time
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from toy_tokenizers import word_tokenizer

from mtp_lightning.data.preparing import Prepared, prepare
from mtp_lightning.errors import RunError


def says(role: str, content: object) -> dict:
    return {"role": role, "content": content}


GOOD = {"messages": [says("user", "one"), says("assistant", "two")]}


def lines(*rows: dict) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def read(folder: Path, data: bytes, name: str = "a.jsonl") -> Prepared:
    (folder / name).write_bytes(data)
    return prepare(str(folder / name), word_tokenizer(), max_length=64)[0]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'{"text": "one"}\n{"text": "\xff\xfe"}\n', ", row 2: expected UTF-8 text, 'utf-8' codec can't decode byte 0xff"),
        (b'{"text": "fin\xe9"}\n', ", row 1: expected UTF-8 text, 'utf-8' codec can't decode byte 0xe9 in position 3"),
        (lines(GOOD) + lines(GOOD).replace(b"one", b"\xff"), ", row 2: expected UTF-8 text, 'utf-8' codec can't decode"),
        (lines({"text": "one"}, {"text": 5}), ", row 2: text must be text, got int."),
        (lines({"text": {"a": 1}}), ", row 1: text must be text, got dict."),
        (lines(GOOD, {"messages": "x"}), ", row 2: messages must be a list of {role, content}, got 'x'."),
        (lines(GOOD, {"messages": []}), ", row 2: messages must be a list of {role, content}, got []."),
        (
            lines(GOOD, {"messages": [says("user", 5)]}),
            ", row 2: content of a message must be text, got int: {'role': ",
        ),
        (lines(GOOD, {"messages": [says("gtp4", "x")]}), ", row 2: message 1 has the role 'gtp4', which the chat"),
        (lines(GOOD, {"messages": [says("user", None)]}), ", row 2: each of messages must be {role, content}, got {'role'"),
        (
            lines(GOOD, {"messages": [says("user", None) | {"name": "a"}, says("assistant", "two")]}),
            ", row 2: each of messages must be {role, content}, got {'role': 'user', 'content': None, 'name': 'a'}.",
        ),
        (
            lines({"messages": [says("user", [{"type": "image", "url": "a.png"}]), says("assistant", "two")]}),
            ", row 1: content of a message must be text or parts of text, got a part {'type': 'image', 'url': 'a.png'}.",
        ),
        (lines({"text": "one", "domain": 3}), ", row 1: domain must be text, got int."),
        (lines({"input_ids": [9, 10]}, {"input_ids": [9], "domain": [1]}), ", row 2: domain must be text, got list."),
        (lines({"input_ids": ["a"]}), ": input_ids must be lists of token ids, got list<item: string>."),
        (lines({"input_ids": [1.5, 2]}), ": input_ids must be lists of token ids, got list<item: double>."),
        (
            lines({"prompt": "one", "completion": None}),
            ", row 1: expected messages | prompt + completion (or completion",
        ),
        (
            b'{"text": "one"}\n\0\0\n',
            ", line 2: expected JSON, got Expecting value at column 1. Correct or delete",
        ),
        (
            b'{"text": "one", "n": ' + b"9" * 5_000 + b'}\n{"text": \n',  # Arrow takes the number, and fails at line 2
            ", line 1: expected numbers of at most 4300 digits, got one of 5000. Correct or delete the line.",
        ),
        (b'{"text": "one"}\n{"n": ' + b"[" * 100_000, ", line 2: expected JSON, got brackets in one another without end."),
        (b'{"text": "\\ud800"}\n', ": expected a .jsonl file, it cannot be read: JSON parse error: The surrogate pair"),
    ],
)
def test_rows_that_are_refused(tmp_path: Path, data: bytes, message: str) -> None:
    with pytest.raises(RunError, match="^" + re.escape(f"{tmp_path / 'a.jsonl'}{message}")):
        read(tmp_path, data)


def test_a_number_without_end_in_other_files(tmp_path: Path) -> None:
    nines = "9" * 5_000
    data = f'[{{"text": "{nines} \\""}},\n\n {{"text": "two", "n": -{nines}1}}]'  # digits of a text are no number
    with pytest.raises(RunError, match="a.json, line 3: expected numbers of at most 4300 digits, got one of 5001. Correct"):
        read(tmp_path, data.encode(), "a.json")
    data = f"[0.{nines}, 1e{nines}, {nines}.5,\n{nines}1]"  # those with a point or an exponent are read
    with pytest.raises(RunError, match="a.json, line 2: expected numbers of at most 4300 digits, got one of 5001. Correct"):
        read(tmp_path, data.encode(), "a.json")
    with pytest.raises(RunError, match="a.json: expected JSON, got brackets in one another without end. Correct or delete"):
        read(tmp_path, b'[{"text": "one"},\n' + b"[" * 100_000, "a.json")


def test_text_that_is_no_utf_8_in_other_files(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"a.json: expected a .json file, it cannot be read: Invalid octet in UTF-8"):
        read(tmp_path, b'[{"text": "fin\xe9"}]', "a.json")
    column = pa.array([b"one", b"\xff"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    with pytest.raises(RunError, match="a.parquet, row 2: expected UTF-8 text, 'utf-8' codec can't decode byte 0xff"):
        prepare(str(tmp_path / "a.parquet"), word_tokenizer(), max_length=64)


def test_rows_of_nothing_but_ids(tmp_path: Path) -> None:
    row = read(tmp_path, lines({"prompt_ids": [9, 10], "completion_ids": [11, 4]})).rows.row(0)
    assert row.input_ids.tolist() == [9, 10, 11, 4] and row.labels.tolist() == [-100, -100, 11, 4]


def test_rows_that_are_counted(tmp_path: Path) -> None:
    rows = [
        GOOD,
        {"messages": [says("user", "one")]},  # nobody answers
        {"messages": [says("user", "one " * 80), says("assistant", "two")]},  # the answer is past max_length
        {"messages": [says("user", ""), says("assistant", "")]},  # empty: the end of the turn carries loss
    ]
    report = read(tmp_path, lines(*rows)).report
    assert (report.rows_read, report.documents, report.truncated) == (4, 2, 0)
    assert report.skipped == {"no token with loss after the first": 2} and report.loss_tokens == 2 + 1
    assert "4 rows read, 2 left out (no token with loss after the first), " in str(report)


def test_a_row_of_a_million_tokens(tmp_path: Path) -> None:
    begin = time.monotonic()
    text = read(tmp_path, lines({"text": "one " * 1_000_000}, {"text": "two"})).report
    assert (text.cut, text.documents, text.tokens) == (1, 15_627, 1_000_005)
    chat = read(
        tmp_path, lines({"messages": [says("user", "one"), says("assistant", "two " * 1_000_000)]}), "b.jsonl"
    ).report
    assert (chat.truncated, chat.documents, chat.tokens) == (1, 1, 64)
    assert time.monotonic() - begin < 60  # seconds, on a busy machine: nothing grows with the square of the length


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Below a file nobody can make a folder, root neither."""
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "file" / "cache")
    with pytest.raises(RunError) as error:
        read(tmp_path, lines(GOOD))
    assert str(error.value) == (
        f"the data cache {tmp_path}/file/cache can't be written: [Errno 20] Not a directory:"
        f" '{tmp_path}/file/cache/mtp_lightning'. Make it a folder that can be written, or set HF_DATASETS_CACHE to another"
        " one."
    )


@pytest.fixture
def mounted(tmp_path: Path):
    """Mounts a small file system and gives its folder."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)], capture_output=True)
    if done.returncode:
        pytest.skip(f"mounting a small file system is not allowed here: {done.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_cache_that_is_read_only(tmp_path: Path, mounted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(mounted)], check=True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", mounted)
    with pytest.raises(RunError, match=r"the data cache .*disk can't be written: \[Errno 30\] Read-only file system"):
        read(tmp_path, lines(GOOD))


@pytest.mark.parametrize("fills", ["reading", "encoding"])
def test_a_disk_that_fills(tmp_path: Path, mounted: Path, monkeypatch: pytest.MonkeyPatch, fills: str) -> None:
    """The cache's disk holds 8 MiB: it fills while the rows are read, or while they are encoded."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", mounted)
    monkeypatch.setattr("datasets.builder.has_sufficient_disk_space", lambda *arguments, **options: True)
    rows, times = (3_000, 50) if fills == "reading" else (55_000, 1)
    data = lines(*[{"text": "one two three four five six one two three four five six " * times}] * rows)
    message = r"the data cache .*disk can't be written: .*No space left on device.*Make room there"
    with pytest.raises(RunError, match=message):
        read(tmp_path, data)
    if fills == "encoding":  # the rows are there, and nothing half-written that the next run would find
        assert [file for file in mounted.rglob("*.arrow") if "mtp_lightning" not in file.parts]
        assert not list((mounted / "mtp_lightning").glob("*.arrow"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "roomy")
    assert read(tmp_path, data).report.rows_read == rows
