# SPDX-License-Identifier: Apache-2.0
"""masking.py against docs/method.md §2 by hand: short rows with every number written out, then slower second formulas."""

from __future__ import annotations

import pytest
import torch

from mtp_lightning.modeling.masking import (
    attention_pattern,
    build_masked_input,
    dense_mask,
)
from mtp_lightning.types import ANCHOR, MTP, NTP, MaskedInput, TokenRow

X = -100  # no label
H = 1 / 2


def token_row(
    ids: list[int], labels: list[int] | None = None, documents: list[int] | None = None, row_id: int = 0
) -> TokenRow:
    columns = ids, ids if labels is None else labels, [0] * len(ids) if documents is None else documents
    return TokenRow(*map(torch.tensor, columns), row_id)


def single(
    ids: list[int], num_masks: int, labels: list[int] | None = None, documents: list[int] | None = None, **options
) -> MaskedInput:
    """The batch of a single row."""
    return build_masked_input([token_row(ids, labels, documents)], num_masks, **options)


BY_HAND: dict[str, tuple[dict, dict[str, list]]] = {
    "five tokens, two masks": (
        {"ids": [10, 11, 12, 13, 14], "num_masks": 2},
        {
            "input_ids": [10, 11, 12, 13, 14],
            "position_ids": [0, 1, 2, 3, 4],
            "document_ids": [0, 0, 0, 0, 0],
            "ntp_labels": [11, 12, 13, 14, X],
            "starts": [0, 1, 2],  # 3 is eligible, but x_5 does not exist: its block would train nothing
            "mtp_labels": [[12, 13], [13, 14], [14, X]],
            "anchor_weights": [[1, H], [H, H], [H, 0]],  # anchors 1 2 | 2 3 | 3 -
            "block_weights": [1, 1, 1],
            "counts": [4, 5, 3],
            "positions": [0, 1, 2, 3, 4, 1, 2, 2, 3, 3, 4],
        },
    ),
    "packed documents": (
        {"ids": [10, 11, 12, 20, 21, 22], "num_masks": 2, "documents": [0, 0, 0, 1, 1, 1]},
        {
            "position_ids": [0, 1, 2, 0, 1, 2],
            "document_ids": [0, 0, 0, 1, 1, 1],
            "ntp_labels": [11, 12, X, 21, 22, X],  # 12 does not predict 20
            "starts": [0, 3],
            "mtp_labels": [[12, X], [22, X]],
            "anchor_weights": [[1, 0], [1, 0]],
            "counts": [4, 2, 2],
            "positions": [0, 1, 2, 0, 1, 2, 1, 2, 1, 2],
        },
    ),
    "prompt tokens carry no loss": (
        {"ids": [10, 11, 12, 13, 14, 15], "num_masks": 2, "labels": [X, X, X, 13, 14, 15]},
        {
            "ntp_labels": [X, X, 13, 14, 15, X],
            "starts": [2, 3],  # the prompt's last token is eligible; 1 is not, though x_3 two ahead carries loss
            "mtp_labels": [[14, 15], [15, X]],
            "anchor_weights": [[1, H], [H, 0]],
            "counts": [3, 3, 2],
        },
    ),
    "a second turn is seen across one ignored token": (
        {"ids": [10, 11, 12, 13, 14], "num_masks": 3, "labels": [X, 11, X, 13, 14]},
        {
            "ntp_labels": [11, X, 13, 14, X],
            "starts": [0, 2],
            "mtp_labels": [[X, 13, 14], [14, X, X]],
            "anchor_weights": [[0, 1, H], [H, 0, 0]],  # anchors - 2 3 | 3
            "counts": [3, 3, 2],
        },
    ),
    "positions past the context are dropped": (
        {"ids": [10, 11, 12, 13, 14, 15], "num_masks": 2, "context": 4},
        {
            "starts": [0, 1, 2],
            "mtp_labels": [[12, 13], [13, 14], [14, X]],  # m_2 after x_2 would be at position 4
            "anchor_weights": [[1, H], [H, H], [H, 0]],
            "counts": [5, 5, 3],
        },
    ),
    "the context counts within a document": (
        {"ids": [10, 11, 12, 20, 21, 22], "num_masks": 1, "documents": [0, 0, 0, 1, 1, 1], "context": 2},
        {"starts": [0, 3], "mtp_labels": [[12], [22]], "counts": [4, 2, 2]},
    ),
    "a row shorter than the masks": (
        {"ids": [10, 11, 12], "num_masks": 4},
        {"starts": [0], "mtp_labels": [[12, X, X, X]], "anchor_weights": [[1, 0, 0, 0]], "counts": [2, 1, 1]},
    ),
    "a row too short for a block has one empty block": (
        {"ids": [10, 11], "num_masks": 2},
        {"starts": [-1], "mtp_labels": [[X, X]], "anchor_weights": [[0, 0]], "block_weights": [0], "counts": [1, 0, 0]},
    ),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_a_row_by_hand(name: str) -> None:
    options, expected = BY_HAND[name]
    batch = single(**options)
    actual = {**batch._asdict(), "positions": attention_pattern(batch, options["num_masks"]).position_ids}
    for field, value in expected.items():
        got = actual[field] if field == "counts" else actual[field][0]
        torch.testing.assert_close(
            got, torch.tensor(value, dtype=got.dtype), msg=lambda text, field=field: f"{field}: {text}"
        )


def test_rows_of_a_batch_are_padded() -> None:
    rows = [token_row([10, 11, 12, 13], row_id=5), token_row([20, 21, 22], row_id=7)]
    batch = build_masked_input(rows, 2)
    assert batch.input_ids.tolist() == [[10, 11, 12, 13], [20, 21, 22, 0]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3], [0, 1, 2, 0]]
    assert batch.document_ids.tolist() == [[0, 0, 0, 0], [0, 0, 0, -1]]
    assert batch.ntp_labels.tolist() == [[11, 12, 13, X], [21, 22, X, X]]
    assert batch.starts.tolist() == [[0, 1], [0, -1]]
    assert batch.mtp_labels.tolist() == [[[12, 13], [13, X]], [[22, X], [X, X]]]
    assert batch.anchor_weights.tolist() == [[[1, H], [H, 0]], [[1, 0], [0, 0]]]
    assert batch.block_weights.tolist() == [[1, 1], [1, 0]]
    assert batch.counts.tolist() == [5, 4, 3] and batch.counts.dtype == torch.int64
    assert batch.row_ids.tolist() == [5, 7]


