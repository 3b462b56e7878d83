# SPDX-License-Identifier: Apache-2.0
"""Teacher-forced figures of a forward pass: next-token loss, and which greedy drafts are right."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mtp_lightning.losses.base import Unembedding
from mtp_lightning.losses.chunked import chunk_size
from mtp_lightning.types import IGNORE_INDEX, HiddenStates, MaskedInput


class Measurement(NamedTuple):
    """Teacher-forced figures of one batch."""

    ntp_loss: Tensor  # sum of the base head's cross-entropy over NTP positions that carry loss, scalar float64
    # True where the greedy draft at m_j (the sampler head's, else the base head's) is the text's token, [B, P, K] bool.
    # The head sees the true previous tokens, which up to the first miss are the ones it drafted itself.
    hits: Tensor
    reference: Tensor  # the same for the base model's own teacher-forced argmax at the anchor, [B, P, K] bool
    valid: Tensor  # MTP positions whose label counts, [B, P, K] bool


def greedy_tokens(hidden: Tensor, unembed: Unembedding) -> Tensor:
    """The most likely token at each position of hidden states [..., D], a chunk of logits at a time; [...] int64."""
    flat = hidden.flatten(0, -2)
    size = chunk_size(hidden, unembed.vocab_size)
    return torch.cat([unembed(chunk).argmax(-1) for chunk in flat.split(size)]).view(hidden.shape[:-1])


@torch.no_grad()
def measure(states: HiddenStates, batch: MaskedInput, unembed: Unembedding) -> Measurement:
    """Teacher-forced figures of one batch; no gradient."""
    valid = batch.mtp_labels != IGNORE_INDEX
    counted = batch.ntp_labels != IGNORE_INDEX
    loss = torch.zeros((), dtype=torch.float64, device=valid.device)
    size = chunk_size(states.ntp, unembed.vocab_size)
    for chunk, labels in zip(states.ntp[counted].split(size), batch.ntp_labels[counted].split(size), strict=True):
        if len(labels):
            loss += F.cross_entropy(unembed(chunk).double(), labels, reduction="sum")
    drafts = greedy_tokens(states.mtp if states.sampler is None else states.sampler, unembed)
    base_tokens = batch.at_anchors(greedy_tokens(states.ntp, unembed))
    return Measurement(loss, (drafts == batch.mtp_labels) & valid, (base_tokens == batch.mtp_labels) & valid, valid)
