# SPDX-License-Identifier: Apache-2.0
"""Streaming: the rows that reading all of them gives, from any position on, and no more of them than are needed."""

from __future__ import annotations

import io
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from resume_runs import checkpoints, fit
from toy_tokenizers import word_tokenizer

from mtp_lightning.data import MTPDataModule, streaming
from mtp_lightning.data.documents import Encoder
from mtp_lightning.data.preparing import Prepared, prepare
from mtp_lightning.data.streaming import RowStream
from mtp_lightning.errors import RunError

WORDS = "one two three four five six".split()


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "READ_ROWS", 8)


def texts(number: int, first: int = 0) -> list[dict]:
    return [
        {"text": " ".join(WORDS[(row // 6**place) % 6] for place in range(3 + row % 4))}
        for row in range(first, first + number)
    ]


def stream(sources, **options) -> RowStream:
    return RowStream(sources, Encoder(word_tokenizer(), max_length=16), **options)


def ids(prepared: Prepared) -> list[list[int]]:
    return [prepared.rows.row(number).input_ids.tolist() for number in range(len(prepared.rows))]


@pytest.fixture
def folder(write, tmp_path: Path) -> str:
    """Two JSONL files, a Parquet file, and two texts: 11 + 9 + 10 + 3 rows, one of them unusable, one cut."""
    write("d/a.jsonl", [*texts(10), {"text": ""}])
    write("d/b.jsonl", texts(9, 10))
    pq.write_table(pa.table({"text": [row["text"] for row in texts(10, 19)]}), tmp_path / "d" / "c.parquet")
    write("d/d.txt", "one one<|endoftext|>" + "two " * 20)
    write("d/e.txt", "six six")
    return str(tmp_path / "d")


def test_a_cycle_holds_what_reading_everything_holds(folder: str) -> None:
    everything = prepare(folder, word_tokenizer(), max_length=16)[0]
    documents = sorted(ids(everything))
    assert len(documents) == 33  # 31 whole ones, and one in two pieces
    endless = stream(folder)
    first, second = endless.take(33), endless.take(33)
    assert ids(first) == ids(second) and sorted(ids(first)) == documents
    report, other = first.report, everything.report
    assert (report.rows_read, report.skipped, report.cut) == (33, {"shorter than two tokens": 1}, 1)
    assert (report.tokens, report.eligible_starts) == (other.tokens, other.eligible_starts)
    parts = stream(folder)
    reports = [parts.take(3).report for _ in range(11)]  # 8 rows are read together: some are used in the next epoch
    assert [sum(r.rows_read for r in reports), sum(r.cut for r in reports)] == [33, 1]

    packed = stream(folder, packing=True).take(12).rows
    assert packed.lengths.max() <= 16 and max(len(packed.documents_of(row)) for row in range(12)) > 1
    for row in map(packed.row, range(12)):
        for document in range(int(row.document_ids.max()) + 1):
            assert row.input_ids[row.document_ids == document].tolist() in documents


@pytest.mark.parametrize(("kind", "packing"), [("folder", False), ("list", True), ("mix", False)])
def test_resume_from_any_position(folder: str, write, kind: str, packing: bool) -> None:
    """Amounts that end in the middle of batches, files and cycles; positions are what a checkpoint can keep."""
    other = write("f.jsonl", texts(5, 100))
    sources = {"folder": folder, "list": [other, folder], "mix": {folder: 3, other: 1}}[kind]
    amounts = [1, 13, 20, 5]
    whole, states, expected = stream(sources, packing=packing), [], []
    for amount in amounts:
        kept = io.BytesIO()
        torch.save(whole.state(), kept)
        states.append(kept)
        expected.append(ids(whole.take(amount)))
    assert len({tuple(map(tuple, rows)) for rows in expected}) == 4
    for place, kept in enumerate(states):
        kept.seek(0)
        resumed = stream(sources, packing=packing)
        resumed.load(torch.load(kept, weights_only=True))
        assert [ids(resumed.take(amount)) for amount in amounts[place:]] == expected[place:], place


def test_other_sources_than_at_the_checkpoint_are_refused(folder: str, write) -> None:
    """The position counts sources, and files in each."""
    other = write("f.jsonl", texts(5, 100))
    state = stream([folder, other]).state()
    with pytest.raises(RunError, match="^data.train had 2 sources at the checkpoint and has 1 now"):
        stream(folder).load(state)
    write("d/0.jsonl", texts(3))
    with pytest.raises(RunError, match=f"^{folder} had 5 files at the checkpoint and has 6 now"):
        stream([folder, other]).load(state)


def test_sources_one_after_another(write) -> None:
    a, b = write("a.jsonl", texts(10)), write("b.jsonl", texts(4, 50))
    found = ids(stream([a, b]).take(28))
    both = ids(prepare(a, word_tokenizer(), max_length=16)[0]) + ids(prepare(b, word_tokenizer(), max_length=16)[0])
    assert found == both + both


@pytest.mark.parametrize(
    "files",
    [
        [texts(5), []],
        [[], texts(5)],
        [texts(8)],  # the rows of one read
        [texts(8), [], [], texts(16)],
        [[*texts(8), {"text": ""}]],  # the last read has no usable row
        [texts(3), [{"text": ""}] * 20],
    ],
)
def test_a_read_without_rows_does_not_end_the_stream(write, tmp_path: Path, files: list[list[dict]]) -> None:
    for number, rows in enumerate(files):
        write(f"s/{number}.jsonl", rows)
    expected = ids(prepare(str(tmp_path / "s"), word_tokenizer(), max_length=16)[0])
    endless = stream(str(tmp_path / "s"))
    for _ in range(4):
        assert ids(endless.take(len(expected))) == expected


@pytest.mark.parametrize("mix", [False, True])
def test_a_stream_without_rows_ends(write, monkeypatch: pytest.MonkeyPatch, mix: bool) -> None:
    empty = datasets.IterableDataset.from_generator(lambda: iter(()))
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: empty)
    sources = {"owner/name": 1, write("a.jsonl", texts(20)): 1} if mix else "owner/name"
    with pytest.raises(RunError, match="data.train: .*owner/name"):
        stream(sources).take(100)


def test_a_hub_stream_that_fails_names_the_row(monkeypatch: pytest.MonkeyPatch, write) -> None:
    shards = [write("a.jsonl", texts(3)), write("b.jsonl", [{**row, "id": "a"} for row in texts(3)])]
    opened = datasets.load_dataset("json", data_files=shards, split="train", streaming=True)
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: opened)
    with pytest.raises(RunError, match="owner/name, after row 3: .*cast"):
        stream("owner/name").take(9)


def test_a_mix_has_its_shares(write) -> None:
    a = write("a.jsonl", [{"input_ids": [9, 9]}] * 30)
    b = write("b.jsonl", [{"input_ids": [8, 8]}] * 3)  # it begins again and again
    rows = ids(stream({a: 0.7, b: 0.3}).take(80))
    # To within what is still to be made up where the short source began again.
    assert abs(rows.count([9, 9]) - 56) <= 2 and rows.count([8, 8]) + rows.count([9, 9]) == 80


def test_no_more_is_read_than_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    read = []

    def rows():
        for number in range(10**9):
            read.append(number)
            yield {"input_ids": [number % 17, 1, 2]}

    def load_dataset(name: str, config: str | None, split: str, streaming: bool) -> datasets.IterableDataset:
        assert (name, config, split, streaming) == ("owner/name", "c", "train", True)
        return datasets.IterableDataset.from_generator(rows)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    found = stream("owner/name/c:train")
    assert read == []
    assert [row[0] for row in ids(found.take(20))] == [number % 17 for number in range(20)]
    assert len(read) <= 24 + 1


@pytest.mark.parametrize(
    ("rows", "named"),
    [
        ('{"text": "one"}\n{"text": 5}\n', "a.jsonl, line 2: text .* int"),
        ('{"text": "one"}\n{"text": "two"\n', "a.jsonl, line 2: expected JSON"),
        ('{"text": ""}\n' * 20, "data.train: none of the last 20 rows"),
        ('{"text": "one"}\n{"text": "\xff"}\n', "a.jsonl, line 2: .*UTF-8"),
    ],
)
def test_rejected_rows_are_named(tmp_path: Path, rows: str, named: str) -> None:
    (tmp_path / "a.jsonl").write_text(rows, encoding="latin-1")
    with pytest.raises(RunError, match=named):
        stream(str(tmp_path / "a.jsonl")).take(3)


@pytest.mark.filterwarnings("ignore")  # of Lightning's, about small machines and few batches
@pytest.mark.parametrize(("workers", "steps"), [(0, (2, 5)), (2, (3,))])
def test_fit_and_resume(tmp_path: Path, folder: str, workers: int, steps: tuple[int, ...], capsys) -> None:
    """Three epochs of 10 rows in two steps each, resumed at the end and in the middle: the same rows, starts and counts."""
    arguments = {"train": folder, "max_length": 16, "batch_size": 3, "block_fraction": 0.5, "streaming_rows": 10}
    arguments |= {"validation": folder, "num_workers": workers}
    options = {"accumulate_grad_batches": 2}
    whole = fit(tmp_path, MTPDataModule(**arguments), save=True, **options)
    assert [seen[0] for seen in whole.seen] == [0] * 4 + [1] * 4 + [2] * 4
    assert sorted(number for seen in whole.seen[:4] for number in seen[1]) == list(range(10))
    assert "data.train, epoch 2: " in capsys.readouterr().err
    saved = checkpoints(tmp_path)
    for step in steps:
        resumed = fit(tmp_path, MTPDataModule(**arguments), ckpt_path=str(saved[step - 1]), **options)
        assert resumed.seen == whole.seen[2 * step :], step
