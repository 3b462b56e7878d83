# SPDX-License-Identifier: Apache-2.0
"""Greedy draft tokens from the hidden states of blocks, as ``decoding/execution/step.py`` makes them. No vLLM."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mtp_lightning.decoding.candidates import Candidates, Unembedding
from mtp_lightning.sampler_heads import SamplerHead


def draft_greedily(
    head: SamplerHead | None,
    embed: Callable[[Tensor], Tensor],
    unembed: Unembedding,
    hidden: Tensor,
    logits: Tensor | None,
    verified: Tensor,
    num_candidates: int | None,
) -> Tensor:
    """Draft the tokens of one block a row, one after another.

    Args:
        head: the sampler head, or None to draft from the base head.
        embed: from token ids to embeddings.
        unembed: the base's unembedding.
        hidden: hidden states of m_1..m_J, [B, J, D].
        logits: the base head's logits of these, [B, J, V]; None: they are computed here where they are needed.
        verified: the token at m_1's position, [B] int64.
        num_candidates: tokens that the sampler head chooses from; None: the whole vocabulary.

    Returns:
        Draft tokens, [B, J] int64.
    """
    if logits is None and (head is None or num_candidates is not None):
        logits = unembed(hidden)
    if head is None:
        assert logits is not None
        return logits.argmax(-1)
    candidates = None if num_candidates is None or logits is None else Candidates(unembed, logits, num_candidates)
    drafts, previous, state, dtype = [], verified, None, next(head.parameters()).dtype
    for j in range(hidden.shape[1]):
        output, state = head.step(hidden[:, j].to(dtype), embed(previous).to(dtype), state)
        output = output.to(hidden.dtype)
        if candidates is None:
            previous = unembed(output).argmax(-1)
        else:
            best = candidates.logits(j, output).argmax(-1, keepdim=True)
            previous = candidates.tokens[:, j].gather(1, best)[:, 0]
        drafts.append(previous)
    return torch.stack(drafts, 1)
