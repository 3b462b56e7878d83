# SPDX-License-Identifier: Apache-2.0
"""masking.py against docs/method.md §2 by hand: short rows with every number written out, then slower second formulas."""

from __future__ import annotations

import pytest
import torch

from mtp_lightning.modeling.masking import (
    attention_pattern,
    build_masked_input,
    dense_mask,
    document_positions,
    mask_mod,
    mtp_labels,
    next_labels,
    sample_starts,
)
from mtp_lightning.types import ANCHOR, MTP, NTP, MaskedInput, TokenRow

X = -100  # no label
H = 1 / 2
T = 1 / 3


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


def check(batch: MaskedInput, **expected: list) -> None:
    """Compare each given field of the batch's only row; ``positions`` are those of the attention pattern."""
    actual = {**batch._asdict(), "positions": attention_pattern(batch, batch.mtp_labels.shape[2]).position_ids}
    for name, value in expected.items():
        got = actual[name] if name == "counts" else actual[name][0]
        torch.testing.assert_close(got, torch.tensor(value, dtype=got.dtype), msg=lambda text, name=name: f"{name}: {text}")


def test_five_tokens_two_masks() -> None:
    batch = single([10, 11, 12, 13, 14], 2)
    check(
        batch,
        input_ids=[10, 11, 12, 13, 14],
        position_ids=[0, 1, 2, 3, 4],
        document_ids=[0, 0, 0, 0, 0],
        ntp_labels=[11, 12, 13, 14, X],
        starts=[0, 1, 2],  # 3 is eligible, but x_5 does not exist: its block would train nothing
        mtp_labels=[[12, 13], [13, 14], [14, X]],
        anchor_weights=[[1, H], [H, H], [H, 0]],  # anchors 1 2 | 2 3 | 3 -
        block_weights=[1, 1, 1],
        counts=[4, 5, 3],
        positions=[0, 1, 2, 3, 4, 1, 2, 2, 3, 3, 4],
    )


def test_six_tokens_three_masks() -> None:
    batch = single([10, 11, 12, 13, 14, 15], 3)
    check(
        batch,
        ntp_labels=[11, 12, 13, 14, 15, X],
        starts=[0, 1, 2, 3],
        mtp_labels=[[12, 13, 14], [13, 14, 15], [14, 15, X], [15, X, X]],
        anchor_weights=[[1, H, T], [H, T, T], [T, T, 0], [T, 0, 0]],  # anchors 1 2 3 | 2 3 4 | 3 4 - | 4 - -
        counts=[5, 9, 4],
        positions=[0, 1, 2, 3, 4, 5, 1, 2, 3, 2, 3, 4, 3, 4, 5, 4, 5, 6],
    )


def test_packed_documents() -> None:
    batch = single([10, 11, 12, 20, 21, 22], 2, documents=[0, 0, 0, 1, 1, 1])
    check(
        batch,
        position_ids=[0, 1, 2, 0, 1, 2],
        document_ids=[0, 0, 0, 1, 1, 1],
        ntp_labels=[11, 12, X, 21, 22, X],  # 12 does not predict 20
        starts=[0, 3],
        mtp_labels=[[12, X], [22, X]],
        anchor_weights=[[1, 0], [1, 0]],
        counts=[4, 2, 2],
        positions=[0, 1, 2, 0, 1, 2, 1, 2, 1, 2],
    )


def test_prompt_tokens_carry_no_loss() -> None:
    batch = single([10, 11, 12, 13, 14, 15], 2, labels=[X, X, X, 13, 14, 15])
    check(
        batch,
        ntp_labels=[X, X, 13, 14, 15, X],
        starts=[2, 3],  # the prompt's last token is eligible; 1 is not, though x_3 two ahead carries loss
        mtp_labels=[[14, 15], [15, X]],
        anchor_weights=[[1, H], [H, 0]],
        counts=[3, 3, 2],
    )


def test_a_second_turn_is_seen_across_one_ignored_token() -> None:
    batch = single([10, 11, 12, 13, 14], 3, labels=[X, 11, X, 13, 14])
    check(
        batch,
        ntp_labels=[11, X, 13, 14, X],
        starts=[0, 2],
        mtp_labels=[[X, 13, 14], [14, X, X]],
        anchor_weights=[[0, 1, H], [H, 0, 0]],  # anchors - 2 3 | 3
        counts=[3, 3, 2],
    )


def test_positions_past_the_context_are_dropped() -> None:
    batch = single([10, 11, 12, 13, 14, 15], 2, context=4)
    check(
        batch,
        starts=[0, 1, 2],
        mtp_labels=[[12, 13], [13, 14], [14, X]],  # m_2 after x_2 would be at position 4
        anchor_weights=[[1, H], [H, H], [H, 0]],
        counts=[5, 5, 3],
    )
    # The context counts within a document.
    batch = single([10, 11, 12, 20, 21, 22], 1, documents=[0, 0, 0, 1, 1, 1], context=2)
    check(batch, starts=[0, 3], mtp_labels=[[12], [22]], counts=[4, 2, 2])


