# SPDX-License-Identifier: Apache-2.0
"""Preparing: rows and their report by hand, mixes, held-out rows, the cache of encoded rows, and rows that are refused."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from toy_tokenizers import texts, word_tokenizer

from mtp_lightning.data import documents
from mtp_lightning.data.preparing import prepare
from mtp_lightning.errors import RunError, UsageError


def test_report_by_hand(write, tokenizer) -> None:
    path = write(
        "a.jsonl",
        [
            {"text": "one two"},  # <bos> one two <eos>: 4 tokens
            {"text": "one two three four five"},  # 7 tokens: 5 and 2
            {"text": "one two three four"},  # 6 tokens: 5, and <eos> alone would predict nothing
            {"text": ""},
            {"prompt": "one ", "completion": "two three four five"},  # 2 + 5 tokens: the last 2 are dropped, 3 carry loss
            {"prompt": "one two three four ", "completion": "five"},  # 5 + 2 tokens: nothing of the answer is left
            {"input_ids": [9, 10, 11], "labels": [-100, 10, -100]},
            {"input_ids": [9, 10, 11, 12, 13, 14], "labels": [-100] * 6},
        ],
    )
    rows, _ = prepare(path, tokenizer, max_length=5)
    assert asdict(rows.report) == {
        "rows_read": 8,
        "skipped": {
            "shorter than two tokens": 1,
            "no token with loss after the first": 1,
            "with a prompt that alone fills data.max_length: raise it": 1,
        },
        "cut": 2,
        "truncated": 1,
        "tokens_lost": 6,
        "documents": 6,
        "rows": 6,
        "tokens": 4 + 5 + 2 + 5 + 5 + 3,
        "loss_tokens": 4 + 5 + 2 + 5 + 3 + 1,
        "eligible_starts": 3 + 4 + 1 + 4 + 3 + 1,
        "padding_share": 0.0,
        "empty_files": 0,
        "examples": [],
        "plain_source": path,
    }
    line, unusual = str(rows.report).splitlines()
    assert path in unusual  # the tokenizer has a chat template
    assert line == (
        "8 rows read, 1 left out (shorter than two tokens), 1 left out (no token with loss after the first),"
        " 1 left out (with a prompt that alone fills data.max_length: raise it),"
        " 2 cut into pieces, 1 truncated, 6 tokens lost; 6 documents in 6 rows an epoch, 24 tokens, 16 eligible starts,"
        " 0.0% padding"
    )
    assert [rows.rows.row(number).input_ids.tolist() for number in range(6)] == [
        [1, 9, 10, 2],
        [1, 9, 10, 11, 12],
        [13, 2],
        [1, 9, 10, 11, 12],
        [1, 9, 10, 11, 12],
        [9, 10, 11],
    ]
    assert rows.rows.row(4).labels.tolist() == [-100, -100, 10, 11, 12]


def test_rows_of_plain_text_are_named_where_a_chat_template_is(write, tokenizer) -> None:
    plain = word_tokenizer()
    plain.chat_template = None
    chat = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
    text, completion = {"text": "one two"}, {"prompt": "one ", "completion": "two"}
    ids = {**completion, "prompt_ids": [1, 9], "completion_ids": [10]}
    for number, (row, used, is_plain) in enumerate(
        ((text, tokenizer, True), (completion, tokenizer, True), (text, plain, False), (ids, tokenizer, False))
        + (({"messages": chat}, tokenizer, False), ({"input_ids": [9, 10]}, tokenizer, False))
    ):
        path = write(f"{number}.jsonl", [row])
        assert prepare(path, used, max_length=32)[0].report.plain_source == (path if is_plain else None)
    assert prepare(path, tokenizer, max_length=32, name="data.validation")[0].report.plain_source is None


def test_token_columns_give_the_same_rows(write, tmp_path: Path, tokenizer) -> None:
    generator = np.random.default_rng(0)
    ids = [generator.integers(0, 17, length).tolist() for length in (0, 1, 2, 7, 8, 9, 16, 17, 30)]
    labels = [[token if generator.random() < 0.5 else -100 for token in row] for row in ids]
    for columns in ({"input_ids": ids}, {"input_ids": ids, "labels": labels, "domain": ["d"] * len(ids)}):
        table = {
            name: pa.array(values, pa.list_(pa.int32())) if name != "domain" else values for name, values in columns.items()
        }
        pq.write_table(pa.table(table), tmp_path / "fast.parquet")
        pq.write_table(pa.table(table | {"text": pa.nulls(len(ids), pa.string())}), tmp_path / "slow.parquet")
        fast, slow = (prepare(str(tmp_path / f"{name}.parquet"), tokenizer, max_length=8)[0] for name in ("fast", "slow"))
        assert fast.report == slow.report and fast.report.skipped and fast.report.cut + fast.report.truncated == 4
        for number in range(fast.report.rows):
            a, b = fast.rows.row(number), slow.rows.row(number)
            assert torch.equal(a.input_ids, b.input_ids) and torch.equal(a.labels, b.labels) and a.domain == b.domain


def test_no_usable_row(write, tokenizer) -> None:
    path = write("a.jsonl", [{"text": ""}, {"text": ""}, {"prompt": "one two three ", "completion": "four"}])
    with pytest.raises(
        RunError, match="^data.validation: none of the 3 rows .*: 2 shorter .*, 1 with a prompt .* data.max_length: raise it"
    ):
        prepare(path, tokenizer, max_length=3, name="data.validation")


def test_encoding_is_cached_by_content_and_settings(write, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    real = documents.encode_row
    monkeypatch.setattr(documents, "encode_row", lambda *arguments: calls.append(1) or real(*arguments))

    def encodes(**options) -> int:
        calls.clear()
        prepare(path, options.pop("tokenizer", word_tokenizer()), **({"max_length": 8} | options))
        return len(calls)

    path = write("cached.jsonl", texts(5))
    assert encodes() == 5
    assert encodes() == 0  # another tokenizer object, the same tokenizer
    assert encodes(packing=True, seed=3, held_out=0.4) == 0  # what is made of documents later
    assert encodes(max_length=9) == 5
    assert encodes(chat_template="x") == 5
    assert encodes(tokenizer=word_tokenizer(bos=False)) == encodes(tokenizer=word_tokenizer(eos=False)) == 5
    other = word_tokenizer()
    other.chat_template = "y"
    assert encodes(tokenizer=other) == 5
    used = word_tokenizer()
    used("one", truncation=True, max_length=1)
    assert encodes(tokenizer=used) == 0
    write("cached.jsonl", texts(6))
    assert encodes() == 6


def test_tokens_that_the_base_has_no_embedding_for(write, tokenizer) -> None:
    path = write("a.jsonl", [{"text": "one"}, {"text": "one six"}])
    assert prepare(path, tokenizer, max_length=8, vocab_size=15)[0].report.rows == 2
    with pytest.raises(RunError, match="a.jsonl, line 2: .* 0 to 13, .* 14"):
        prepare(path, tokenizer, max_length=8, vocab_size=14)


def test_several_processes_give_the_same_documents(write, tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "_BATCH_ROWS", 3)
    monkeypatch.setattr(documents, "_PARALLEL_FROM", 1)
    rows = [*texts(20), {"text": ""}]
    alone = prepare(write("a.jsonl", rows), tokenizer, max_length=6)[0]
    several = prepare(write("b.jsonl", rows), tokenizer, max_length=6, workers=2)[0]
    assert replace(several.report, plain_source=alone.report.plain_source) == alone.report
    for number in range(len(alone.rows)):
        assert torch.equal(several.rows.row(number).input_ids, alone.rows.row(number).input_ids)
    with pytest.raises(RunError, match="c.jsonl, line 21: text "):
        prepare(write("c.jsonl", [*rows[:20], {"text": 5}]), tokenizer, max_length=6, workers=2)


def test_list_and_mix(write, tokenizer) -> None:
    a = write("a.jsonl", [{"input_ids": [5, 6, 7]}] * 4)
    b = write("b.jsonl", [{"input_ids": [8, 9]}] * 2)
    both, _ = prepare([a, b], tokenizer, max_length=8)
    assert both.rows.lengths.tolist() == [3, 3, 3, 3, 2, 2]
    mixed, _ = prepare({a: 1, b: 3}, tokenizer, max_length=8)
    assert sorted(mixed.rows.lengths.tolist()) == [2] * 12 + [3] * 4
    assert (mixed.report.rows, mixed.report.documents, mixed.report.tokens) == (16, 6, 36)
    text = write("c.txt", "one two")
    assert prepare({a: 1, text: 1}, tokenizer, max_length=8)[0].report.rows == 8  # sources of different kinds


def test_wrong_sources(write, tokenizer) -> None:
    a, b = write("a.jsonl", [{"text": "one"}]), write("b.jsonl", [{"text": ""}])
    for sources, error, named in (
        ([], UsageError, "at least one source"),
        ({"a.jsonl": 0.0}, UsageError, "weight of a.jsonl .* 0.0"),
        ({a: 1, b: 1}, RunError, "none of the rows of .*b.jsonl"),
    ):
        with pytest.raises(error, match=f"^data.train.* {named}"):
            prepare(sources, tokenizer, max_length=8)


def test_max_rows_spreads_over_the_sources(write, tokenizer) -> None:
    a = write("a.jsonl", [{"input_ids": [row, 16]} for row in range(10)])
    b = write("b.jsonl", [{"input_ids": [row, 15]} for row in range(10)])

    def firsts(sources, max_rows: int) -> list[list[int]]:
        rows = prepare(sources, tokenizer, max_length=8, max_rows=max_rows)[0].rows
        return [rows.row(number).input_ids.tolist() for number in range(len(rows))]

    assert firsts([a, b], 4) == [[0, 16], [5, 16], [0, 15], [5, 15]]
    assert firsts(a, 3) == [[0, 16], [3, 16], [6, 16]]
    assert len(firsts([a, b], 100)) == 20
    assert sorted(row[1] for row in firsts({a: 3, b: 1}, 4)) == [15, 16, 16, 16]


def test_held_out_rows(write, tokenizer) -> None:
    path = write("a.jsonl", [{"input_ids": [row % 17, row // 17] * (8 if row % 2 else 2)} for row in range(40)])

    def sides(**options) -> tuple[list[tuple], list[tuple]]:
        prepared = prepare(path, tokenizer, max_length=8, held_out=0.25, **options)
        return tuple([tuple(side.rows.row(n).input_ids.tolist()[:2]) for n in range(len(side.rows))] for side in prepared)

    train, apart = sides()
    assert not set(train) & set(apart)  # rows are held out whole: the pieces of one text are on one side
    assert len(set(train)) == 30 and len(set(apart)) == 10
    assert sides(seed=5) == (train, apart)
    assert sides(max_held_out=4)[1] == [apart[number * len(apart) // 4] for number in range(4)]
    for_use, held = prepare(path, tokenizer, max_length=8, held_out=0.25)
    assert (for_use.report.rows_read, held.report.rows_read) == (30, 10)
    assert for_use.report.cut + held.report.cut == 20
    assert for_use.report.tokens + held.report.tokens == 20 * 16 + 20 * 4


def test_holding_out_of_too_few(write, tokenizer) -> None:
    with pytest.raises(RunError, match="^data.train: .*data.validation_fraction"):
        prepare(write("a.jsonl", [{"text": "one"}]), tokenizer, max_length=8, held_out=0.5)
