# SPDX-License-Identifier: Apache-2.0
"""The data module: preparing, the report, held-out rows, and what a Trainer gets from it, resumed after every step."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import jsonargparse
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import two_processes
from resume_runs import checkpoints, fit, whole_and_resumed
from toy_tokenizers import word_tokenizer

from mtp_lightning.data import MTPDataModule, documents
from mtp_lightning.data.preparing import prepare
from mtp_lightning.errors import RunError, UsageError

WORDS = "one two three four five six".split()


def texts(number: int, words: int = 4) -> list[dict]:
    return [
        {"text": " ".join(WORDS[(row + place) % 6] for place in range(words + row % 3)), "domain": "d"}
        for row in range(number)
    ]


def attach(data: MTPDataModule, **options) -> MTPDataModule:
    """A stand-in for a Trainer: what the data module asks of one."""
    module = SimpleNamespace(tokenizer=word_tokenizer(), num_masks=2, context=options.pop("context", 64))
    defaults = {
        "lightning_module": module,
        "global_rank": 0,
        "world_size": 1,
        "is_global_zero": True,
        "distributed_sampler_kwargs": None,
        "accumulate_grad_batches": 1,
        "limit_train_batches": 1.0,
        "overfit_batches": 0.0,
        "current_epoch": 0,
    }
    data.trainer = SimpleNamespace(**(defaults | options))
    return data


def ready(stage: str = "fit", trainer: dict | None = None, **arguments) -> MTPDataModule:
    data = attach(MTPDataModule(**({"max_length": 16} | arguments)), **(trainer or {}))
    data.setup(stage)
    return data


def row_ids(loader) -> list[int]:
    return [number for batch in loader for number in batch.row_ids.tolist()]


# ---------------------------------------------------------------------------------------------- preparing


def test_report_by_hand(write, tokenizer) -> None:
    path = write(
        "a.jsonl",
        [
            {"text": "one two"},  # <bos> one two <eos>: 4 tokens
            {"text": "one two three four five"},  # 7 tokens: 5 and 2
            {"text": ""},
            {"prompt": "one", "completion": "two three four five"},  # 2 + 5 tokens: the last 2 are dropped, 3 carry loss
            {"prompt": "one two three four", "completion": "five"},  # 5 + 2 tokens: nothing of the answer is left
            {"input_ids": [9, 10, 11], "labels": [-100, 10, -100]},
        ],
    )
    rows, _ = prepare(path, tokenizer, max_length=5)
    assert rows.report.as_dict() == {
        "rows_read": 6,
        "skipped": {"shorter than two tokens": 1, "no token with loss after the first": 1},
        "cut": 1,
        "truncated": 1,
        "tokens_lost": 4,
        "documents": 5,
        "rows": 5,
        "tokens": 4 + 5 + 2 + 5 + 3,
        "loss_tokens": 4 + 5 + 2 + 3 + 1,
        "eligible_starts": 3 + 4 + 1 + 3 + 1,
        "padding_share": 0.0,
    }
    assert str(rows.report) == (
        "6 rows read, 1 left out (shorter than two tokens), 1 left out (no token with loss after the first),"
        " 1 cut into pieces, 1 truncated, 4 tokens lost; 5 documents in 5 rows an epoch, 19 tokens, 12 eligible starts,"
        " 0.0% padding"
    )
    assert [rows.rows.row(number).input_ids.tolist() for number in range(5)] == [
        [1, 9, 10, 2],
        [1, 9, 10, 11, 12],
        [13, 2],
        [1, 9, 10, 11, 12],
        [9, 10, 11],
    ]
    assert rows.rows.row(3).labels.tolist() == [-100, -100, 10, 11, 12]


def test_tokens_take_the_fast_way_to_the_same_rows(write, tmp_path: Path, tokenizer) -> None:
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


def test_tokens_are_encoded_many_at_a_time(tmp_path: Path, tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*arguments: object) -> None:
        raise AssertionError("one row at a time")

    monkeypatch.setattr(documents, "encode_row", never)
    ids = np.random.default_rng(0).integers(0, 17, (20_000, 64)).astype(np.int32)
    pq.write_table(pa.table({"input_ids": list(ids)}), tmp_path / "a.parquet")
    assert prepare(str(tmp_path / "a.parquet"), tokenizer, max_length=64)[0].report.tokens == 20_000 * 64


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"input_ids": [[1, 2], [5, 6]], "labels": [[1, 2], [6, 6]]},
            "row 2: labels must be the token of the same position or -100",
        ),
        ({"input_ids": [[1, 2], [5, 6]], "labels": [[1, 2], [6]]}, "row 2: labels must be as long as input_ids"),
        ({"input_ids": [[1, 2], None]}, "row 2: expected a list of token ids in input_ids, got nothing"),
        ({"input_ids": ["a", "b"]}, "input_ids must be lists of token ids, got string"),
        (
            {"input_ids": [[1, 2], [3, 17]]},
            "row 2: expected token ids from 0 to 16, the base's vocabulary, got 17. The rows were",
        ),
        ({"input_ids": [[-1, 2]]}, "row 1: expected token ids from 0 to 16, the base's vocabulary, got -1. The rows were"),
        ({"text": [3, 4]}, "row 1: text must be text, got int."),
        ({"text": ["one", None]}, r"row 2: expected messages \| prompt .*, got no field."),
    ],
)
def test_rows_that_are_refused_are_named(tmp_path: Path, tokenizer, columns: dict, message: str) -> None:
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    with pytest.raises(RunError, match=rf"^{re.escape(str(tmp_path / 'a.parquet'))}(, |: ){message}"):
        prepare(str(tmp_path / "a.parquet"), tokenizer, max_length=8)


def test_no_usable_row(write, tokenizer) -> None:
    path = write("a.jsonl", [{"text": ""}, {"text": ""}, {"prompt": "one two three", "completion": "four"}])
    with pytest.raises(RunError) as error:
        prepare(path, tokenizer, max_length=3, name="data.validation")
    assert str(error.value) == (
        "data.validation: none of the 3 rows can be used: 2 shorter than two tokens, 1 no token with loss after the first."
        " Expected rows of two tokens or more with loss after the first; check the fields, max_length and the chat template."
    )


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
    assert encodes(tokenizer=word_tokenizer(bos=False)) == 5
    used = word_tokenizer()
    used("one", truncation=True, max_length=1)
    assert encodes(tokenizer=used) == 0
    write("cached.jsonl", texts(6))
    assert encodes() == 6


def test_list_and_mix(write, tokenizer) -> None:
    a = write("a.jsonl", [{"input_ids": [5, 6, 7]}] * 4)
    b = write("b.jsonl", [{"input_ids": [8, 9]}] * 2)
    both, _ = prepare([a, b], tokenizer, max_length=8)
    assert both.rows.lengths.tolist() == [3, 3, 3, 3, 2, 2]
    mixed, _ = prepare({a: 1, b: 3}, tokenizer, max_length=8)
    assert sorted(mixed.rows.lengths.tolist()) == [2] * 12 + [3] * 4
    assert (mixed.report.rows, mixed.report.documents, mixed.report.tokens) == (16, 6, 36)
    long = write("d.jsonl", [{"input_ids": [7] * 20}, {"input_ids": [6] * 4}])
    cut, _ = prepare({a: 3, long: 1}, tokenizer, max_length=8)  # 6 rows against 2: one of the latter is three documents
    assert sorted(cut.rows.lengths.tolist()) == [3] * 6 + [4, 4, 8, 8]
    text = write("c.txt", "one two")
    assert prepare({a: 1, text: 1}, tokenizer, max_length=8)[0].report.rows == 8  # sources of different kinds


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ([], r"^data.train must name at least one source, got \[\].$"),
        ({}, r"^data.train must name at least one source, got \{\}.$"),
        ({"a.jsonl": 0.0}, r"^data.train: the weight of a.jsonl must be above 0, got 0.0. Leave the source out instead.$"),
    ],
)
def test_wrong_sources(tokenizer, sources, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        prepare(sources, tokenizer, max_length=8)


def test_a_source_of_a_mix_without_usable_rows(write, tokenizer) -> None:
    a, b = write("a.jsonl", [{"text": "one"}]), write("b.jsonl", [{"text": ""}])
    with pytest.raises(
        RunError, match=r"^data.train: none of the rows of .*b.jsonl can be used. Leave the source out of the mix"
    ):
        prepare({a: 1, b: 1}, tokenizer, max_length=8)


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
    path = write("a.jsonl", [{"text": "one"}])
    with pytest.raises(
        RunError, match="data.train: holding out 0.5 of 1 rows leaves no usable row on one side. Give more rows"
    ):
        prepare(path, tokenizer, max_length=8, held_out=0.5)


def test_tokenizer_digest() -> None:
    digest = documents.tokenizer_digest
    assert digest(word_tokenizer()) == digest(word_tokenizer())
    other = word_tokenizer()
    other.chat_template = "x"
    digests = {digest(word_tokenizer()), digest(word_tokenizer(eos=False)), digest(word_tokenizer(bos=False)), digest(other)}
    assert len(digests) == 4


# ---------------------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_length": 1}, "max_length must be 2 or more, got 1. Set data.max_length."),
        ({"batch_size": 0}, "batch_size must be 1 or more, got 0. Set data.batch_size."),
        ({"eval_batch_size": 0}, "eval_batch_size must be 1 or more, got 0. Set data.eval_batch_size."),
        ({"max_blocks_per_row": 0}, "max_blocks_per_row must be 1 or more, got 0. Set data.max_blocks_per_row."),
        ({"num_workers": -1}, "num_workers must be 0 or more, got -1. Set data.num_workers."),
        ({"seed": -1}, "seed must be 0 or more, got -1. Set data.seed."),
        ({"max_rows": 0}, "max_rows must be 1 or more, got 0. Set data.max_rows."),
        ({"block_fraction": 0.0}, "block_fraction must be above 0 and at most 1, got 0.0. Set data.block_fraction."),
        (
            {"validation_fraction": 1.0},
            "validation_fraction must be from 0 to below 1, got 1.0. Set data.validation_fraction.",
        ),
        (
            {"validation": "a", "validation_fraction": 0.1},
            "data.validation and data.validation_fraction are both set: leave one of them out.",
        ),
    ],
)
def test_wrong_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(UsageError) as error:
        MTPDataModule(**arguments)
    assert str(error.value) == message


def test_errors_of_setup(write) -> None:
    path = write("a.jsonl", texts(4))
    with pytest.raises(UsageError, match="^data.train must name a source for this command, got nothing. Set data.train.$"):
        ready()
    with pytest.raises(UsageError, match="^data.validation must name a source for this command"):
        ready("validate", train=path)
    with pytest.raises(UsageError, match="^data.test must name a source for this command"):
        ready("test", train=path)
    with pytest.raises(UsageError, match="^max_length must be at most the base's context, 8, got 16. Set data.max_length.$"):
        ready(train=path, trainer={"context": 8})
    with pytest.raises(
        RunError, match="^chat_template must be a jinja file, 'nothing.jinja' cannot be read: No such file.* Check"
    ):
        ready(train=path, chat_template="nothing.jinja")
    with pytest.raises(UsageError, match="attach both to a Trainer before setup"):
        MTPDataModule(train=path).setup("fit")


def test_sources_as_yaml_and_on_the_command_line() -> None:
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(MTPDataModule, "data")

    def parsed(*arguments: str):
        return parser.parse_args(list(arguments)).data.train

    assert parsed("--data.train=a.jsonl") == "a.jsonl"
    assert parsed("--data.train=owner/name:train[:10]") == "owner/name:train[:10]"
    assert parsed("--data.train=package://demo/train.parquet") == "package://demo/train.parquet"
    assert parsed("--data.train=[a.jsonl, b.jsonl]") == ["a.jsonl", "b.jsonl"]
    assert parsed("--data.train={./a.jsonl: 1, owner/name: 0.5}") == {"./a.jsonl": 1, "owner/name": 0.5}


def test_the_docstring_is_the_manual_of_every_argument() -> None:
    import inspect

    manual = inspect.getdoc(MTPDataModule)
    for name in inspect.signature(MTPDataModule).parameters:
        assert re.search(rf"^    {name}: .{{20,}}", manual, re.MULTILINE), name


# ---------------------------------------------------------------------------------------------- loaders


def test_training_and_validation_batches(write, capsys) -> None:
    train, validation = write("a.jsonl", texts(10, words=8)), write("b.jsonl", texts(4, words=8))
    data = ready(
        train=train,
        validation=validation,
        batch_size=4,
        eval_batch_size=2,
        block_fraction=0.25,
        eval_max_blocks_per_row=3,
        trainer={"accumulate_grad_batches": 2},
    )
    loader = data.train_dataloader()
    first, second = list(loader), list(loader)
    assert [len(batch.row_ids) for batch in first].count(4) == 2 and len(first) == len(loader) == 3
    assert {number for batch in first for number in batch.row_ids.tolist()} == set(range(10))
    assert all(batch.mtp_labels.shape[-1] == 2 for batch in first)  # num_masks is the module's
    assert first[0].starts.shape[1] == 2  # round(8 / 4) to round(10 / 4) starts a row
    assert first[0].counts.tolist() == first[1].counts.tolist() != first[2].counts.tolist()
    starts = [
        {int(n): s.tolist() for batch in epoch for n, s in zip(batch.row_ids, batch.starts, strict=True)}
        for epoch in (first, second)
    ]
    assert starts[0] != starts[1]

    evaluation = data.val_dataloader()
    once, twice = list(evaluation), list(evaluation)
    assert [len(batch.row_ids) for batch in once] == [2, 2] and all(batch.starts.shape[1] == 3 for batch in once)
    assert all(torch.equal(x, y) for a, b in zip(once, twice, strict=True) for x, y in zip(a, b, strict=True))
    other = ready(train=train, validation=validation, eval_batch_size=2, eval_max_blocks_per_row=3, seed=7).val_dataloader()
    assert all(torch.equal(x, y) for a, b in zip(once, other, strict=True) for x, y in zip(a, b, strict=True))
    shown = capsys.readouterr().err
    assert "data.train: 10 rows read; 10 documents in 10 rows an epoch, 109 tokens, 99 eligible starts, " in shown
    assert data.report["validation"]["rows"] == 4 and 0 < data.report["train"]["padding_share"] < 0.3


def test_only_rank_0_reports(write, capsys) -> None:
    ready(train=write("a.jsonl", texts(4)), trainer={"is_global_zero": False, "global_rank": 1, "world_size": 2})
    assert "data.train" not in capsys.readouterr().err


def test_ranks_come_from_the_strategy(write) -> None:
    path = write("a.jsonl", texts(9))
    everything = []
    for rank in range(2):
        kwargs = {"rank": rank, "num_replicas": 2}
        data = ready(
            train=path, validation=path, batch_size=2, trainer={"distributed_sampler_kwargs": kwargs, "world_size": 4}
        )
        batches = list(data.val_dataloader())
        assert len(batches) == len(data.train_dataloader()) == 3
        everything += [
            (number, float(batch.counts[0])) for batch in batches for number in batch.row_ids.tolist() if batch.counts[0]
        ]
    assert sorted(number for number, _ in everything) == list(
        range(9)
    )  # the tenth place is a blank copy that counts nothing
    data = ready(train=path, trainer={"global_rank": 1, "world_size": 2})
    assert data.train_dataloader().row_sampler().rank == 1 and data.train_dataloader().row_sampler().world == 2


def test_packing(write) -> None:
    data = ready(train=write("a.jsonl", texts(40)), packing=True, batch_size=2)
    loader = data.train_dataloader()
    assert not loader.row_sampler().bucketed
    assert data.report["train"]["documents"] == 40 and data.report["train"]["rows"] == 20
    assert data.rows["train"].lengths.max() <= 16 and data.report["train"]["padding_share"] < 0.15
    batch = next(iter(loader))
    assert int(batch.document_ids.max()) >= 1
    total = sum(batch.counts[0] for batch in ready(train=write("a.jsonl", texts(40)), packing=True).train_dataloader())
    alone = sum(batch.counts[0] for batch in ready(train=write("a.jsonl", texts(40))).train_dataloader())
    assert total == alone == data.report["train"]["eligible_starts"]


def test_validation_by_fraction(write) -> None:
    path = write("a.jsonl", texts(20))
    fit = ready(train=path, validation_fraction=0.2)
    assert (len(fit.rows["train"]), len(fit.rows["validation"])) == (16, 4)
    validate = ready("validate", train=path, validation_fraction=0.2)
    assert set(validate.rows) == {"validation"}
    assert [validate.rows["validation"].row(n).input_ids.tolist() for n in range(4)] == [
        fit.rows["validation"].row(n).input_ids.tolist() for n in range(4)
    ]
    assert len(ready(train=path, validation_fraction=0.2, eval_max_rows=2).rows["validation"]) == 2


def test_other_stages(write) -> None:
    path = write("a.jsonl", texts(6))
    assert list(ready("fit", train=path).val_dataloader()) == []
    test = ready("test", test=path, eval_max_rows=3)
    assert row_ids(test.test_dataloader()) and len(test.rows["test"]) == 3
    assert ready("predict").rows == {}


def test_overfit_batches_stay_the_same(write) -> None:
    data = ready(train=write("a.jsonl", texts(12)), trainer={"overfit_batches": 2, "limit_train_batches": 2})
    loader = data.train_dataloader()
    assert row_ids(loader) == row_ids(loader) and len(row_ids(loader)) == 2


def test_chat_template_from_a_file(write) -> None:
    template = "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
    template += "{% else %}{{ m.content }} {% endif %}{% endfor %}"
    rows = [{"messages": [{"role": "user", "content": "one two"}, {"role": "assistant", "content": "three"}]}]
    data = ready(train=write("a.jsonl", rows), chat_template=write("t.jinja", template))
    row = data.rows["train"].row(0)
    assert row.input_ids.tolist() == [9, 10, 11] and row.labels.tolist() == [-100, -100, 11]


# ---------------------------------------------------------------------------------------------- with a Trainer


@pytest.mark.filterwarnings("ignore")  # of Lightning's, about small machines and few batches
@pytest.mark.parametrize(
    ("validation_fraction", "limit", "batches"), [(0.0, 1.0, 5), (0.0, 3, 3), (0.0, 0.8, 4), (0.3, 1.0, 4), (0.3, 3, 3)]
)
def test_fit_and_resume_after_every_step(
    tmp_path: Path, write, validation_fraction: float, limit: float, batches: int
) -> None:
    """Three epochs in steps of two batches, an odd last batch alone; resumed after any step, all the rest is the same."""
    path = write("a.jsonl", texts(14))
    options = {"accumulate_grad_batches": 2, "limit_train_batches": limit}

    def data() -> MTPDataModule:
        return MTPDataModule(
            train=path, max_length=16, batch_size=3, block_fraction=0.5, validation_fraction=validation_fraction
        )

    whole = fit(tmp_path, data(), save=True, **options)
    assert [seen[0] for seen in whole.seen] == [0] * batches + [1] * batches + [2] * batches
    epochs = [whole.seen[begin : begin + batches] for begin in range(0, 3 * batches, batches)]
    assert epochs[0][0][1:] != epochs[1][0][1:]
    for epoch in epochs:  # counts are equal within a step
        assert [a[3] == b[3] for a, b in zip(epoch[:-1:2], epoch[1::2], strict=False)] == [True] * (batches // 2)
    if validation_fraction:
        passes = [whole.validated[begin : begin + 2] for begin in range(0, len(whole.validated), 2)]
        assert len(passes) == 4 and all(found == passes[0] for found in passes)  # the sanity check and three epochs

    steps = -(-batches // 2)
    assert len(checkpoints(tmp_path)) == 3 * steps
    for number, checkpoint in enumerate(checkpoints(tmp_path)[:-1], 1):
        delivered = number // steps * batches + number % steps * 2
        resumed = fit(tmp_path, data(), ckpt_path=str(checkpoint), **options)
        assert resumed.seen == whole.seen[delivered:], checkpoint.name


@pytest.mark.filterwarnings("ignore")
def test_resume_with_workers(tmp_path: Path, write) -> None:
    options = {"train": write("a.jsonl", texts(14)), "max_length": 16, "batch_size": 3, "block_fraction": 0.5}
    runs = [
        fit(tmp_path / str(workers), MTPDataModule(**options, num_workers=workers), 2, save=True, accumulate_grad_batches=2)
        for workers in (0, 2)
    ]
    assert runs[0].seen == runs[1].seen and len(runs[0].seen) == 10
    for step, delivered in ((1, 2), (4, 7)):  # in the middle of the first epoch and of the second
        checkpoint = str(checkpoints(tmp_path / "2")[step - 1])
        data = MTPDataModule(**options, num_workers=2)
        resumed = fit(tmp_path, data, 2, checkpoint, accumulate_grad_batches=2)
        assert resumed.seen == runs[0].seen[delivered:]


def test_resume_on_two_ranks(tmp_path: Path, write) -> None:
    """Two processes joined by DDP, with 0 and 2 workers each: together they see what one rank with larger batches sees."""
    options = {"train": write("a.jsonl", texts(14)), "max_length": 16, "block_fraction": 0.5}
    alone = fit(tmp_path / "alone", MTPDataModule(**options, batch_size=4), 2, accumulate_grad_batches=2).seen
    assert len(alone) == 8
    ranks = two_processes.run(whole_and_resumed, tmp_path, str(tmp_path), options | {"batch_size": 2}, [0, 2], [3])
    for workers in (0, 2):
        for rank in ranks:
            whole, resumed = rank[workers]
            assert [seen[0] for seen in whole] == [0] * 4 + [1] * 4
            assert resumed[3] == whole[6:]
        for one, *both in zip(alone, ranks[0][workers][0], ranks[1][workers][0], strict=True):
            rows = [
                (number, drawn(starts))
                for _, ids, all_starts, _ in both
                for number, starts in zip(ids, all_starts, strict=True)
            ]
            assert sorted(rows) == sorted((number, drawn(starts)) for number, starts in zip(one[1], one[2], strict=True))
            assert [a + b for a, b in zip(both[0][3], both[1][3], strict=True)] == one[3]


def drawn(starts: list[int]) -> list[int]:
    return [start for start in starts if start >= 0]
