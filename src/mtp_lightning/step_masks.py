# SPDX-License-Identifier: Apache-2.0
"""Positions and attention masks of decoding steps, made once a shape and sliced as the cache grows.

A step feeds T tokens (the last verified one and the draft, or the whole prompt) and then blocks of J masks, one after
each of the last ``num_blocks`` tokens. It is the masked input of training with a cache in front, so the rule is
``masking.dense_mask``'s.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mtp_lightning.attention import kernel_mask, per_layer_type
from mtp_lightning.masking import AttentionPattern, dense_mask


class StepShape(NamedTuple):
    """What a step feeds.

    Attributes:
        num_tokens: T, tokens fed.
        num_blocks: blocks; block b starts at token T - num_blocks + b.
        num_masks: J, masks in a block.
    """

    num_tokens: int
    num_blocks: int
    num_masks: int

    @property
    def num_mtp(self) -> int:
        """Mask positions fed."""
        return self.num_blocks * self.num_masks

    @property
    def size(self) -> int:
        """Positions fed."""
        return self.num_tokens + self.num_mtp


def step_pattern(shape: StepShape, device: torch.device) -> AttentionPattern:
    """Who sees whom among the positions that a step feeds; position ids count from the step's first token.

    Args:
        shape: the step's shape.
        device: device of the result.

    Returns:
        The pattern, [1, Q] each.
    """
    T, blocks, J = shape
    tokens = torch.arange(T, device=device)
    starts = (T - blocks + torch.arange(blocks, device=device)).repeat_interleave(J)
    offsets = torch.arange(1, J + 1, device=device).repeat(blocks)
    return AttentionPattern(
        documents=torch.zeros(1, shape.size, dtype=torch.int64, device=device),
        limits=torch.cat([tokens, starts])[None],
        blocks=torch.cat([torch.full_like(tokens, -1), torch.arange(blocks, device=device).repeat_interleave(J)])[None],
        position_ids=torch.cat([tokens, starts + offsets])[None],
    )


class StepMasks:
    """Positions and masks of steps over a growing cache.

    Args:
        base: the base model.
        capacity: the longest cache that a step sees.
    """

    def __init__(self, base: PreTrainedModel, capacity: int) -> None:
        self.base = base
        self.capacity = capacity
        self._made: dict[StepShape, tuple[Tensor, Any]] = {}

    def get(self, shape: StepShape, cached: int) -> tuple[Tensor, Any]:
        """Position ids and the decoder's mask argument.

        Args:
            shape: the step's shape.
            cached: tokens in the cache.

        Returns:
            Position ids [1, Q], and a mask over ``cached + Q`` keys, or a dict of masks by layer type.
        """
        if cached == 0:
            return self._make(shape, 0)
        if shape not in self._made:
            self._made[shape] = self._make(shape, self.capacity)
        positions, masks = self._made[shape]
        unused = self.capacity - cached
        if isinstance(masks, dict):
            return positions + cached, {name: mask[..., unused:] for name, mask in masks.items()}
        return positions + cached, masks[..., unused:]

    def _make(self, shape: StepShape, capacity: int) -> tuple[Tensor, Any]:
        pattern = step_pattern(shape, self.base.device)
        # Column c of the context is the key `capacity - c` tokens before the step's first token, so that the last
        # columns are always the nearest keys and any shorter cache is a slice.
        behind = torch.arange(capacity, 0, -1, device=self.base.device)

        def make(window: int | None) -> Tensor:
            distance = pattern.position_ids[0, :, None] + behind
            context = torch.ones_like(distance, dtype=torch.bool) if window is None else distance < window
            local = dense_mask(pattern, shape.num_tokens, window)
            return kernel_mask(self.base, torch.cat([context[None, None], local], dim=-1))

        return pattern.position_ids, per_layer_type(self.base, make)
