# SPDX-License-Identifier: Apache-2.0
"""Executors: how a step runs. Here one operation after another; see also ``compiled_executor`` and ``exact_executor``."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mtp_lightning.decoding.execution.decode_cache import decode_cache
from mtp_lightning.decoding.execution.decoding_mode import DecodingMode
from mtp_lightning.decoding.execution.step import StepInput, StepOutput, read_rows
from mtp_lightning.decoding.limits import step_positions
from mtp_lightning.decoding.options import DecodingOptions
from mtp_lightning.decoding.planning.draft_plan import Plan
from mtp_lightning.decoding.row_cache import RowCache
from mtp_lightning.decoding.state import DecodeState, Row, StepResult
from mtp_lightning.decoding.step_masks import StepLayout, StepMasks
from mtp_lightning.decoding.token_choice import TokenChoice
from mtp_lightning.modeling.network import MTPNetwork


class StepShape(NamedTuple):
    """What a step feeds for every row."""

    num_drafts: int  # draft tokens fed for each row, c
    num_verified: list[int]  # how many of them are to be verified, one per row
    layouts: tuple[StepLayout, ...]  # the different layouts, of one size
    layout_index: list[int]  # which one each row has
    max_new_drafts: int  # drafts to make for each row


def step_shape(plan: Plan, rows: Sequence[Row], all_layouts: bool = False) -> StepShape:
    """The layouts of a plan's step, all of the longest row's size: the rows' last tokens, their drafts, and blocks of masks.

    ``all_layouts`` lists every layout that rows of such a plan may have, so that shapes stay few.
    """
    c, width = plan.num_drafts, max(row.num_fed for row in rows)
    num_verified = [min(row.num_waiting, c) for row in rows]

    def layout(num_fed: int, count: int) -> StepLayout:
        last = num_fed - 1
        return StepLayout(width + c, last, tuple((last + start, masks) for start, masks in plan.blocks(count)))

    of_row = [layout(row.num_fed, count) for row, count in zip(rows, num_verified, strict=True)]
    possible = [layout(row.num_fed, count) for count in range(c + 1) for row in rows] if all_layouts else of_row
    layouts = tuple(dict.fromkeys(possible))
    return StepShape(c, num_verified, layouts, [layouts.index(each) for each in of_row], plan.masks)


class EagerExecutor:
    """Runs the steps of one text or batch, one operation after another; the model is prepared for decoding.

    What it changes in the model is undone before it returns.
    """

    fixed_shapes = False  # True: shapes must stay few, so finished rows keep their places, and masks are always the same
    joint_logits = True

    def __init__(self, model: MTPNetwork, options: DecodingOptions, choice: TokenChoice) -> None:
        self.model, self.choice, self.sampler_head = model, choice, options.sampler_head
        self.mode = DecodingMode(model)
        self.max_positions, self._max_slots = step_positions(model, options), 0
        with self.mode.active():
            self.masks = StepMasks(model.base, model.context)

    @contextlib.contextmanager
    def open_cache(self, prompts: Sequence[Tensor], max_length: int, kept: RowCache | None) -> Iterator[RowCache]:
        """The rows' keys and values; no row will have more than ``max_length`` verified tokens.

        ``kept`` is the cache of an earlier text, for a single row: what that has in common with the prompt stays.
        """
        self._max_slots = max_length + self.max_positions
        cache = RowCache(self.model.base, len(prompts)) if kept is None else kept
        cache.rewind(prompts[0].tolist())
        cache.exact = 0
        yield cache

    def run(self, plan: Plan, state: DecodeState) -> StepResult:
        """Run a step that feeds what the plan says for the rows of the state."""
        shape, cache = step_shape(plan, state.rows, self.fixed_shapes), state.cache
        cache.reserve(max(cache.lengths) + shape.layouts[0].size, self._max_slots)
        tokens, draft_scores = state.fed_tokens(plan.num_drafts)
        with self.mode.active():
            return self._run(shape, cache, tokens, draft_scores, [row.length for row in state.rows])

    def _run(
        self, shape: StepShape, cache: RowCache, tokens: Tensor, draft_scores: Tensor | None, lengths: list[int]
    ) -> StepResult:
        device, c, size = tokens.device, shape.num_drafts, shape.layouts[0].size
        slots = None
        if cache.fixed or min(cache.lengths) != max(cache.lengths):
            slots = torch.tensor(cache.lengths, device=device)[:, None]
        layout_index = None if len(shape.layouts) == 1 else torch.tensor(shape.layout_index, device=device)
        position_ids, attention_mask = self.masks.get(shape.layouts, layout_index, cache, slots)
        cache.begin_step(size, tokens, slots)
        verify_mask = None
        if min(shape.num_verified) < c:
            verify_mask = torch.arange(c, device=device) < torch.tensor(shape.num_verified, device=device)[:, None]
        output: StepOutput = self.model(
            StepInput(
                tokens=tokens,
                num_drafts=c,
                verify_mask=verify_mask,
                num_verified=shape.num_verified,
                draft_scores=draft_scores,
                layouts=shape.layouts,
                layout_index=layout_index,
                position_ids=position_ids,
                attention_mask=attention_mask,
                lengths=lengths,
                first_positions=torch.tensor(lengths, device=device),
                cache=cache,
                choice=self.choice,
                sampler_head=self.sampler_head,
                max_new_drafts=shape.max_new_drafts,
                joint_logits=self.joint_logits,
            )
        )
        return StepResult(output, read_rows(output.packed(), c))


def token_choice(model: MTPNetwork, options: DecodingOptions, seeds: list[int]) -> TokenChoice:
    """How tokens are chosen; the model is prepared for decoding."""
    count = None if options.draft_candidates == "all" else options.draft_candidates
    # Rows of the unembedding can be read one by one only where it is a plain linear layer in memory.
    if count is not None and (count >= model.unembed.vocab_size or decode_cache(model).output is None or model.is_sharded):
        count = None
    return TokenChoice(options, seeds, model.base.device, count)
