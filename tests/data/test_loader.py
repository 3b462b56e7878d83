# SPDX-License-Identifier: Apache-2.0
"""The loader: every row once, on any number of ranks; one denominator a step; exact resume; workers change nothing."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pyarrow as pa
import pytest
import torch

from mtp_lightning.data.collator import MaskedInputCollator
from mtp_lightning.data.documents import Documents
from mtp_lightning.data.loader import MAX_BUCKET_BATCHES, RowSampler, WindowedLoader, build_dataloader
from mtp_lightning.data.rows import TokenRows
from mtp_lightning.types import MaskedInput


def token_rows(lengths: list[int], order: np.ndarray | None = None, offsets: np.ndarray | None = None) -> TokenRows:
    """Row r is ``10 r, 10 r + 1, ..``; its first token carries no loss."""
    documents = pa.RecordBatch.from_pydict(
        {
            "input_ids": [[10 * row + place for place in range(length)] for row, length in enumerate(lengths)],
            "loss": [[place > 0 for place in range(length)] for length in lengths],
            "domain": ["even" if row % 2 == 0 else "odd" for row in range(len(lengths))],
            "length": lengths,
        }
    )
    return TokenRows(Documents([documents]), np.arange(len(lengths)) if order is None else order, offsets)


LENGTHS = [5, 3, 8, 4, 6, 3, 7, 5, 4, 9, 3]


def windowed(rows: TokenRows | None = None, accumulate=1, limit=None, constant=False, epoch=0, **options) -> WindowedLoader:
    collator = MaskedInputCollator(num_masks=2, block_fraction=0.5, seed=4)
    loader = build_dataloader(rows or token_rows(LENGTHS), collator, options.pop("batch_size", 2), **options)
    return WindowedLoader(loader, accumulate, limit, constant, epoch)


def same(a: MaskedInput, b: MaskedInput) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def row_ids(batches) -> list[list[int]]:
    return [batch.row_ids.tolist() for batch in batches]


# rows


def test_packed_rows() -> None:
    rows = token_rows([3, 2, 2], np.array([0, 2, 1]), np.array([0, 2, 3]))
    assert len(rows) == 2 and rows.lengths.tolist() == [5, 2]
    row = rows.row(0)
    assert row.input_ids.tolist() == [0, 1, 2, 20, 21] and row.document_ids.tolist() == [0, 0, 0, 1, 1]
    assert row.labels.tolist() == [-100, 1, 2, -100, 21] and row.domain == "even"
    assert rows.row(1).input_ids.tolist() == [10, 11]
    assert token_rows([3, 2], np.array([0, 1]), np.array([0, 2])).row(0).domain == ""  # of different domains
    repeated = token_rows([3, 2], np.array([1, 1]))
    assert [repeated.row(r).input_ids.tolist() for r in range(2)] == [[10, 11], [10, 11]] and repeated.row(1).row_id == 1


# sampler


@pytest.mark.parametrize("bucketed", [True, False])
@pytest.mark.parametrize(
    ("n", "batch_size", "world"), [(11, 2, 1), (11, 2, 2), (12, 2, 3), (13, 2, 3), (2, 1, 4), (7, 3, 2)]
)
def test_every_row_once_on_any_number_of_ranks(n: int, batch_size: int, world: int, bucketed: bool) -> None:
    lengths = np.random.default_rng(0).integers(2, 9, n)
    ranks = [RowSampler(lengths, batch_size, seed=1, rank=rank, world=world, bucketed=bucketed) for rank in range(world)]
    batches = [list(sampler) for sampler in ranks]
    assert len({len(found) for found in batches}) == 1 and len(batches[0]) == len(ranks[0]) == -(-n // (batch_size * world))
    draws = [draw for found in batches for batch in found for draw in batch]
    assert sorted(draw.row for draw in draws if not draw.blank) == list(range(n))
    assert all(1 <= len(batch) <= batch_size for found in batches for batch in found)
    blanks = sum(draw.blank for draw in draws)
    assert blanks == max(0, world - (n % (batch_size * world) or world * batch_size))


def test_the_ranks_share_what_one_rank_would_draw() -> None:
    lengths = np.array(LENGTHS)
    alone = [sorted(draw.row for draw in batch) for batch in RowSampler(lengths, 4, seed=3)]
    shared = [list(RowSampler(lengths, 2, seed=3, rank=rank, world=2)) for rank in range(2)]
    together = [sorted(draw.row for rank in pair for draw in rank if not draw.blank) for pair in zip(*shared, strict=True)]
    assert together == alone


def test_order_depends_on_seed_and_epoch_only() -> None:
    sampler = RowSampler(np.arange(40), 2, seed=1)
    first = list(sampler)
    assert list(sampler) == first == list(RowSampler(np.arange(40), 2, seed=1))
    assert list(RowSampler(np.arange(40), 2, seed=2)) != first
    sampler.epoch = 1
    later = list(sampler)
    assert [draw.epoch for batch in later for draw in batch] == [1] * 40
    assert [[draw.row for draw in batch] for batch in later] != [[draw.row for draw in batch] for batch in first]


def test_batches_hold_rows_of_similar_length() -> None:
    lengths = np.random.default_rng(0).integers(2, 500, 8 * MAX_BUCKET_BATCHES * 3)
    bucketed, plain = RowSampler(lengths, 8), RowSampler(lengths, 8, bucketed=False)
    assert bucketed.padding_share() < 0.1 and plain.padding_share() > 0.3
    means = [lengths[rows].mean() for rows in bucketed.global_batches(0)]
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.2  # the batches themselves are shuffled


def test_few_rows_form_other_batches_every_epoch() -> None:
    sampler = RowSampler(np.arange(16), 2)
    together = [{tuple(sorted(batch.tolist())) for batch in sampler.global_batches(epoch)} for epoch in range(4)]
    assert len(set.union(*together)) > 16  # sorting all rows at once would give the same 8 pairs again and again


# windows


def test_counts_are_those_of_the_whole_step() -> None:
    plain = list(windowed())
    batches = list(windowed(accumulate=4))
    assert row_ids(batches) == row_ids(plain) and len(batches) == len(windowed()) == 6
    first = sum(batch.counts for batch in plain[:4])
    last = sum(batch.counts for batch in plain[4:])  # the epoch's last step has two batches only
    assert [batch.counts.tolist() for batch in batches] == [first.tolist()] * 4 + [last.tolist()] * 2
    assert first[0] != plain[0].counts[0]
    assert sum(batch.counts for batch in plain)[0] == sum(LENGTHS) - len(LENGTHS)


def test_accumulation_may_change_from_epoch_to_epoch() -> None:
    accumulate = 1
    loader = windowed(accumulate=lambda: accumulate)
    assert len({tuple(batch.counts.tolist()) for batch in loader}) > 3
    accumulate = 6
    assert len({tuple(batch.counts.tolist()) for batch in loader}) == 1


# epochs and resume


def test_epochs() -> None:
    loader = windowed()
    first, second = list(loader), list(loader)
    assert loader.epoch == 1
    assert sorted(sum(row_ids(first), [])) == sorted(sum(row_ids(second), [])) == list(range(11))
    assert row_ids(first) != row_ids(second)
    assert all(map(same, windowed(epoch=1), second))
    loader = windowed()
    iter(loader)  # an unused iterator does not use up an epoch; one that is left early ends its epoch
    assert all(map(same, islice(loader, 2), first))
    assert all(map(same, loader, second)) and loader.epoch == 1
    constant = windowed(constant=True)
    list(islice(constant, 2))
    assert all(map(same, constant, first))


@pytest.mark.parametrize("accumulate", [1, 4])
def test_resume_after_any_batch(accumulate: int) -> None:
    """Three epochs of 6 batches, resumed after any batch of the first two."""
    loader = windowed(accumulate=accumulate)
    batches, states = [], [loader.state_dict()]
    for batch in (batch for _ in range(3) for batch in loader):
        batches.append(batch)
        states.append(loader.state_dict())
    positions = [(state["epoch"], state["delivered"]) for state in states]
    assert positions[:2] + positions[6:8] == [(0, 0), (0, 1), (0, 6), (1, 1)]
    for delivered in range(13):
        resumed = windowed(accumulate=accumulate)
        resumed.load_state_dict(states[delivered])
        iter(resumed)  # Lightning may make an iterator and then another
        rest = [batch for _ in range(3) for batch in resumed][: 18 - delivered]
        assert len(rest) == 18 - delivered and all(map(same, rest, batches[delivered:])), delivered


def test_the_state_of_rank_0_resumes_rank_1() -> None:
    ranks = [windowed(rank=rank, world=2) for rank in range(2)]
    second = list(ranks[1])
    list(islice(ranks[0], 2))
    resumed = windowed(rank=1, world=2)
    resumed.load_state_dict(ranks[0].state_dict())
    assert all(map(same, resumed, second[2:]))


def test_skipping_does_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = token_rows(LENGTHS)
    read, row = [], rows.row
    monkeypatch.setattr(rows, "row", lambda index: read.append(index) or row(index))
    loader = windowed(rows, accumulate=2)
    loader.load_state_dict({"epoch": 0, "delivered": 5})
    assert len(list(loader)) == 1
    assert len(read) <= 4  # the open window of two batches, for its counts


def test_loading_leaves_the_global_random_stream_alone() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    list(windowed())
    assert torch.equal(torch.get_rng_state(), before)
