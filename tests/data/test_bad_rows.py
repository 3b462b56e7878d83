# SPDX-License-Identifier: Apache-2.0
"""Bad rows and bad disks: each gives one line that names the row or the folder, or is counted, as docs/data.md says."""

from __future__ import annotations

import json
import re
import subprocess
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


NINES = b"9" * 5_000  # Python reads no number of so many digits


@pytest.mark.parametrize(
    ("data", "named"),
    [
        (b"", ": .* is empty"),
        (b'{"text": "one"}\n{"text": "\xff\xfe"}\n', ", row 2: .* UTF-8"),
        (b'{"text": "one"}\n\0\0\n', ", line 2: expected JSON"),
        (b'{"text": "one"}\n\n{"text": "two"\n{"text": "three"}\n', ", line 3: expected JSON"),
        (b'{"text": "one"}\n{"n": ' + b"[" * 100_000, ", line 2: expected JSON"),
        (b'{"text": "one", "n": ' + NINES + b'}\n{"text": \n', ", line 1: .* digits"),  # Arrow fails at line 2
        (b'{"text": "\\ud800"}\n', ": .*surrogate"),
        (b'{"text": "one"}\n[1, 2]\n', ", line 2: .* got list"),
        (lines({"question": "one", "answer": "two"}), ": .* got the fields question, answer"),
        (lines({"text": "one"}, {"text": None}), ", row 2: .* no field"),
        (lines({"text": "one"}, {"text": 5}), ", row 2: text .* got int"),
        (lines({"text": "one", "domain": 3}), ", row 1: domain .* got int"),
        (lines(GOOD, {"messages": "x"}), ", row 2: messages "),
        (lines(GOOD, {"messages": [says("gtp4", "x")]}), ", row 2: message 1 .*'gtp4'"),
        (lines({"messages": [{"role": 3, "content": "x"}]}), ", row 1: .*'role': 3"),
        (lines({"messages": [{"from": "gpt", "value": "x"}]}), ", row 1: .*messages .*'from'"),
        (lines({"messages": [says("user", [{"type": "image", "url": "a.png"}])]}), ", row 1: content .*'image'"),
        (lines({"prompt": "one", "completion": None}), ", row 1: expected messages .* got prompt"),
        (lines({"prompt": "one", "completion": ["two"]}), ", row 1: completion .* list"),
        (lines({"prompt": "one", "completion_ids": ["two"]}), ", row 1: completion_ids .*'two'"),
        (lines({"input_ids": [9, 10]}, {"input_ids": [9], "domain": [1]}), ", row 2: domain .* got list"),
        (lines({"input_ids": [1, 2]}, {"input_ids": None}), ", row 2: .* input_ids"),
        (lines({"input_ids": ["a", "b"]}), ": input_ids .* string"),
        (lines({"input_ids": [1, 2]}, {"input_ids": [3, 17]}), ", row 2: .* 16, .* 17"),
        (lines({"input_ids": [1], "labels": [1]}, {"input_ids": [5], "labels": [6]}), ", row 2: .* 6 at position 0"),
        (lines({"input_ids": [1, 2], "labels": [1]}), ", row 1: labels .* input_ids"),
        # With a field of another type the rows are encoded one by one.
        (lines({"text": "one"}, {"input_ids": [1, 2], "labels": [1]}), ", row 2: labels .* input_ids .* got 1"),
        (lines({"text": "one"}, {"input_ids": [1, 2], "labels": [2, 2]}), ", row 2: labels .* 2 at position 0 .* shift"),
    ],
)
def test_rejected_rows_are_named(tmp_path: Path, data: bytes, named: str, caplog) -> None:
    with pytest.raises(RunError, match="^" + re.escape(str(tmp_path / "a.jsonl")) + named):
        read(tmp_path, data)
    assert caplog.records == []  # datasets would log a second line


@pytest.mark.parametrize(
    ("name", "data", "named"),
    [
        ("a.txt", b"<|endoftext|>", ": .* is empty"),
        ("a.txt", b"\xff\xfe\xff", ": .*UTF-8"),
        ("a.parquet", b"not a table", ": it cannot be read: "),
        ("a.json", b'[\n  {"text": "one"},\n  {"text": two}\n]\n', ", line 3: expected JSON"),
        ("a.json", b'[{"text": "' + NINES + b' \\""},\n\n {"text": "two", "n": -' + NINES + b"}]", ": .* digits"),
        ("a.json", b'[{"text": "one"},\n' + b"[" * 100_000, ": expected JSON"),
        ("a.json", b'[{"text": "fin\xe9"}]', ".*UTF-8"),
    ],
)
def test_rejected_files_are_named(tmp_path: Path, name: str, data: bytes, named: str) -> None:
    with pytest.raises(RunError, match="^" + re.escape(str(tmp_path / name)) + named):
        read(tmp_path, data, name)


def test_parquet_that_is_not_utf_8(tmp_path: Path) -> None:
    text = pa.array([b"one", b"\xff"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": text}), tmp_path / "a.parquet")
    with pytest.raises(RunError, match="a.parquet, row 2: .*UTF-8"):
        prepare(str(tmp_path / "a.parquet"), word_tokenizer(), max_length=64)


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Below a file not even root can create a folder."""
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "file" / "cache")
    with pytest.raises(RunError, match=f"the data cache {tmp_path}/file/cache .* HF_DATASETS_CACHE"):
        read(tmp_path, lines(GOOD))


@pytest.fixture
def small_disk(tmp_path: Path):
    """A mounted file system of 2 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)], capture_output=True)
    if mount.returncode:
        pytest.skip(f"mounting a small file system is not allowed here: {mount.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_that_fills(tmp_path: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache's disk fills while the rows are encoded."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", small_disk)
    monkeypatch.setattr("datasets.builder.has_sufficient_disk_space", lambda *arguments, **options: True)
    data = lines(*[{"text": "one two three four five six one two three four five six "}] * 13_000)
    with pytest.raises(RunError, match=f"the data cache {small_disk} .*No space left on device"):
        read(tmp_path, data)
    # The rows are there, and nothing half-written that the next run would find.
    assert [file for file in small_disk.rglob("*.arrow") if "mtp_lightning" not in file.parts]
    assert not list((small_disk / "mtp_lightning").glob("*.arrow"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "large")
    assert read(tmp_path, data).report.rows_read == 13_000
