# SPDX-License-Identifier: Apache-2.0
"""One decoding step: one forward pass of the base that verifies each row's draft and makes the next one. No loop.

Source: Samragh et al. 2025, §2.4.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mtp_lightning.decoding.acceptance import VerifiedStep, base_tokens, num_accepted
from mtp_lightning.decoding.candidates import Candidates
from mtp_lightning.decoding.row_cache import RowCache
from mtp_lightning.decoding.step_masks import StepLayout
from mtp_lightning.decoding.token_choice import Prefixes, TokenChoice
from mtp_lightning.modeling.decoder import run_decoder
from mtp_lightning.modeling.network import MTPNetwork


class StepInput(NamedTuple):
    """What one decoding step feeds."""

    tokens: Tensor  # the prompts, or each row's last verified token and its draft, [B, T] int64
    num_drafts: int  # how many of the last tokens are drafts, c
    # which of them are to be verified, [B, c] bool; None: all. A row may have fewer than others
    verify_mask: Tensor | None
    num_verified: list[int] | None  # the same as a number for each row
    draft_scores: Tensor | None  # what drafts were drawn from, [B, c, V], for the rejection rule; else None
    layouts: tuple[StepLayout, ...]  # layouts of the rows, of one size; a single one is all rows'
    layout_index: Tensor | None  # which of the layouts each row has, [B] int64; None with a single one
    position_ids: Tensor  # [B or 1, Q] int64
    attention_mask: Any  # the decoder's mask argument
    lengths: list[int]  # verified tokens of each row, so the absolute position of the first token to choose
    first_positions: Tensor  # the same on the device, [B] int64
    cache: RowCache  # keys and values of the verified tokens before ``tokens``
    choice: TokenChoice  # how tokens are chosen
    sampler_head: bool  # True to draft with the sampler head
    max_new_drafts: int  # drafts to make, at most the masks of a block
    # False: the logits of the verified positions are a product of their own, whose shape does not depend on drafting
    joint_logits: bool

    def run(self, network: MTPNetwork) -> StepOutput:
        """See ``decode_step``."""
        return decode_step(network, self)


class Drafts(NamedTuple):
    """The next draft of each row."""

    tokens: Tensor  # [B, J] int64
    scores: Tensor | None  # what they were chosen from, [B, J, V]; None if unused


MAX_JOINT_MASKS = {"cpu": 16, "cuda": 128}
"""Masks of all rows up to which their logits and those of verification are one product, which reads the unembedding once.

