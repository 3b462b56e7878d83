# SPDX-License-Identifier: Apache-2.0
"""One decoding step: one forward pass of the base that verifies each row's draft and makes the next one. No loop.

Source: Samragh et al. 2025, §2.4.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mtp_lightning.decoding.execution.decode_cache import decode_cache
from mtp_lightning.decoding.row_cache import RowCache
from mtp_lightning.decoding.step_masks import StepLayout
from mtp_lightning.decoding.token_choice import Prefixes, TokenChoice
from mtp_lightning.modeling.decoder import run_decoder
from mtp_lightning.modeling.network import MTPNetwork


class StepInput(NamedTuple):
    """What one decoding step feeds.

    Attributes:
        tokens: the prompts, or each row's last verified token and its draft, [B, T] int64.
        num_drafts: how many of the last tokens are drafts, c.
        drafted: which of them are to be verified, [B, c] bool; None: all. A row may have fewer than others.
        draft_scores: what drafts were drawn from, [B, c, V], for the rejection rule; else None.
        layouts: layouts of the rows, of one size; a single one is all rows'.
        choice: which of the layouts each row has, [B] int64; None with a single one.
        position_ids: [B or 1, Q] int64.
        attention_mask: the decoder's mask argument.
        ends: tokens of each row up to the last verified one, so the absolute position of the first token to choose.
        first: the same on the device, [B] int64.
        cache: keys and values of the verified tokens before ``tokens``.
        token_choice: how tokens are chosen.
        sampler_head: whether to draft with the sampler head.
        counts: drafts of each row that are to be verified, as ``drafted`` says it on the device; None: all.
    """

    tokens: Tensor
    num_drafts: int
    drafted: Tensor | None
    draft_scores: Tensor | None
    layouts: tuple[StepLayout, ...]
    choice: Tensor | None
    position_ids: Tensor
    attention_mask: Any
    ends: list[int]
    first: Tensor
    cache: RowCache
    token_choice: TokenChoice
    sampler_head: bool
    counts: list[int] | None = None

    def run(self, network: MTPNetwork) -> StepOutput:
        """See ``decode_step``."""
        return decode_step(network, self)


class Drafts(NamedTuple):
    """The next draft of each row.

    Attributes:
        tokens: [B, J] int64; fewer where going on was not worth it.
        scores: what they were chosen from, [B, J, V]; None where nothing will ask.
        probabilities: the drafting head's probability of each, [B, J]; None where nothing will ask.
    """

    tokens: Tensor
    scores: Tensor | None
    probabilities: Tensor | None = None


PARTS = 1 << 20
"""Probabilities travel to the host as whole numbers of this part, beside the tokens."""


class StepOutput(NamedTuple):
    """What one decoding step gives. All on the device: nothing here waits for it.

    Attributes:
        own: the base model's own token after each verified position, [B, c + 1] int64.
        num_accepted: draft tokens kept in each row, a, [B] int64; ``own[:, : a + 1]`` are the tokens gained.
        draft: the draft for the next step; as many of a row's tokens hold as the block after its last kept token has masks.
    """

    own: Tensor
    num_accepted: Tensor
    draft: Drafts

    def numbers(self) -> Tensor:
        """What the host wants to know, in one piece: drafts kept, own tokens, and in ``PARTS`` the drafts' probabilities.

        Returns:
            [B, 1 + c + 1 (+ J)] int64.
        """
        parts = [self.num_accepted[:, None], self.own]
        if self.draft.probabilities is not None:
            parts.append((self.draft.probabilities * PARTS).long())
        return torch.cat(parts, dim=1)


def num_accepted(draft: Tensor, own: Tensor, drafted: Tensor | None = None) -> Tensor:
    """How many draft tokens are kept: the run of equal tokens from the front.

    ``draft [[5, 6, 7]], own [[5, 6, 9, 2]] -> [2]``

    Args:
        draft: [B, c] int64.
        own: the base model's tokens, [B, c + 1] int64.
        drafted: which draft tokens count, [B, c] bool; None: all.

    Returns:
        [B] int64.
    """
    equal = draft == own[:, : draft.shape[1]]
    if drafted is not None:
        equal = equal & drafted
    return equal.long().cumprod(1).sum(1)


def draft_block(
    model: MTPNetwork, hidden: Tensor, verified: Tensor, positions: Tensor, choice: TokenChoice, sampler_head: bool
) -> Drafts:
    """Draft the tokens of one block a row, one after another.

    Args:
        model: the model.
        hidden: hidden states of m_1..m_J, [B, J, D].
        verified: the token that stands at m_1's position, chosen by the base head, [B] int64.
        positions: its absolute position, [B] int64.
        choice: how tokens are chosen.
        sampler_head: whether to use the sampler head.

    Returns:
        The drafts.
    """
    unembed, head, J = choice.shortlist or model.unembed, model.sampler_head, hidden.shape[1]
    at = positions[:, None] + torch.arange(1, J + 1, device=positions.device)
    if not sampler_head or head is None:
        return _drafts(*choice.draft(unembed(hidden), at), choice)
    chain = decode_cache(model).chain(model)
    chain.begin(hidden)
    places, chosen_from, previous = [], [], verified
    reached = torch.ones(len(verified), device=hidden.device)
    for j in range(J):
        place, score = choice.draft(unembed(chain.next(j, previous))[:, None], at[:, j : j + 1])
        previous = choice.drafted(place)[:, 0]
        places.append(place)
        chosen_from.append(score)
        if choice.least > 0 and j + 1 < J:
            reached = reached * _probability(score, place)[:, 0]
            if float(reached.max()) < choice.least:  # only where nothing has to wait for the number: see TokenChoice
                break
    return _drafts(torch.cat(places, 1), torch.cat(chosen_from, 1), choice)


def _probability(scores: Tensor, places: Tensor) -> Tensor:
    wide = scores if scores.dtype == torch.float64 else scores.float()
    return (wide.gather(-1, places[..., None])[..., 0] - wide.logsumexp(-1)).exp()


def _drafts(places: Tensor, scores: Tensor, choice: TokenChoice) -> Drafts:
    probabilities = _probability(scores, places) if choice.confident else None
    if choice.rejects and choice.shortlist is not None:
        scores = choice.shortlist.spread(scores)
    return Drafts(choice.drafted(places), scores if choice.rejects else None, probabilities)


def verify(step: StepInput, logits: Tensor) -> tuple[Tensor, Tensor]:
    """The base model's own tokens, and how many drafts of each row are kept.

    Args:
        step: what was fed.
        logits: at the last verified token and the drafts, [B, c + 1, V].

    Returns:
        Tokens [B, c + 1] and counts [B].
    """
    c, choice = step.num_drafts, step.token_choice
    scores = choice.target(logits, Prefixes(step.cache.tokens, step.ends, step.counts))
    draft = step.tokens[:, step.tokens.shape[1] - c :]
    positions = step.first[:, None] + torch.arange(c + 1, device=step.first.device)
    if choice.rejects:
        drafted = torch.ones_like(draft, dtype=torch.bool) if step.drafted is None else step.drafted
        own = choice.reject(scores, draft, drafted, step.draft_scores, positions)
    else:
        own = choice.draw(scores, positions)
    return own, num_accepted(draft, own, step.drafted) if c else torch.zeros_like(own[:, 0])


@functools.lru_cache(maxsize=1024)
def mask_index(layout: StepLayout, device: torch.device) -> Tensor:
    """Which mask embedding each mask position has, [M] int64."""
    return torch.tensor([j for _, masks in layout.blocks for j in range(masks)], device=device)


@functools.lru_cache(maxsize=1024)
def block_index(layouts: tuple[StepLayout, ...], num_drafts: int, device: torch.device) -> Tensor:
    """For each layout and number of drafts kept, where the block that drafts on stands among the masks.

    Where there is no block after the last kept token some other one is read, and the draft does not count.

    Args:
        layouts: layouts with as many masks.
        num_drafts: c.
        device: device of the result.

    Returns:
        [layouts, c + 1, J] int64.
    """
    depth, last = max(layout.depth for layout in layouts), layouts[0].num_mtp - 1
    begins = [[layout.block_after(a)[0] for a in range(num_drafts + 1)] for layout in layouts]
    return torch.tensor([[[min(b + j, last) for j in range(depth)] for b in row] for row in begins], device=device)


def decode_step(model: MTPNetwork, step: StepInput) -> StepOutput:
    """One forward pass of the base: verify the drafts, and draft again from the block after the last kept token.

    Args:
        model: the model.
        step: what to feed.

    Returns:
        Tokens, counts and the next drafts.
    """
    B, T = step.tokens.shape
    layouts, c = step.layouts, step.num_drafts
    num_mtp, size, depth = layouts[0].num_mtp, layouts[0].size, max(layout.depth for layout in layouts)
    inputs = model.embed(step.tokens)
    if num_mtp:
        # All layouts have the same masks, block after block, at the same indices.
        masks = model.mask_embeddings.to(inputs.dtype).index_select(0, mask_index(layouts[0], inputs.device))
        inputs = torch.cat([inputs, masks.expand(B, -1, -1)], dim=1)
    with model.gate.open(num_mtp if model.lora.gated else size):
        hidden = run_decoder(model.base, inputs, step.attention_mask, step.position_ids, step.cache)
    if len({layout.last for layout in layouts}) == 1:
        verified = hidden[:, layouts[0].last : layouts[0].last + c + 1]
    else:
        assert step.choice is not None
        last = torch.tensor([layout.last for layout in layouts], device=hidden.device).index_select(0, step.choice)
        rows = torch.arange(B, device=hidden.device)
        verified = hidden[rows[:, None], last[:, None] + torch.arange(c + 1, device=hidden.device)]
    own, kept = verify(step, model.unembed(verified))
    if not depth:
        return StepOutput(own, kept, Drafts(own[:, :0], None))
    index = block_index(layouts, c, hidden.device)
    index = index[0].index_select(0, kept) if step.choice is None else index[step.choice, kept]
    block = hidden[:, T:].gather(1, index[..., None].expand(-1, -1, hidden.shape[-1]))
    chosen = own.gather(1, kept[:, None])[:, 0]
    draft = draft_block(model, block, chosen, step.first + kept, step.token_choice, step.sampler_head)
    return StepOutput(own, kept, draft)
