# SPDX-License-Identifier: Apache-2.0
"""A run resumed after any step gets the same batches as an uninterrupted one: with workers, and on two ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import two_processes
from resume_runs import checkpoints, fit, whole_and_resumed
from toy_tokenizers import texts

from mtp_lightning.data import MTPDataModule
from mtp_lightning.errors import UsageError


@pytest.mark.filterwarnings("ignore")  # of Lightning's, about small machines and few batches
@pytest.mark.parametrize(("validation_fraction", "limit", "batches"), [(0.0, 3, 3), (0.3, 0.8, 3)])
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


@pytest.mark.slow
def test_resume_on_two_ranks(tmp_path: Path, write) -> None:
    """Two processes joined by DDP, with two workers each: together they see what one rank with larger batches sees."""
    options = {"train": write("a.jsonl", texts(14)), "max_length": 16, "block_fraction": 0.5}
    alone = fit(tmp_path / "alone", MTPDataModule(**options, batch_size=4), 2, accumulate_grad_batches=2).seen
    assert len(alone) == 8
    options |= {"batch_size": 2, "num_workers": 2}
    ranks = two_processes.run(whole_and_resumed, tmp_path, str(tmp_path / "shared"), options, 3)
    for whole, resumed in ranks:
        assert [seen[0] for seen in whole] == [0] * 4 + [1] * 4
        assert resumed == whole[6:]
    for one, *both in zip(alone, *(whole for whole, _ in ranks), strict=True):
        rows = [pair for _, ids, starts, _ in both for pair in zip(ids, map(drawn, starts), strict=True)]
        assert sorted(rows) == sorted(zip(one[1], map(drawn, one[2]), strict=True))
        assert [a + b for a, b in zip(both[0][3], both[1][3], strict=True)] == one[3]


def drawn(starts: list[int]) -> list[int]:
    return [start for start in starts if start >= 0]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("streaming_rows", [None, 8])
def test_other_batches_than_the_epoch_began_with_are_refused(tmp_path: Path, write, streaming_rows: int | None) -> None:
    """Eight rows, five delivered one by one: with batches of four the last three would never come."""
    options = {"train": write("a.jsonl", texts(8)), "max_length": 16, "streaming_rows": streaming_rows}
    fit(tmp_path, MTPDataModule(**options, batch_size=1), 1, save=True)
    middle, end = str(checkpoints(tmp_path)[4]), str(checkpoints(tmp_path)[7])
    with pytest.raises(UsageError, match="rows in a batch .data.batch_size times ranks. 1, and now it is 4"):
        fit(tmp_path, MTPDataModule(**options, batch_size=4), 2, middle)
    seen = fit(tmp_path, MTPDataModule(**options, batch_size=4), 2, end).seen
    assert [epoch for epoch, *_ in seen] == [1, 1] and sorted(row for _, rows, *_ in seen for row in rows) == list(range(8))


@pytest.mark.filterwarnings("ignore")
def test_smaller_batches_are_refused_at_the_end_of_an_epoch_too(tmp_path: Path, write) -> None:
    """Lightning would count on from the two batches of the epoch that is over."""
    options = {"train": write("a.jsonl", texts(8)), "max_length": 16}
    fit(tmp_path, MTPDataModule(**options, batch_size=4), 1, save=True)
    with pytest.raises(UsageError, match="data.batch_size times ranks. 4, and now it is 1"):
        fit(tmp_path, MTPDataModule(**options, batch_size=1), 2, str(checkpoints(tmp_path)[-1]))
