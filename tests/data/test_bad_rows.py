# SPDX-License-Identifier: Apache-2.0
"""Bad rows and bad disks: each gives one line that names the row or the folder, or is counted, as docs/data.md says."""

from __future__ import annotations

import gzip
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
        (b'{"text": "one"}\n{"text": "\xff\xfe"}\n', ", line 2: .* UTF-8"),
        (b'{"text": "one"}\n\0\0\n', ", line 2: expected JSON"),
        (b'{"text": "one"}\n\n{"text": "two"\n{"text": "three"}\n', ", line 3: expected JSON"),
        (b'{"text": "one"}\n{"n": ' + b"[" * 100_000, ", line 2: expected JSON"),
        (b'{"text": "\\ud800"}\n', ", line 1: .*surrogate"),
        (b'{"text": "one"}\n[1, 2]\n', ", line 2: .* got list"),
        (lines({"q": "one", "a": "two"}), ", line 1: .* got the fields q, a"),
        (lines({"text": "one"}, {"text": 5}), ", line 2: text .* got int"),
        (lines({"text": "one", "domain": 3}), ", line 1: domain .* got 3"),
        (lines(GOOD, {"messages": "x"}), ", line 2: messages "),
        (lines(GOOD, {"messages": [says("gtp4", "x")]}), ", line 2: message 1 .*'gtp4'"),
        (lines({"messages": [{"role": 3, "content": "x"}]}), ", line 1: .*'role': 3"),
        (lines({"messages": [{"speaker": "gpt", "text": "x"}]}), ", line 1: .*messages .*'speaker'"),
        (lines({"messages": [says("user", [{"type": "image", "url": "a.png"}])]}), ", line 1: content .*'image'"),
        (lines({"prompt": "one", "label": "two"}), ", line 1: .*mtp distill.* fields prompt, label"),
        (lines({"prompt": "one", "completion": ["two"]}), ", line 1: completion .* list"),
        (lines({"prompt": "one", "completion_ids": ["two"]}), ", line 1: completion_ids .*'two'"),
        (lines({"input_ids": [9, 10]}, {"input_ids": [9], "domain": [1]}), ", line 2: domain .* got .1."),
        (lines({"input_ids": ["a", "b"]}), ", line 1: input_ids .*'b'"),
        (lines({"input_ids": [[1, 2]]}), ", line 1: input_ids "),
        (lines({"input_ids": [1.0, 2.0]}), ", line 1: input_ids "),
        (lines({"input_ids": [1, 5, 6], "attention_mask": [1, 0, 1]}), ", line 1: attention_mask "),
        (lines({"input_ids": [1, 5], "attention_mask": [1]}), ", line 1: attention_mask .*2"),
        (lines({"input_ids": [1, 5, 6, 1, 5], "position_ids": [0, 1, 2, 0, 1]}), ", line 1: position_ids "),
        (lines({"messages": [says("user", "one"), {**says("assistant", "two"), "weight": 0.5}]}), ", line 1: weight "),
        (lines({"instruction": "one", "output": "two", "history": ["six"]}), ", line 1: history "),
        (lines({"instruction": "one", "output": "two", "history": 6}), ", line 1: history "),
        (lines({"instruction": 5, "output": 3}), ", line 1: instruction.* 5"),
        (lines({"question": "one"}), ", line 1: .*mtp distill"),
        (lines({"text": "one", "domain": "\ud800"}), ", line 1: domain "),
        (lines({"input_ids": [1, 5], "loss_mask": [[1], [0, 1]]}), ", line 1: loss_mask "),
        (lines({**GOOD, "tools": "one"}), ", line 1: tools "),
        (lines({"input_ids": [1, 2]}, {"input_ids": [3, 17]}), ", line 2: .* 16, .* 17"),
        (lines({"input_ids": [1], "labels": [1]}, {"input_ids": [5], "labels": [6]}), ", line 2: .* 6 at position 0"),
        (lines({"input_ids": [1, 2], "labels": [1]}), ", line 1: labels .* input_ids"),
        (lines({"text": "one"}, {"input_ids": [1, 2], "labels": [1]}), ", line 2: labels .* input_ids .* got 1"),
        (lines({"text": "one"}, {"input_ids": [1, 2], "labels": [2, 2]}), ", line 2: labels .* 2 at position 0 .* shift"),
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
        ("a.json", b'[{"text": "one"},\n' + b"[" * 100_000, ", line 2: expected JSON"),
        ("a.json", b'[{"text": "one"},\n{"text": "two"},', ", line 2: expected JSON"),  # cut off
        ("a.jsonl", '{"text": "one"}'.encode("utf-16"), ": .*UTF-16"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "one"}\n' * 1000, mtime=0)[:-20], ": .*ended"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "one"}\n', mtime=0)[:-8] + b"12345678", ": .*CRC"),
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
    data = lines(*[{"text": "one two three four five six one two three four five six "}] * 30_000)
    with pytest.raises(RunError, match=f"the data cache {small_disk} .*No space left on device"):
        read(tmp_path, data)
    # Nothing half-written is left.
    assert not [file for file in small_disk.rglob("*") if file.is_file()]
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "large")
    assert read(tmp_path, data).report.rows_read == 30_000
