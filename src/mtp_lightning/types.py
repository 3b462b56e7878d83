# SPDX-License-Identifier: Apache-2.0
"""The named tuples that pass between files: rows of tokens, masked inputs, hidden states.

Letters in shapes, the same in all files: ``B`` rows, ``L`` tokens in a row, ``P`` blocks in a row, ``K`` masks in a
block, ``S = L + P * K`` positions after expansion, ``D`` hidden size, ``V`` vocabulary, ``N`` positions picked out.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

IGNORE_INDEX = -100
"""A label that no loss counts, as in Hugging Face's models."""


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of losses and trained weights for states of a dtype: float64 for float64, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class TokenRow(NamedTuple):
    """One row of tokens, of one document or of several packed ones, before blocks are placed.

    Attributes:
        input_ids: token ids, [L] int64.
        labels: ``input_ids`` where the token carries loss, ``IGNORE_INDEX`` elsewhere, [L] int64.
        document_ids: number of the document that each token belongs to, 0, 1, .. in order, [L] int64.
        row_id: number of the row in its data set; it seeds the row's block starts.
        domain: the row's domain, or an empty string.
    """

    input_ids: Tensor
    labels: Tensor
    document_ids: Tensor
    row_id: int
    domain: str = ""


class MaskedInput(NamedTuple):
    """A batch of token rows with mask blocks (docs/method.md §2), compact: no embedding, no attention mask.

    Attributes:
        input_ids: token ids, padded, [B, L] int64.
        position_ids: position of each token in its own document, [B, L] int64.
        document_ids: document of each token, -1 at padding, [B, L] int64.
        ntp_labels: the next token of each NTP position, ``IGNORE_INDEX`` where it carries no loss, is past the end or in
            another document, [B, L] int64.
        starts: index of each block's start in its row, -1 where the row has fewer blocks than P, [B, P] int64.
        mtp_labels: label of each MTP position, x_{i+j+1} or ``IGNORE_INDEX``, [B, P, K] int64.
        anchor_weights: 1 over the number of MTP positions that share this MTP position's anchor under full coverage, 0
            where the label is ignored, [B, P, K] float32 (the mean over S(t) of docs/method.md §5).
        block_weights: starts of the row that have a counted label over those that were given a block,
            [B, P] float32: makes a sum over sampled blocks an unbiased estimate of the sum over all.
        counts: denominators of the loss terms under full coverage: NTP labels, MTP labels, anchors; [3] int64. They
            add up over rows, and over the batches and ranks of one optimizer step.
        row_ids: number of each row in its data set, [B] int64.
        noise: a random number from 0 to 2^62 for each MTP position, [B, P, K] int64; it picks the random token that takes
            the place of the mask embedding with ``mask_tokens: noise``.
    """

    input_ids: Tensor
    position_ids: Tensor
    document_ids: Tensor
    ntp_labels: Tensor
    starts: Tensor
    mtp_labels: Tensor
    anchor_weights: Tensor
    block_weights: Tensor
    counts: Tensor
    row_ids: Tensor
    noise: Tensor

    def to(self, device: torch.device | str, non_blocking: bool = False) -> MaskedInput:
        """The same batch on ``device``."""
        # Lightning asks for a blocking copy of anything but a tensor, although the batch is pinned.
        non_blocking = non_blocking or torch.device(device).type == "cuda"
        return MaskedInput(*(field.to(device, non_blocking=non_blocking) for field in self))

    def first_masks(self, num_masks: int) -> MaskedInput:
        """The batch with the first masks of each block alone, weighted so that sums stay about the same."""
        K = self.mtp_labels.shape[2]
        return self._replace(
            mtp_labels=self.mtp_labels[:, :, :num_masks],
            anchor_weights=self.anchor_weights[:, :, :num_masks],
            block_weights=self.block_weights * (K / num_masks),
            noise=self.noise[:, :, :num_masks],
        )

    def at_anchors(self, values: Tensor) -> Tensor:
        """Values [B, L] or [B, L, D] at each MTP position's anchor i + j, clamped to the row: [B, P, K] or [B, P, K, D].

        Entries whose label is ignored are meaningless.
        """
        (B, P), K = self.starts.shape, self.mtp_labels.shape[2]
        anchors = self.starts[:, :, None] + torch.arange(1, K + 1, device=self.starts.device)
        index = anchors.clamp(0, values.shape[1] - 1).flatten(1)
        rows = torch.arange(B, device=values.device)[:, None]
        return values[rows, index].view(B, P, K, *values.shape[2:])


class HiddenStates(NamedTuple):
    """The decoder's output for a masked input, before any unembedding.

    Attributes:
        ntp: hidden state of each NTP position after the final norm, [B, L, D].
        mtp: hidden state of each MTP position after the final norm, [B, P, K, D].
        sampler: the sampler head's output at each MTP position, [B, P, K, D], or None without a sampler head.
        sampler_ntp: the sampler head's output at each NTP position, [B, L, D], or None if the head has none there.
    """

    ntp: Tensor
    mtp: Tensor
    sampler: Tensor | None
    sampler_ntp: Tensor | None


class LossSum(NamedTuple):
    """A loss term over one batch: its sum, and which count it is divided by.

    Attributes:
        total: sum of the per-position losses, scalar, differentiable.
        denominator: index into ``MaskedInput.counts``, or a tuple of indices whose counts are added up.
    """

    total: Tensor
    denominator: int | tuple[int, ...]


NTP, MTP, ANCHOR = 0, 1, 2
"""Indices into ``MaskedInput.counts``."""
