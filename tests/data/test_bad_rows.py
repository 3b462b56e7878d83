# SPDX-License-Identifier: Apache-2.0
"""Bad rows and bad disks: each gives one line that names the row or the folder, or is counted, as docs/data.md says."""

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
    ("data", "named"),
    [
        (b'{"text": "one"}\n{"text": "\xff\xfe"}\n', ", row 2: .* UTF-8"),
        (lines({"text": "one"}, {"text": 5}), ", row 2: text .* got int"),
        (lines(GOOD, {"messages": "x"}), ", row 2: messages "),
        (lines(GOOD, {"messages": [says("gtp4", "x")]}), ", row 2: message 1 .*'gtp4'"),
        (lines({"messages": [says("user", [{"type": "image", "url": "a.png"}])]}), ", row 1: content .*'image'"),
        (lines({"text": "one", "domain": 3}), ", row 1: domain .* got int"),
        (lines({"input_ids": [9, 10]}, {"input_ids": [9], "domain": [1]}), ", row 2: domain .* got list"),
        (lines({"prompt": "one", "completion": None}), ", row 1: expected messages .* got prompt"),
        (b'{"text": "one"}\n\0\0\n', ", line 2: expected JSON"),
        (b'{"text": "one", "n": ' + b"9" * 5_000 + b'}\n{"text": \n', ", line 1: .* digits"),  # Arrow fails at line 2
        (b'{"text": "one"}\n{"n": ' + b"[" * 100_000, ", line 2: expected JSON"),
        (b'{"text": "\\ud800"}\n', ": .*surrogate"),
    ],
)
def test_rejected_rows_are_named(tmp_path: Path, data: bytes, named: str) -> None:
    with pytest.raises(RunError, match="^" + re.escape(str(tmp_path / "a.jsonl")) + named):
        read(tmp_path, data)


def test_a_json_array_that_is_not_read(tmp_path: Path) -> None:
    nines = "9" * 5_000
    data = f'[{{"text": "{nines} \\""}},\n\n {{"text": "two", "n": -{nines}1}}]'  # digits inside a text are not a number
    with pytest.raises(RunError, match="a.json: .* digits"):
        read(tmp_path, data.encode(), "a.json")
    with pytest.raises(RunError, match="a.json: expected JSON"):
        read(tmp_path, b'[{"text": "one"},\n' + b"[" * 100_000, "a.json")
    with pytest.raises(RunError, match="a.json: .*UTF-8"):
        read(tmp_path, b'[{"text": "fin\xe9"}]', "a.json")


def test_parquet_that_is_not_utf_8(tmp_path: Path) -> None:
    text = pa.array([b"one", b"\xff"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": text}), tmp_path / "a.parquet")
    with pytest.raises(RunError, match="a.parquet, row 2: .*UTF-8"):
        prepare(str(tmp_path / "a.parquet"), word_tokenizer(), max_length=64)


def test_a_row_of_many_tokens(tmp_path: Path) -> None:
    begin = time.monotonic()
    text = read(tmp_path, lines({"text": "one " * 200_000}, {"text": "two"})).report
    assert (text.cut, text.documents, text.tokens) == (1, 3_127, 200_005)
    messages = [says("user", "one"), says("assistant", "two " * 200_000)]
    chat = read(tmp_path, lines({"messages": messages}), "b.jsonl").report
    assert (chat.truncated, chat.documents, chat.tokens) == (1, 1, 64)
    assert time.monotonic() - begin < 60  # seconds, on a busy machine: nothing grows with the square of the length


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
