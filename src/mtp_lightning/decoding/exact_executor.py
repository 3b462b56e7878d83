# SPDX-License-Identifier: Apache-2.0
"""ExactExecutor: the same text, bit for bit, whatever is drafted, in any dtype.

Kernels round differently for different shapes, so each pass here has the same ones: (J + 1)^2 positions a row, over cache
slots whose number is a multiple of ``SLOTS``, and every step verifies J + 1 positions. Then a row of a matrix product, and a
query of the attention, is computed in the same order whatever the other rows, and the slots that it does not see, hold.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mtp_lightning.decoding.executor import EagerExecutor, StepShape
from mtp_lightning.decoding.limits import exact_masks
from mtp_lightning.decoding.options import DecodingOptions
from mtp_lightning.decoding.planning.draft_plan import Plan
from mtp_lightning.decoding.row_cache import RowCache
from mtp_lightning.decoding.state import DecodeState, StepResult
from mtp_lightning.decoding.step_masks import StepLayout
from mtp_lightning.decoding.token_choice import TokenChoice
from mtp_lightning.errors import UsageError
from mtp_lightning.modeling.decoder import num_experts, run_decoder, text_config
from mtp_lightning.modeling.network import MTPNetwork

SLOTS = 512
"""Attention kernels read keys in blocks of a power of two up to this; whole blocks that nothing sees change no bit."""


class PromptChunk(NamedTuple):
    """A pass that only fills the cache: the next tokens of each row's prompt, [B, Q] int64."""

    tokens: Tensor
    position_ids: Tensor  # [B, Q] int64
    attention_mask: Tensor | dict[str, Tensor]
    cache: RowCache

    def run(self, network: MTPNetwork) -> None:
        """Run the decoder; the adapters are off."""
        with network.gate.over_last(0 if network.lora.gated else self.tokens.shape[1]):
            run_decoder(network.base, network.embed(self.tokens), self.attention_mask, self.position_ids, self.cache)


class ExactExecutor(EagerExecutor):
    """Runs all steps with the shapes of a full quadratic step, and prompts in chunks of that size.

    UsageError for a mixture of experts, whose products have as many rows as tokens choose an expert, for an 8-bit base,
    which scales by the whole pass, and for rejection sampling, whose text depends on the drafts.
    """

    fixed_shapes = True
    joint_logits = False

    def __init__(self, model: MTPNetwork, options: DecodingOptions, choice: TokenChoice) -> None:
        if num_experts(text_config(model.base)) > 1:
            raise UsageError("exact: not for a mixture of experts, whose rounding depends on the other positions.")
        if getattr(model.base, "is_loaded_in_8bit", False):
            raise UsageError("exact: not for an 8-bit base, whose rounding depends on the other positions.")
        if not options.coupled:
            raise UsageError("exact: not with verification rejection, whose text depends on the drafts.")
        super().__init__(model, options, choice)
        masks = exact_masks(model, options)
        self._layout = StepLayout(masks + 1, 0, tuple((start, masks) for start in range(masks + 1)))

    @contextlib.contextmanager
    def open_cache(self, prompts: Sequence[Tensor], max_length: int, kept: RowCache | None) -> Iterator[RowCache]:
        """See ``EagerExecutor``. The cache has all its slots from the beginning."""
        if kept is not None and kept.exact != self._layout.size:  # what it holds was computed by passes of other shapes
            kept.lengths = [0]
        with super().open_cache(prompts, max_length, kept) as cache:
            cache.exact = self._layout.size
            slots = -(-max(self._max_slots, cache.capacity) // SLOTS) * SLOTS
            cache.reserve(slots, slots)
            cache.wipe()
            cache.fixed = True
            try:
                yield cache
            finally:
                cache.fixed = False

    def run(self, plan: Plan, state: DecodeState) -> StepResult:
        """See ``EagerExecutor``."""
        num_drafts = self._layout.num_tokens - 1
        num_verified = [min(row.num_waiting, plan.num_drafts) for row in state.rows]
        shape = StepShape(num_drafts, num_verified, (self._layout,), [0] * len(state.rows), plan.masks)
        with self.mode.active():
            self._feed_prompts(state)
            tokens, draft_scores = state.fed_tokens(num_drafts)
            return self._run(shape, state.cache, tokens, draft_scores, [row.length for row in state.rows])

    def _feed_prompts(self, state: DecodeState) -> None:
        """Feed what each row has besides its last token, in chunks; shorter rows are padded."""
        cache, size = state.cache, self._layout.size
        remaining = [row.num_fed - 1 for row in state.rows]
        if not max(remaining):
            return
        layout = StepLayout(size, 0, ())
        for begin in range(0, max(remaining), size):
            tokens = state.last_tokens[:, begin : begin + size]
            tokens = F.pad(tokens, (0, size - tokens.shape[1]))
            slots = torch.tensor(cache.lengths, device=tokens.device)[:, None]
            position_ids, attention_mask = self.masks.get((layout,), None, cache, slots)
            cache.begin_step(size, tokens, slots)
            self.model(PromptChunk(tokens, position_ids, attention_mask, cache))
            for r, count in enumerate(remaining):
                cache.lengths[r] += min(max(count - begin, 0), size)
        state.prompts_fed()