def test_a_row_shorter_than_the_masks() -> None:
    batch = single([10, 11, 12], 4)
    check(batch, starts=[0], mtp_labels=[[12, X, X, X]], anchor_weights=[[1, 0, 0, 0]], counts=[2, 1, 1])


@pytest.mark.parametrize(("ids", "labels"), [([10, 11], None), ([10, 11, 12], [X, X, X])])
def test_a_row_without_blocks_has_one_empty_block(ids: list[int], labels: list[int] | None) -> None:
    batch = single(ids, 2, labels=labels)
    check(batch, starts=[-1], mtp_labels=[[X, X]], anchor_weights=[[0, 0]], block_weights=[0])
    assert batch.counts.tolist() == ([1, 0, 0] if labels is None else [0, 0, 0])


def test_rows_of_a_batch_are_padded() -> None:
    rows = [token_row([10, 11, 12, 13], row_id=5), token_row([20, 21, 22], row_id=7)]
    batch = build_masked_input(rows, 2, pad_to_multiple_of=3)
    assert batch.input_ids.tolist() == [[10, 11, 12, 13, 0, 0], [20, 21, 22, 0, 0, 0]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 0, 0], [0, 1, 2, 0, 0, 0]]
    assert batch.document_ids.tolist() == [[0, 0, 0, 0, -1, -1], [0, 0, 0, -1, -1, -1]]
    assert batch.ntp_labels.tolist() == [[11, 12, 13, X, X, X], [21, 22, X, X, X, X]]
    assert batch.starts.tolist() == [[0, 1], [0, -1]]
    assert batch.mtp_labels.tolist() == [[[12, 13], [13, X]], [[22, X], [X, X]]]
    assert batch.anchor_weights.tolist() == [[[1, H], [H, 0]], [[1, 0], [0, 0]]]
    assert batch.block_weights.tolist() == [[1, 1], [1, 0]]
    assert batch.counts.tolist() == [5, 4, 3] and batch.counts.dtype == torch.int64
    assert batch.row_ids.tolist() == [5, 7]


def test_parts_by_hand() -> None:
    documents = torch.tensor([0, 0, 0, 1, 1, 2])
    assert document_positions(documents).tolist() == [0, 1, 2, 0, 1, 0]
    labels = torch.tensor([5, 6, X, 8, 9, 4])
    assert next_labels(labels, documents).tolist() == [6, X, X, 9, X, X]
    assert next_labels(labels, documents, 2).tolist() == [X, X, X, X, X, X]
    assert next_labels(labels, documents, 9).tolist() == [X] * 6
    assert mtp_labels(torch.tensor([5, 6, 7, 8]), torch.zeros(4), 2).tolist() == [[7, 8], [8, X], [X, X], [X, X]]


def test_values_at_anchors() -> None:
    states = torch.tensor([[0.0, 1.0, 2.0, 3.0]])
    starts = torch.tensor([[0, 2, -1]])
    batch = build_masked_input([token_row([4])], 2)._replace(starts=starts, mtp_labels=torch.zeros(1, 3, 2))
    assert batch.at_anchors(states).tolist() == [[[1, 2], [3, 3], [0, 1]]]  # clamped where there is no label
    deep = torch.stack([states, states + 10], dim=-1)
    assert batch.at_anchors(deep)[0, 0].tolist() == [[1, 11], [2, 12]]
    assert batch.at_anchors(deep).shape == (1, 3, 2, 2)


# ---------------------------------------------------------------------------------------------- attention


def sees_in_words(batch: MaskedInput, row: int, num_masks: int, query: int, key: int, window: int | None = None) -> bool:
    """docs/method.md §2, position by position: NTP sees earlier NTP of its document, m_j sees x_0..x_i and m_1..m_j."""
    L = batch.input_ids.shape[1]
    documents = batch.document_ids[row].tolist()
    place = batch.position_ids[row].tolist()

    def describe(index: int) -> tuple[int, int, int, int]:  # start, j (0 at NTP), document, position id
        if index < L:
            return index, 0, documents[index], place[index]
        block, j = divmod(index - L, num_masks)
        start = int(batch.starts[row, block])
        return start, j + 1, documents[start] if start >= 0 else -1, (place[start] if start >= 0 else place[0]) + j + 1

    start, j, document, position = describe(query)
    other_start, other_j, other_document, other_position = describe(key)
    if query == key:
        return True
    if document < 0 or document != other_document or start < 0 or other_start < 0:
        return False
    if window is not None and position - other_position >= window:
        return False
    if other_j == 0:
        return other_start <= start
    return j > 0 and other_start == start and other_j <= j


