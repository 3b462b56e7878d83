# SPDX-License-Identifier: Apache-2.0
"""One decoding step: one forward pass of the base that verifies a draft and makes the next one. No loop, no options.

Source: Samragh et al. 2025, §2.4.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache

from mtp_lightning.step_masks import StepShape

if TYPE_CHECKING:
    from mtp_lightning.model import MTPModel


class StepInput(NamedTuple):
    """What one decoding step feeds.

    Attributes:
        tokens: the prompt, or the last verified token and the draft, [T] int64.
        num_drafts: how many of the last tokens are drafts.
        shape: tokens, blocks and masks fed.
        position_ids: [1, Q] int64.
        attention_mask: the decoder's mask argument.
        cache: keys and values of the verified tokens before ``tokens``.
        sampler_head: whether to draft with the sampler head.
    """

    tokens: Tensor
    num_drafts: int
    shape: StepShape
    position_ids: Tensor
    attention_mask: Any
    cache: DynamicCache
    sampler_head: bool


class StepOutput(NamedTuple):
    """What one decoding step gives. All on the device: nothing here waits for it.

    Attributes:
        own: the base model's own token after each verified position, [num_drafts + 1] int64.
        num_accepted: draft tokens kept, a, scalar int64; ``own[: a + 1]`` are the tokens gained.
        draft: the draft for the next step, [J] int64. Linear decoding: valid only if the whole draft was kept.
    """

    own: Tensor
    num_accepted: Tensor
    draft: Tensor


def num_accepted(draft: Tensor, own: Tensor) -> Tensor:
    """How many draft tokens are kept: the run of equal tokens from the front.

    ``draft [5, 6, 7], own [5, 6, 9, 2] -> 2``

    Args:
        draft: [c] int64.
        own: the base model's tokens, [c + 1] int64.

    Returns:
        Scalar int64.
    """
    return (draft == own[: len(draft)]).long().cumprod(0).sum()


def draft_block(model: MTPModel, hidden: Tensor, verified: Tensor, sampler_head: bool) -> Tensor:
    """Draft the tokens of one block, one after another; greedy.

    Args:
        model: the model.
        hidden: hidden states of m_1..m_J, [J, D].
        verified: the token that stands at m_1's position, drawn by the base head, [1] int64.
        sampler_head: whether to use the sampler head.

    Returns:
        Draft tokens, [J] int64.
    """
    unembed, head = model.unembed, model.sampler_head
    if not sampler_head or head is None:
        return unembed(hidden).argmax(-1)
    wide = next(head.parameters()).dtype
    drawn, state, previous = [], None, verified
    for j in range(hidden.shape[0]):
        output, state = head.step(hidden[j : j + 1].to(wide), model.embed(previous).to(wide), state)
        previous = unembed(output.to(hidden.dtype)).argmax(-1)
        drawn.append(previous)
    return torch.cat(drawn)


def decode_step(model: MTPModel, step: StepInput) -> StepOutput:
    """One forward pass of the base: verify the draft, and draft again from the block after the last kept token.

    Args:
        model: the model.
        step: what to feed.

    Returns:
        Tokens, count and the next draft.
    """
    shape, T = step.shape, step.shape.num_tokens
    inputs = model.embed(step.tokens)[None]
    if shape.num_mtp:
        masks = model.mask_embeddings[: shape.num_masks].to(inputs.dtype).repeat(shape.num_blocks, 1)
        inputs = torch.cat([inputs, masks[None]], dim=1)
    with model.gate.open(shape.num_mtp if model.lora.gated else shape.size):
        hidden = model.base.get_decoder()(
            inputs_embeds=inputs,
            attention_mask=step.attention_mask,
            position_ids=step.position_ids,
            past_key_values=step.cache,
            use_cache=True,
        ).last_hidden_state[0]
    own = model.unembed(hidden[T - 1 - step.num_drafts : T]).argmax(-1)
    kept = num_accepted(step.tokens[T - step.num_drafts :], own)
    if not shape.num_mtp:
        return StepOutput(own, kept, own[:0])
    blocks = hidden[T:].view(shape.num_blocks, shape.num_masks, -1)
    # With one block (linear, and the prompt) it stands after the last token: its draft holds if everything was kept.
    at = kept[None]
    block = at if shape.num_blocks > 1 else torch.zeros_like(at)
    # index_select: indexing with a tensor that holds one number reads the number, and so waits for the device.
    draft = draft_block(model, blocks.index_select(0, block)[0], own.index_select(0, at), step.sampler_head)
    return StepOutput(own, kept, draft)
