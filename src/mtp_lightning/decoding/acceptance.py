# SPDX-License-Identifier: Apache-2.0
"""How drafts are verified: the base model's own token at each position of a draft, and how many drafts equal it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mtp_lightning.decoding.noise import ACCEPT_STREAM, RESIDUAL_STREAM, noise_keys, uniform_noise
from mtp_lightning.decoding.token_choice import TokenChoice


class VerifiedStep(NamedTuple):
    """What verification reads."""

    scores: Tensor  # target scores, [B, c + 1, V]
    positions: Tensor  # absolute positions, [B, c + 1] int64
    draft: Tensor  # draft tokens, [B, c] int64
    verify_mask: Tensor | None  # which of them are to be verified, [B, c] bool; None: all
    draft_scores: Tensor | None  # what they were drawn from, [B, c, V]; None with coupled verification


def base_tokens(choice: TokenChoice, step: VerifiedStep) -> Tensor:
    """The base model's own token at each position, each as if all drafts before it were accepted, [B, c + 1] int64.

    Coupled, it is drawn whatever the draft is, so the text is a function of prompt and seed alone.
    """
    return _by_rejection(choice, step) if choice.use_rejection_sampling else choice.draw(step.scores, step.positions)


def _by_rejection(choice: TokenChoice, step: VerifiedStep) -> Tensor:
    """Speculative sampling (Leviathan et al. 2023): accepts more drafts; only the distribution of the text is the base's.

    A draft token d is accepted with probability min(1, p(d) / q(d)); else the token is drawn from the normalised
    max(p - q, 0), and where there is no draft from p. Whether there is one must not depend on d.
    """
    scores, positions, draft, verify_mask, draft_scores = step
    c = draft.shape[1]
    if verify_mask is None:
        verify_mask = torch.ones_like(draft, dtype=torch.bool)
    p = scores.double().softmax(-1)
    weights = p
    accept = torch.zeros_like(verify_mask)
    if draft_scores is not None:
        q = draft_scores.double().softmax(-1)
        at = draft[..., None]
        u = uniform_noise(noise_keys(choice.seeds, positions[:, :c], ACCEPT_STREAM))
        accept = verify_mask & (u * q.gather(-1, at)[..., 0] < p[:, :c].gather(-1, at)[..., 0])
        rest = (p[:, :c] - q).clamp_(min=0)
        # Where p and q are equal nothing is ever rejected, but rounding may leave nothing to draw from.
        rest = torch.where(verify_mask[..., None] & (rest.sum(-1, keepdim=True) > 0), rest, p[:, :c])
        weights = torch.cat([rest, p[:, c:]], dim=1)
    drawn = choice.draw(weights.log(), positions, RESIDUAL_STREAM)
    return torch.cat([torch.where(accept, draft, drawn[:, :c]), drawn[:, c:]], dim=1)


def num_accepted(draft: Tensor, base_tokens: Tensor, verify_mask: Tensor | None = None) -> Tensor:
    """How many draft tokens are accepted, [B] int64: the run of equal tokens from the front.

    ``draft [[5, 6, 7]], base_tokens [[5, 6, 9, 2]] -> [2]``; ``verify_mask`` [B, c] says which draft tokens count.
    """
    equal = draft == base_tokens[:, : draft.shape[1]]
    if verify_mask is not None:
        equal = equal & verify_mask
    return equal.long().cumprod(1).sum(1)