With more the product is no longer bound by reading it; then the logits of the block that drafts are a product of their own.
"""


class StepOutput(NamedTuple):
    """What one decoding step gives. All on the device: nothing here waits for it."""

    base_tokens: Tensor  # the base model's own token after each verified position, [B, c + 1] int64
    num_accepted: Tensor  # draft tokens accepted in each row, a, [B] int64; the row gains ``base_tokens[:, : a + 1]``
    # the drafts for the next step; of a row as many count as the block after its last accepted token has masks
    drafts: Drafts

    def packed(self) -> Tensor:
        """All that the host needs of each row: accepted drafts, base tokens, the next drafts, [B, 1 + c + 1 + J] int64."""
        return torch.cat([self.num_accepted[:, None], self.base_tokens, self.drafts.tokens], dim=1)


class RowOutput(NamedTuple):
    """What a step gives for one row, on the host."""

    tokens: list[int]  # accepted drafts and the base model's own token
    drafts: list[int]  # the next drafts, J


def read_rows(packed: Tensor, num_drafts: int) -> list[RowOutput]:
    """``StepOutput.packed`` of a step that was fed ``num_drafts`` drafts, c; the one place that waits for the device."""
    return [RowOutput(row[1 : row[0] + 2], row[num_drafts + 2 :]) for row in packed.tolist()]


def draft_block(
    model: MTPNetwork,
    hidden: Tensor,
    verified: Tensor,
    positions: Tensor,
    choice: TokenChoice,
    sampler_head: bool,
    logits: Tensor | None = None,
) -> Drafts:
    """Draft the tokens of one block a row, one after another, with the sampler head if asked for and present.

    ``hidden`` [B, J, D] are the hidden states of m_1..m_J, and ``logits`` [B, J, V] the base head's logits of these, if they
    are known; ``verified`` [B] is the token at m_1's position, chosen by the base head, and ``positions`` [B] its absolute
    position.
    """
    J = hidden.shape[1]
    at = positions[:, None] + torch.arange(1, J + 1, device=positions.device)
    if not sampler_head or model.sampler_head is None:
        return _drafts(*choice.draft(model.unembed(hidden) if logits is None else logits, at), choice, None)
    candidates = None
    if choice.num_candidates is not None:
        logits = model.unembed(hidden) if logits is None else logits
        candidates = Candidates(model.unembed, logits, choice.num_candidates)
    head, dtype = model.sampler_head, next(model.sampler_head.parameters()).dtype
    indices, scores, previous, state = [], [], verified, None
    for j in range(J):
        output, state = head.step(hidden[:, j].to(dtype), model.embed(previous).to(dtype), state)
        output = output.to(hidden.dtype)
        if candidates is None:
            index, score = choice.draft(model.unembed(output)[:, None], at[:, j : j + 1])
            previous = index[:, 0]
        else:
            tokens = candidates.tokens[:, j]
            index, score = choice.draft(candidates.logits(j, output)[:, None], at[:, j : j + 1], tokens[:, None])
            previous = tokens.gather(1, index)[:, 0]
        indices.append(index)
        scores.append(score)
    return _drafts(torch.cat(indices, 1), torch.cat(scores, 1), choice, candidates)


def _drafts(indices: Tensor, scores: Tensor, choice: TokenChoice, candidates: Candidates | None) -> Drafts:
    """Drafts given by their index [B, J] among the scores [B, J, V], or [B, J, m] of candidates."""
    tokens = indices
    if candidates is not None:
        tokens = candidates.tokens.gather(-1, indices[..., None])[..., 0]
        scores = candidates.spread(scores) if choice.use_rejection_sampling else scores
    return Drafts(tokens, scores if choice.use_rejection_sampling else None)


def verify(step: StepInput, logits: Tensor) -> tuple[Tensor, Tensor]:
    """The base model's own tokens [B, c + 1], and how many drafts of each row are accepted [B].

    ``logits`` are those at the last verified token and the drafts, [B, c + 1, V].
    """
    c, choice = step.num_drafts, step.choice
    scores = choice.target(logits, Prefixes(step.cache.tokens, step.lengths, step.num_verified))
    draft = step.tokens[:, step.tokens.shape[1] - c :]
    positions = step.first_positions[:, None] + torch.arange(c + 1, device=step.first_positions.device)
    verified = VerifiedStep(scores, positions, draft, step.verify_mask, step.draft_scores)
    tokens = base_tokens(choice, verified)
    return tokens, num_accepted(draft, tokens, step.verify_mask) if c else torch.zeros_like(tokens[:, 0])


@functools.lru_cache(maxsize=1024)
def mask_index(layout: StepLayout, device: torch.device) -> Tensor:
    """Which mask embedding each mask position has, [M] int64."""
    return torch.tensor([j for _, masks in layout.blocks for j in range(masks)], device=device)


@functools.lru_cache(maxsize=1024)
def block_index(layouts: tuple[StepLayout, ...], num_drafts: int, device: torch.device) -> Tensor:
    """Where, for each layout and number of accepted drafts, the next draft's block is among the masks.

    Without a block after the last accepted token some other one is read, and the draft does not count. The layouts have
    the same number of masks; the result is [layouts, c + 1, J] int64.
    """
    depth, last = max(layout.depth for layout in layouts), layouts[0].num_mtp - 1
    begins = [[layout.block_after(a)[0] for a in range(num_drafts + 1)] for layout in layouts]
    return torch.tensor([[[min(b + j, last) for j in range(depth)] for b in row] for row in begins], device=device)


def decode_step(model: MTPNetwork, step: StepInput) -> StepOutput:
    """One forward pass of the base: verify the drafts, and draft again from the block after the last accepted token."""
    B, T = step.tokens.shape
    layouts, num_mtp, size = step.layouts, step.layouts[0].num_mtp, step.layouts[0].size
    num_new_drafts = min(max(layout.depth for layout in layouts), step.max_new_drafts)
    # 1. Tokens, then masks; all layouts have the same masks, block after block, at the same indices.
    inputs = model.embed(step.tokens)
    if num_mtp:
        masks = model.mask_inputs().to(inputs.dtype).index_select(0, mask_index(layouts[0], inputs.device))
        inputs = torch.cat([inputs, masks.expand(B, -1, -1)], dim=1)
    with model.gate.over_last(num_mtp if model.lora.gated else size):
        hidden = run_decoder(model.base, inputs, step.attention_mask, step.position_ids, step.cache)
    # 2. Verify at the last verified token and the drafts.
    mask_states = hidden[:, T:]
    logits, mask_logits = _logits(model, step, _verified_states(step, hidden), mask_states)
    tokens, accepted = verify(step, logits)
    if not num_new_drafts:
        return StepOutput(tokens, accepted, Drafts(tokens[:, :0], None))
    # 3. Draft from the block after the last accepted token.
    index = _next_block(step, accepted)[:, :num_new_drafts]
    block = take_positions(mask_states, index)
    block_logits = None if mask_logits is None else take_positions(mask_logits, index)
    verified = tokens.gather(1, accepted[:, None])[:, 0]
    drafts = draft_block(
        model, block, verified, step.first_positions + accepted, step.choice, step.sampler_head, block_logits
    )
    return StepOutput(tokens, accepted, drafts)


def _verified_states(step: StepInput, hidden: Tensor) -> Tensor:
    """The hidden states at the last verified token and the drafts, [B, c + 1, D]."""
    c, layouts = step.num_drafts, step.layouts
    if len({layout.last for layout in layouts}) == 1:
        return hidden[:, layouts[0].last : layouts[0].last + c + 1]
    assert step.layout_index is not None  # prompts of different lengths
    last = torch.tensor([layout.last for layout in layouts], device=hidden.device).index_select(0, step.layout_index)
    return take_positions(hidden, last[:, None] + torch.arange(c + 1, device=hidden.device))


def _next_block(step: StepInput, accepted: Tensor) -> Tensor:
    """Where each row's next draft comes from: the block after its last accepted token, among the masks [B, J] int64."""
    index = block_index(step.layouts, step.num_drafts, accepted.device)
    return index[0].index_select(0, accepted) if step.layout_index is None else index[step.layout_index, accepted]


def take_positions(x: Tensor, index: Tensor) -> Tensor:
    """The positions ``index`` [B, N] of each row of x [B, L, D]."""
    return x[torch.arange(len(x), device=x.device)[:, None], index]  # on a CPU gather is several times slower


def _logits(model: MTPNetwork, step: StepInput, states: Tensor, mask_states: Tensor) -> tuple[Tensor, Tensor | None]:
    """Logits of the verified positions, and of all masks where the base head is needed there and they come nearly free."""
    num_masks = mask_states.shape[0] * mask_states.shape[1]
    uses_base_head = not step.sampler_head or model.sampler_head is None or step.choice.num_candidates is not None
    if not step.joint_logits or not uses_base_head or not 0 < num_masks <= MAX_JOINT_MASKS.get(states.device.type, 0):
        return model.unembed(states), None
    logits = model.unembed(torch.cat([states, mask_states], dim=1))
    return logits[:, : states.shape[1]], logits[:, states.shape[1] :]
