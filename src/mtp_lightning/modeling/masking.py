# SPDX-License-Identifier: Apache-2.0
"""From token rows to masked inputs: block starts, positions, labels, anchors and the attention pattern. Pure functions.

Source: Samragh et al. 2025, §2.1 and figure 4. For a block that starts at NTP position i, mask m_j (j = 1..k) has
position id i + j, label x_{i+j+1}, previous token x_{i+j} and anchor i + j; it sees x_0..x_i and m_1..m_j of its block.

With k = 2 and the row x_0 x_1 x_2 x_3, one block after x_0 is laid out as::

    index        0    1    2    3    4    5
    token        x_0  x_1  x_2  x_3  m_1  m_2
    position id  0    1    2    3    1    2
    label        x_1  x_2  x_3  -    x_2  x_3
    anchor       -    -    -    -    1    2
    sees         0    0-1  0-2  0-3  0,4  0,4-5

NTP positions come first in memory and blocks after them: one causal prefix, one tail.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mtp_lightning.types import IGNORE_INDEX, MaskedInput, TokenRow


def document_positions(document_ids: Tensor) -> Tensor:
    """Position of each token in its own document, [L] int64.

    ``[0, 0, 0, 1, 1] -> [0, 1, 2, 0, 1]``
    """
    index = torch.arange(len(document_ids))
    is_first = torch.ones(len(document_ids), dtype=torch.bool)
    is_first[1:] = document_ids[1:] != document_ids[:-1]
    return index - torch.where(is_first, index, 0).cummax(0).values


def next_labels(labels: Tensor, document_ids: Tensor, offset: int = 1) -> Tensor:
    """The label ``offset`` tokens after each position, ignored past the end and in another document, [L] int64.

    ``labels [5, 6, 7], offset 1 -> [6, 7, -100]``
    """
    out = torch.full_like(labels, IGNORE_INDEX)
    if offset < len(labels):
        is_same = document_ids[offset:] == document_ids[:-offset]
        out[:-offset] = torch.where(is_same, labels[offset:], IGNORE_INDEX)
    return out


def mtp_labels(labels: Tensor, document_ids: Tensor, num_masks: int) -> Tensor:
    """Labels of the masks of a block after every position, eligible or not: entry [i, j - 1] is x_{i+j+1}, [L, K] int64.

    ``labels [5, 6, 7, 8], num_masks 2 -> [[7, 8], [8, -100], [-100, -100], [-100, -100]]``
    """
    return torch.stack([next_labels(labels, document_ids, j + 1) for j in range(1, num_masks + 1)], dim=1)


def sample_starts(eligible: Tensor, num_blocks: int, generator: torch.Generator) -> Tensor:
    """A uniform subset of ``num_blocks`` of the eligible starts, without replacement, in order; all if there are fewer."""
    if num_blocks >= len(eligible):
        return eligible
    drawn = torch.randperm(len(eligible), generator=generator)[:num_blocks]
    return eligible[drawn.sort().values]


class _RowBlocks(NamedTuple):
    """The blocks of one row, not padded; see ``MaskedInput`` for the fields."""

    ntp_labels: Tensor
    starts: Tensor
    mtp_labels: Tensor
    anchor_weights: Tensor
    block_weights: Tensor
    counts: Tensor
    noise: Tensor


def _row_blocks(
    row: TokenRow, num_masks: int, num_blocks: Callable[[int], int], generator: torch.Generator, context: int | None
) -> _RowBlocks:
    offsets = torch.arange(1, num_masks + 1)
    ntp_labels = next_labels(row.labels, row.document_ids)
    labels_after = mtp_labels(row.labels, row.document_ids, num_masks)  # after every position
    if context is not None:
        positions = document_positions(row.document_ids)[:, None] + offsets
        labels_after = torch.where(positions < context, labels_after, IGNORE_INDEX)

    # Full coverage: the denominators come from it, whatever subset is drawn.
    eligible = (ntp_labels != IGNORE_INDEX).nonzero().flatten()
    is_counted = labels_after[eligible] != IGNORE_INDEX
    anchors = (eligible[:, None] + offsets)[is_counted]
    positions_per_anchor = torch.zeros(len(row.input_ids) + num_masks + 1, dtype=torch.float32)
    positions_per_anchor.index_put_((anchors,), torch.ones(len(anchors)), accumulate=True)
    counts = torch.tensor([len(eligible), len(anchors), int((positions_per_anchor > 0).sum())])

    # A start whose labels are all ignored (a document's last but one token) trains nothing, so it gets no block.
    useful = eligible[is_counted.any(1)]
    starts = sample_starts(useful, num_blocks(len(useful)), generator)
    labels = labels_after[starts]
    shared_by = positions_per_anchor[starts[:, None] + offsets].clamp_min(1)
    anchor_weights = torch.where(labels != IGNORE_INDEX, 1 / shared_by, 0.0)
    block_weights = torch.full((len(starts),), len(useful) / max(1, len(starts)))
    noise = torch.randint(1 << 62, labels.shape, generator=generator)
    return _RowBlocks(ntp_labels, starts, labels, anchor_weights, block_weights, counts, noise)


def _pad_and_stack(tensors: Sequence[Tensor], length: int, value: int) -> Tensor:
    """Stack tensors [n, ...] whose n differ to [B, length, ...]."""
    out = tensors[0].new_full((len(tensors), length, *tensors[0].shape[1:]), value)
    for padded, tensor in zip(out, tensors, strict=True):
        padded[: len(tensor)] = tensor
    return out


ROW_MULTIPLE, BLOCK_MULTIPLE = 32, 8
"""Training pads rows and blocks to these, so that shapes repeat: on a CPU each shape of a product keeps memory."""


def block_multiple(max_blocks_per_row: int | None) -> int:
    """What the blocks of a row are padded to a multiple of: no more than its most blocks."""
    return BLOCK_MULTIPLE if max_blocks_per_row is None else min(BLOCK_MULTIPLE, max_blocks_per_row)


def round_up(count: int, multiple: int) -> int:
    """The next multiple: ``round_up(33, 32) -> 64``."""
    return -(-count // multiple) * multiple


def build_masked_input(
    rows: Sequence[TokenRow],
    num_masks: int,
    *,
    block_fraction: float = 1.0,
    max_blocks_per_row: int | None = None,
    seed: int = 0,
    epoch: int = 0,
    context: int | None = None,
    row_multiple: int = 1,
    block_multiple: int = 1,
) -> MaskedInput:
    """Place blocks in every row and pad the rows to one batch.

    Starts and noise of a row depend on (seed, epoch, row id) alone: they are the same in any batch, on any number of ranks.

    Args:
        rows: token rows, at least one.
        num_masks: K, 1 or more.
        block_fraction: share of the eligible starts that get a block, above 0 and at most 1.
        max_blocks_per_row: upper bound of blocks in a row, or None.
        seed: seed of the starts and the noise.
        epoch: changes them from epoch to epoch; give a constant for validation.
        context: the model's context length; MTP positions at or past it are dropped. None: no limit.
        row_multiple: L is padded to a multiple of this.
        block_multiple: P is padded to a multiple of this, with empty blocks.

    Returns:
        The batch. P is at least 1: a batch without any block has one empty block, so that every trained parameter
        takes part in the forward pass on every rank.
    """

    def num_blocks(num_useful: int) -> int:
        wanted = max(1, round(num_useful * block_fraction))
        return wanted if max_blocks_per_row is None else min(wanted, max_blocks_per_row)

    blocks = []
    for row in rows:
        state = np.random.SeedSequence([seed, epoch, row.row_id]).generate_state(1, np.uint64)[0]
        generator = torch.Generator().manual_seed(int(state) >> 1)
        blocks.append(_row_blocks(row, num_masks, num_blocks, generator, context))

    longest, most_blocks = max(len(row.input_ids) for row in rows), max(1, max(len(b.starts) for b in blocks))
    L, P = round_up(longest, row_multiple), round_up(most_blocks, block_multiple)
    return MaskedInput(
        input_ids=_pad_and_stack([row.input_ids for row in rows], L, 0),
        position_ids=_pad_and_stack([document_positions(row.document_ids) for row in rows], L, 0),
        document_ids=_pad_and_stack([row.document_ids for row in rows], L, -1),
        ntp_labels=_pad_and_stack([b.ntp_labels for b in blocks], L, IGNORE_INDEX),
        starts=_pad_and_stack([b.starts for b in blocks], P, -1),
        mtp_labels=_pad_and_stack([b.mtp_labels for b in blocks], P, IGNORE_INDEX),
        anchor_weights=_pad_and_stack([b.anchor_weights for b in blocks], P, 0),
        block_weights=_pad_and_stack([b.block_weights for b in blocks], P, 0),
        counts=torch.stack([b.counts for b in blocks]).sum(0),
        row_ids=torch.tensor([row.row_id for row in rows]),
        noise=_pad_and_stack([b.noise for b in blocks], P, 0),
    )


class AttentionPattern(NamedTuple):
    """Who sees whom, as one small vector per quantity instead of an S x S mask."""

    documents: Tensor  # document of each position, -1 at padding and at empty blocks, [B, S] int64
    limits: Tensor  # row index of the last NTP position that is seen, [B, S] int64
    blocks: Tensor  # number of the block, -1 at NTP positions, [B, S] int64
    position_ids: Tensor  # i + j at m_j of the block that starts at i, [B, S] int64; sliding windows count in them


def attention_pattern(batch: MaskedInput, num_masks: int) -> AttentionPattern:
    """The attention pattern of a masked input with K masks in a block."""
    B, L = batch.input_ids.shape
    P, device = batch.starts.shape[1], batch.starts.device
    tokens = torch.arange(L, device=device).expand(B, L)
    starts = batch.starts.repeat_interleave(num_masks, dim=1)  # of each MTP position's block
    blocks = torch.arange(P, device=device).repeat_interleave(num_masks).expand(B, -1)
    offsets = torch.arange(1, num_masks + 1, device=device).repeat(P)
    documents = batch.document_ids.gather(1, starts.clamp_min(0)).masked_fill(starts < 0, -1)
    positions = batch.position_ids.gather(1, starts.clamp_min(0)) + offsets
    return AttentionPattern(
        documents=torch.cat([batch.document_ids, documents], 1),
        limits=torch.cat([tokens, starts], 1),
        blocks=torch.cat([torch.full_like(tokens, -1), blocks], 1),
        position_ids=torch.cat([batch.position_ids, positions], 1),
    )


def mask_mod(
    pattern: AttentionPattern, num_ntp: int, window: int | None = None
) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """The pattern as a function of (row, head, query, key): FlexAttention's ``mask_mod``, and the dense mask's rule.

    It takes index tensors and gives True where the query sees the key. ``num_ntp`` is L; the window is in positions.
    """
    documents, limits, blocks, positions = pattern

    def sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        is_ntp_key = (key < num_ntp) & (key <= limits[row, query])
        is_same_block = (key >= num_ntp) & (blocks[row, query] == blocks[row, key]) & (key <= query)
        seen = (documents[row, query] == documents[row, key]) & (is_ntp_key | is_same_block)
        if window is not None:
            seen = seen & (positions[row, query] - positions[row, key] < window)
        return seen | (query == key)  # a padded position sees itself, so that no softmax is over nothing

    return sees


def dense_mask(
    pattern: AttentionPattern, num_ntp: int, window: int | None = None, begin: int = 0, end: int | None = None
) -> Tensor:
    """The S x S mask, True where the query sees the key, or a range of its rows: [B, 1, end - begin, end] bool.

    ``num_ntp`` is L; the sliding window is in positions.
    """
    B, S = pattern.documents.shape
    end = S if end is None else end
    device = pattern.documents.device
    row = torch.arange(B, device=device)[:, None, None]
    queries = torch.arange(begin, end, device=device)[None, :, None]
    keys = torch.arange(end, device=device)[None, None, :]
    return mask_mod(pattern, num_ntp, window)(row, torch.zeros_like(row), queries, keys)[:, None]


def block_mask(pattern: AttentionPattern, num_ntp: int, num_masks: int, window: int | None = None) -> Tensor:
    """What each MTP position sees of the L NTP positions and the K of its own block: [B, 1, P * K, L + K] bool.

    ``num_ntp`` is L, ``num_masks`` K; the sliding window is in positions.
    """
    B, S = pattern.documents.shape
    device = pattern.documents.device
    queries = torch.arange(num_ntp, S, device=device)[:, None]
    first = queries - (queries - num_ntp) % num_masks  # of its block
    tokens = torch.arange(num_ntp, device=device).expand(len(queries), -1)
    keys = torch.cat([tokens, first + torch.arange(num_masks, device=device)], 1)
    row = torch.arange(B, device=device)[:, None, None]
    return mask_mod(pattern, num_ntp, window)(row, torch.zeros_like(row), queries[None], keys[None])[:, None]