def test_rows_and_blocks_are_padded_to_multiples() -> None:
    rows = [token_row([10, 11, 12, 13], row_id=5), token_row([20, 21, 22], row_id=7)]
    plain, padded = build_masked_input(rows, 2), build_masked_input(rows, 2, row_multiple=8, block_multiple=3)
    assert padded.input_ids.shape == (2, 8) and padded.mtp_labels.shape == (2, 3, 2)
    assert padded.document_ids[:, 4:].eq(-1).all() and padded.starts[:, 2:].eq(-1).all()
    assert padded.input_ids[:, :4].equal(plain.input_ids) and padded.mtp_labels[:, :2].equal(plain.mtp_labels)
    assert padded.counts.equal(plain.counts)


# ---------------------------------------------------------------------------------------------- attention


def test_dense_mask_by_hand() -> None:
    """The table of masking.py: k = 2, four tokens, blocks after x_0 and x_1; then a window, two documents and padding."""
    batch = single([10, 11, 12, 13], 2)
    pattern = attention_pattern(batch, 2)
    assert dense_mask(pattern, 4)[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0, 0],
        [1, 0, 0, 0, 1, 0, 0, 0],
        [1, 0, 0, 0, 1, 1, 0, 0],
        [1, 1, 0, 0, 0, 0, 1, 0],
        [1, 1, 0, 0, 0, 0, 1, 1],
    ]
    # Positions 0 1 2 3 | 1 2 | 2 3
    assert dense_mask(pattern, 4, 2)[0, 0].int()[[3, 5, 6, 7]].tolist() == [
        [0, 0, 1, 1, 0, 0, 0, 0],
        [0, 0, 0, 0, 1, 1, 0, 0],
        [0, 1, 0, 0, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 0, 1, 1],
    ]
    # Blocks after the first token of each document, and a row of padding, which sees itself.
    rows = [token_row([10, 11, 12, 20, 21, 22], documents=[0, 0, 0, 1, 1, 1]), token_row([30, 31], row_id=1)]
    mask = dense_mask(attention_pattern(build_masked_input(rows, 1), 1), 6)[:, 0].int()
    assert mask[0, [3, 6, 7]].tolist() == [[0, 0, 0, 1, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0, 1, 0], [0, 0, 0, 1, 0, 0, 0, 1]]
    assert mask.diagonal(dim1=1, dim2=2).all()


