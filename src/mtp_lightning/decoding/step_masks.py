# SPDX-License-Identifier: Apache-2.0
"""What decoding steps feed: their layout, and its positions and attention masks, made once per layout.

A step feeds T tokens (the last verified one and the draft, or the whole prompt) and then blocks of masks, each after one
of the tokens. It is the masked input of training with a cache in front, so the rule is ``masking.dense_mask``'s.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mtp_lightning.decoding.row_cache import READ_AHEAD, RowCache
from mtp_lightning.modeling.attention import GROUPED_SDPA, kernel_mask, per_layer_type
from mtp_lightning.modeling.masking import AttentionPattern, dense_mask
from mtp_lightning.modeling.transformers_private import attention_kernel, offload_hook
from mtp_lightning.types import compute_dtype


class StepLayout(NamedTuple):
    """What a step feeds for a row."""

    num_tokens: int  # T, tokens fed
    last: int  # index of the last verified token; drafts come after it
    blocks: tuple[tuple[int, int], ...]  # start (index of a token) and number of masks of each block, starts ascending

    @property
    def num_mtp(self) -> int:
        """Mask positions fed."""
        return sum(masks for _, masks in self.blocks)

    @property
    def size(self) -> int:
        """Positions fed, Q."""
        return self.num_tokens + self.num_mtp

    @property
    def depth(self) -> int:
        """Masks in the largest block."""
        return max((masks for _, masks in self.blocks), default=0)

    def block_after(self, num_accepted: int) -> tuple[int, int]:
        """The block after this number of accepted drafts: index of its first mask among the masks, and its size.

        ``StepLayout(3, 0, ((0, 4), (2, 4))).block_after(2) -> (4, 4)``, and of 1: ``(0, 0)``
        """
        first = 0
        for start, masks in self.blocks:
            if start == self.last + num_accepted:
                return first, masks
            first += masks
        return 0, 0


def step_pattern(layout: StepLayout, device: torch.device) -> AttentionPattern:
    """Who sees whom among the positions that a step feeds, [1, Q]; position ids count from the step's first token."""
    limits, blocks, positions = (list(range(layout.num_tokens)), [-1] * layout.num_tokens, list(range(layout.num_tokens)))
    for number, (start, masks) in enumerate(layout.blocks):
        limits += [start] * masks
        blocks += [number] * masks
        positions += [start + j for j in range(1, masks + 1)]
    return AttentionPattern(
        documents=torch.zeros(1, layout.size, dtype=torch.int64, device=device),
        limits=torch.tensor([limits], device=device),
        blocks=torch.tensor([blocks], device=device),
        position_ids=torch.tensor([positions], device=device),
    )