@pytest.mark.parametrize("window", [None, 1, 2, 3])
@pytest.mark.parametrize("num_masks", [1, 2, 3])
def test_dense_mask_is_the_rule_in_words(num_masks: int, window: int | None) -> None:
    rows = [
        token_row([10, 11, 12, 13, 14, 15], documents=[0, 0, 0, 0, 1, 1]),
        token_row([20, 21, 22, 23], labels=[X, X, 22, 23], row_id=1),
        token_row([30, 31, 32, 33, 34], documents=[0, 0, 1, 1, 1], row_id=2),
    ]
    batch = build_masked_input(rows, num_masks)
    L = batch.input_ids.shape[1]
    mask = dense_mask(attention_pattern(batch, num_masks), L, window)
    S = L + batch.starts.shape[1] * num_masks
    assert mask.shape == (3, 1, S, S) and mask.dtype == torch.bool
    real = torch.cat([batch.document_ids >= 0, (batch.starts >= 0).repeat_interleave(num_masks, 1)], 1)
    for row in range(3):
        for query in range(S):
            if not real[row, query]:  # padding may see anything, but not nothing
                assert mask[row, 0, query, query]
                continue
            for key in range(S):
                expected = sees_in_words(batch, row, num_masks, query, key, window)
                assert bool(mask[row, 0, query, key]) == expected, (row, query, key)


def test_dense_mask_by_hand() -> None:
    """The table of masking.py: k = 2, four tokens, blocks after x_0 and x_1."""
    batch = single([10, 11, 12, 13], 2)
    mask = dense_mask(attention_pattern(batch, 2), 4)[0, 0].int().tolist()
    assert mask == [
        [1, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0, 0],
        [1, 0, 0, 0, 1, 0, 0, 0],
        [1, 0, 0, 0, 1, 1, 0, 0],
        [1, 1, 0, 0, 0, 0, 1, 0],
        [1, 1, 0, 0, 0, 0, 1, 1],
    ]


def test_sliding_window_counts_positions_not_indices() -> None:
    batch = single([10, 11, 12, 13, 14], 2)  # blocks after x_0, x_1, x_2 at indices 5.., 7.., 9..
    sees = mask_mod(attention_pattern(batch, 2), 5, window=2)
    zero = torch.tensor(0)

    def seen(query: int) -> list[int]:
        return [key for key in range(11) if bool(sees(zero, zero, torch.tensor(query), torch.tensor(key)))]

    assert seen(3) == [2, 3]
    assert seen(9) == [2, 9]  # m_1 after x_2 is at 3: of x_0..x_2 only x_2 is nearer than 2
    assert seen(10) == [9, 10]  # m_2 is at 4: x_2 is 2 away
    wide = mask_mod(attention_pattern(batch, 2), 5, window=None)
    assert [key for key in range(11) if bool(wide(zero, zero, torch.tensor(10), torch.tensor(key)))] == [0, 1, 2, 9, 10]


# ---------------------------------------------------------------------------------------------- anchors and sampling


def test_anchor_weights_are_a_plain_mean_over_shared_anchors() -> None:
    """Summed with the weights, numbers at MTP positions give the sum over anchors of their mean over S(t)."""
    generator = torch.Generator().manual_seed(0)
    ids = list(range(100, 112))
    labels = [token if torch.rand(1, generator=generator) < 0.7 else X for token in ids]
    documents = [0] * 5 + [1] * 7
    K = 3
    batch = single(ids, K, labels=labels, documents=documents)
    values = torch.rand(batch.mtp_labels.shape, generator=generator)
    at_anchor: dict[int, list[float]] = {}
    for block, start in enumerate(batch.starts[0].tolist()):
        for j in range(1, K + 1):
            label = start + j + 1
            if label < len(ids) and labels[label] != X and documents[label] == documents[start]:
                at_anchor.setdefault(start + j, []).append(float(values[0, block, j - 1]))
    expected = sum(sum(found) / len(found) for found in at_anchor.values())
    assert len(at_anchor) > 3 and max(len(found) for found in at_anchor.values()) > 1
    torch.testing.assert_close(float((values * batch.anchor_weights).sum()), expected, rtol=1e-6, atol=0)  # float32 sums
    assert batch.counts[ANCHOR] == len(at_anchor)
    assert batch.counts[MTP] == sum(len(found) for found in at_anchor.values())


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


def test_every_start_is_as_likely_as_another() -> None:
    eligible = torch.tensor([2, 3, 5, 8, 13])
    generator = torch.Generator().manual_seed(0)
    drawn = torch.cat([sample_starts(eligible, 2, generator) for _ in range(5000)])
    counts = torch.stack([(drawn == start).sum() for start in eligible])
    assert counts.sum() == 10_000
    assert ((counts - 2000).abs() < 4 * (5000 * 0.4 * 0.6) ** 0.5).all()  # 4 standard deviations of a binomial
    assert sample_starts(eligible, 5, generator) is eligible