# ---------------------------------------------------------------------------------------------- sampling


def test_sampled_starts_are_a_subset_that_keeps_the_denominators() -> None:
    ids = list(range(20))
    full = single(ids, 3)
    batch = single(ids, 3, block_fraction=0.25)
    assert full.starts.shape == (1, 18) and full.starts[0].tolist() == list(range(18))
    starts = batch.starts[0].tolist()
    assert len(starts) == 4 and starts == sorted(set(starts)) and set(starts) < set(range(18))  # round(18 / 4)
    assert batch.block_weights[0].tolist() == [18 / 4] * 4
    assert batch.mtp_labels[0].tolist() == full.mtp_labels[0, starts].tolist()
    assert batch.anchor_weights[0].tolist() == full.anchor_weights[0, starts].tolist()  # S(t) is that of full coverage
    assert torch.equal(batch.counts, full.counts) and torch.equal(batch.ntp_labels, full.ntp_labels)


def test_block_budget() -> None:
    ids = list(range(20))
    assert single(ids, 3, max_blocks_per_row=5).starts.shape == (1, 5)
    assert single(ids, 3, block_fraction=0.25, max_blocks_per_row=5).starts.shape == (1, 4)
    assert single(ids, 3, block_fraction=0.001).starts.shape == (1, 1)  # never none
    assert single(ids, 3, max_blocks_per_row=50).block_weights.unique().tolist() == [1]


def test_starts_depend_on_seed_epoch_and_row_alone() -> None:
    rows = [token_row(list(range(40)), row_id=number) for number in range(3)]

    def starts(rows: list[TokenRow], **options: int) -> list[list[int]]:
        return build_masked_input(rows, 2, block_fraction=0.2, **options).starts.tolist()

    together = starts(rows, seed=3, epoch=1)
    assert together == [starts([row], seed=3, epoch=1)[0] for row in rows]
    assert together == starts(rows[::-1], seed=3, epoch=1)[::-1]
    assert len({tuple(found) for found in together}) == 3
    assert starts(rows[:1], seed=3, epoch=2)[0] != together[0] and starts(rows[:1], seed=4, epoch=1)[0] != together[0]


def test_sampling_is_unbiased() -> None:
    """Over many draws the weighted sums have the mean of full coverage, for positions, anchors and any value at them."""
    ids, K, draws = list(range(12)), 3, 2000
    value = torch.rand(12, K, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def sums(batch: MaskedInput) -> torch.Tensor:
        weight = batch.block_weights[:, :, None].double()
        counted, anchors = (batch.mtp_labels != X) * weight, batch.anchor_weights * weight
        here = value[batch.starts]
        return torch.stack([x.sum((1, 2)) for x in (counted, anchors, here * counted, here * anchors)], dim=1)

    full = single(ids, K)
    expected = sums(full)[0]
    assert expected[0] == full.counts[MTP] and torch.isclose(expected[1], full.counts[ANCHOR].double(), rtol=1e-6)
    sampled = build_masked_input([token_row(ids, row_id=r) for r in range(draws)], K, block_fraction=0.3)
    assert sampled.counts[NTP] == 11 * draws
    drawn = sums(sampled)
    error = drawn.std(0) / draws**0.5
    assert ((drawn.mean(0) - expected).abs() < 4 * error).all()  # 4 standard errors; the seed is fixed
    assert (error < 0.01 * expected).all()  # tight enough that a missing weight would show