class StepMasks:
    """Positions and masks of steps over a growing cache, for a base that was made for ``context`` positions."""

    def __init__(self, base: PreTrainedModel, context: int) -> None:
        self.base = base
        self.context = context
        self._windows = per_layer_type(base, lambda window: window)
        self._capacity = 0
        self._positions: dict[tuple[StepLayout, ...], Tensor] = {}
        self._tables: dict[tuple[tuple[StepLayout, ...], int | None], Tensor] = {}
        self._shifted: dict[int | None, tuple[list[int], Tensor]] = {}
        self._additive: tuple[Tensor, Tensor] | None = None
        on_cpu = base.device.type == "cpu" and offload_hook(base) is None  # which may move tensors elsewhere
        if on_cpu and attention_kernel(base) in ("sdpa", GROUPED_SDPA):
            dtype = compute_dtype(base.dtype)
            self._additive = torch.zeros((), dtype=dtype), torch.tensor(-torch.inf, dtype=dtype)

    def get(
        self, layouts: tuple[StepLayout, ...], layout_index: Tensor | None, cache: RowCache, slots: Tensor | None
    ) -> tuple[Tensor, Any]:
        """Position ids [B or 1, Q] and the decoder's mask argument, over the slots that the cache will hand out.

        A mask is [B or 1, 1, Q, W]; the argument is one mask or a dict of masks by layer type. ``layouts`` and
        ``layout_index`` are as in ``StepInput``; ``slots`` [B, 1] are the tokens of each row in the cache, None if all have
        the same number.
        """
        if cache.capacity != self._capacity:
            self._capacity = cache.capacity
            self._tables.clear()
            self._shifted.clear()
        position_ids = self._position_table(layouts)
        if layout_index is not None:
            position_ids = position_ids.index_select(0, layout_index)
        position_ids = position_ids + (cache.lengths[0] if slots is None else slots)
        first, end = cache.reach(layouts[0].size)
        if cache.fixed or end > self.context:
            # A position past the context belongs to a mask or draft that can no longer become text.
            position_ids.clamp_(max=self.context - 1)

        def mask(window: int | None) -> Tensor:
            return self._mask(layouts, layout_index, cache, slots, window, first[window], end)

        if isinstance(self._windows, dict):
            return position_ids, {name: mask(window) for name, window in self._windows.items()}
        return position_ids, mask(self._windows)

    def _mask(
        self,
        layouts: tuple[StepLayout, ...],
        layout_index: Tensor | None,
        cache: RowCache,
        slots: Tensor | None,
        window: int | None,
        first: int,
        end: int,
    ) -> Tensor:
        """The mask of the layers with a window over slots ``first`` to ``end``, [B or 1, 1, Q, end - first]."""
        Q, longest = layouts[0].size, self._capacity if cache.fixed else max(cache.lengths)
        table = self._table(layouts, window, longest)
        num_cached = table.shape[-1] - Q - READ_AHEAD
        if Q == 1 and longest and not cache.fixed:  # a plain step: its mask changes only when rows gain unequally
            table, slots = self._shift(table, window, cache.lengths, slots), None
        elif layout_index is not None:
            table = table.index_select(0, layout_index)
        if slots is None:  # all rows end at the same slot: a slice
            return self._for_kernel(table.narrow(3, num_cached - longest + first, end - first))
        # Each row's own slice: slot s of a row with n tokens is column s - n of the step's own ones.
        columns = torch.arange(first + num_cached, end + num_cached, device=slots.device) - slots
        columns = columns.clamp_(max=num_cached + Q)  # the last column, which nothing sees
        index = columns[:, None, None, :].expand(-1, -1, Q, -1)
        return self._for_kernel(table.expand(len(slots), -1, -1, -1).gather(3, index))

    def _for_kernel(self, mask: Tensor) -> Tensor:
        """A mask as PyTorch's CPU kernel reads it: 0 and -inf. It would convert a boolean one in every layer."""
        if self._additive is None or mask.dtype != torch.bool:
            return mask
        return torch.where(mask, *self._additive)

    def _shift(self, table: Tensor, window: int | None, lengths: list[int], slots: Tensor | None) -> Tensor:
        """The table of a single position, [1, 1, 1, capacity + 1 + READ_AHEAD], shifted by how much shorter each row is.

        The result is [B or 1, 1, 1, capacity + 1 + READ_AHEAD]. It stays valid while all rows gain equally.
        """
        longest = max(lengths)
        missing = [0] if slots is None else [longest - length for length in lengths]
        if window not in self._shifted or self._shifted[window][0] != missing:
            last = table.shape[-1] - 1
            columns = torch.arange(last + 1, device=table.device)[None]
            if slots is not None:  # computed on the device: a copy to it would be waited for
                columns = columns + (longest - slots)
            self._shifted[window] = missing, self._for_kernel(table[0, 0, 0, columns.clamp_(max=last)][:, None, None])
        return self._shifted[window][1]

    def _position_table(self, layouts: tuple[StepLayout, ...]) -> Tensor:
        if layouts not in self._positions:
            made = [step_pattern(layout, self.base.device).position_ids for layout in layouts]
            self._positions[layouts] = torch.cat(made)
        return self._positions[layouts]

    def _table(self, layouts: tuple[StepLayout, ...], window: int | None, longest: int) -> Tensor:
        """What the positions of each layout see, [n, 1, Q, capacity + Q + READ_AHEAD]: cached keys, own ones, and nothing.

        Column c of the cached ones is the key ``capacity - c`` tokens before the step's first token, so that a shorter
        cache is a slice.
        """
        key = (layouts, window)
        if key in self._tables:
            return self._tables[key]
        # With an empty cache it is a prompt's, whose layout comes once: not kept.
        capacity = self._capacity if longest else 0
        made = []
        behind = torch.arange(capacity, 0, -1, device=self.base.device)
        for layout in layouts:
            pattern = step_pattern(layout, self.base.device)
            distance = pattern.position_ids[0, :, None] + behind
            context = torch.ones_like(distance, dtype=torch.bool) if window is None else distance < window
            local = dense_mask(pattern, layout.num_tokens, window)[0, 0]
            nothing = local.new_zeros(layout.size, READ_AHEAD)
            made.append(torch.cat([context, local, nothing], dim=1))
        table = kernel_mask(self.base, torch.stack(made)[:, None])
        if longest:
            self._tables[key] = table
        return table
