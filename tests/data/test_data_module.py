# SPDX-License-Identifier: Apache-2.0
"""The data module: its arguments, and what a Trainer gets from it."""

from __future__ import annotations

from types import SimpleNamespace

import jsonargparse
import pytest
import torch
from toy_tokenizers import texts, word_tokenizer

from mtp_lightning.data import MTPDataModule
from mtp_lightning.errors import RunError, UsageError


def attach(data: MTPDataModule, **options) -> MTPDataModule:
    """A stand-in for a Trainer: what the data module asks of one."""
    module = SimpleNamespace(tokenizer=word_tokenizer(), num_masks=2, vocab_size=17, context=options.pop("context", 64))
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


@pytest.mark.parametrize(
    "arguments",
    [
        {"max_length": 1},
        {"eval_batch_size": 0},
        {"num_workers": -1},
        {"block_fraction": 0.0},
        {"validation_fraction": 1.0},
        {"validation_fraction": 0.1, "validation": "a"},
        {"validation_fraction": 0.1, "streaming_rows": 5},
        {"max_rows": 3, "streaming_rows": 5},
    ],
)
def test_wrong_arguments_are_named(arguments: dict) -> None:
    with pytest.raises(UsageError) as error:
        MTPDataModule(train="a", **arguments)
    for name, value in arguments.items():
        assert f"data.{name}" in str(error.value) and (len(arguments) > 1 or str(value) in str(error.value))


def test_errors_of_setup(write) -> None:
    path = write("a.jsonl", texts(4))
    for stage, arguments, error, named in (
        ("fit", {}, UsageError, "data.train"),
        ("validate", {"train": path}, UsageError, "data.validation"),
        ("test", {"train": path}, UsageError, "data.test"),
        ("fit", {"train": path, "chat_template": "nothing.jinja"}, RunError, "data.chat_template .*'nothing.jinja'"),
    ):
        with pytest.raises(error, match=f"^{named}"):
            ready(stage, **arguments)
    with pytest.raises(UsageError, match="Trainer"):
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
    assert (first[0].starts >= 0).sum(1).tolist() == [2] * 4  # round(8 / 4) to round(10 / 4) starts a row
    assert first[0].counts.tolist() == first[1].counts.tolist() != first[2].counts.tolist()
    assert [batch.starts.tolist() for batch in first] != [batch.starts.tolist() for batch in second]

    evaluation = data.val_dataloader()
    once, twice = list(evaluation), list(evaluation)
    assert [len(batch.row_ids) for batch in once] == [2, 2] and all((batch.starts >= 0).sum(1).eq(3).all() for batch in once)
    other = ready(train=train, validation=validation, eval_batch_size=2, eval_max_blocks_per_row=3, seed=7).val_dataloader()
    for others in (twice, other):
        assert all(torch.equal(x, y) for a, b in zip(once, others, strict=True) for x, y in zip(a, b, strict=True))
    report = "data.train: 10 rows read; 10 documents in 10 rows an epoch, 109 tokens, 99 eligible starts, "
    assert report in capsys.readouterr().err
    assert data.report["validation"]["rows"] == 4 and 0.6 < data.report["train"]["padding_share"] < 0.7  # 10.9 of 32


def test_ranks_come_from_the_strategy(write) -> None:
    path = write("a.jsonl", texts(9))
    counted = []
    for rank in range(2):
        trainer = {"distributed_sampler_kwargs": {"rank": rank, "num_replicas": 2}, "world_size": 4}
        data = ready(train=path, validation=path, batch_size=2, trainer=trainer)
        batches = list(data.val_dataloader())
        assert len(batches) == len(data.train_dataloader()) == 3
        counted += row_ids(batch for batch in batches if batch.counts[0])
    assert sorted(counted) == list(range(9))  # the tenth place is a blank copy that counts nothing
    data = ready(train=path, trainer={"global_rank": 1, "world_size": 2})
    assert data.train_dataloader().row_sampler().rank == 1 and data.train_dataloader().row_sampler().world == 2


def test_validation_by_fraction(write) -> None:
    path = write("a.jsonl", texts(20))
    fit = ready(train=path, validation_fraction=0.2)
    assert (len(fit.rows["train"]), len(fit.rows["validation"])) == (16, 4)
    validate = ready("validate", train=path, validation_fraction=0.2)
    assert set(validate.rows) == {"validation"}
    for n in range(4):
        assert torch.equal(validate.rows["validation"].row(n).input_ids, fit.rows["validation"].row(n).input_ids)
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


def test_the_runs_seed_is_that_of_the_data(write, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless the data has a seed of its own; without any it is 0."""
    train = write("train.jsonl", [{"input_ids": list(range(9, 15))} for _ in range(12)])

    def drawn(of_run: str | None = None, **seed: int) -> tuple[list[int], list]:
        monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
        if of_run is not None:
            monkeypatch.setenv("PL_GLOBAL_SEED", of_run)  # as seed_everything does
        batches = list(ready(train=train, block_fraction=0.5, **seed).train_dataloader())
        return row_ids(batches), [batch.starts.tolist() for batch in batches]

    zero, one = drawn(seed=0), drawn(seed=1)
    assert zero[0] != one[0] and zero[1] != one[1]
    assert drawn() == drawn("0") == drawn("1", seed=0) == zero and drawn("1") == one
