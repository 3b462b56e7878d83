# SPDX-License-Identifier: Apache-2.0
"""Executors: how a step runs, eager or as a compiled graph."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from mtp_lightning.decoding.acceptance import acceptance_rule
from mtp_lightning.decoding.execution.decode_cache import decode_cache, rounded_slots
from mtp_lightning.decoding.execution.decoding_mode import DecodingMode
from mtp_lightning.decoding.execution.fused_lora import has_hooks
from mtp_lightning.decoding.execution.step import StepInput, StepOutput, read_rows
from mtp_lightning.decoding.execution.step_graph import CAPTURES, StepGraph
from mtp_lightning.decoding.options import DecodingOptions
from mtp_lightning.decoding.packed_linear import is_autocast
from mtp_lightning.decoding.planning.draft_plan import Plan
from mtp_lightning.decoding.row_cache import RowCache
from mtp_lightning.decoding.state import DecodeState, Row, StepResult
from mtp_lightning.decoding.step_masks import StepLayout, StepMasks
from mtp_lightning.decoding.token_choice import TokenChoice
from mtp_lightning.modeling.network import MTPNetwork

MAX_GRAPHS = 64
"""Shapes of steps over one cache that are remembered."""
EAGER_RUNS = {"cpu": 8, "cuda": 1}
"""Eager steps of a shape before a graph is made, which takes as long as many steps."""


class Executor(Protocol):
    """Runs the steps of one text or batch. What it changes in the model is undone before it returns.

    Attributes:
        fixed_shapes: True if shapes of steps must stay few: finished rows keep their places, masks are always the same.
    """

    fixed_shapes: bool

    def open_cache(
        self, prompts: Sequence[Tensor], max_slots: int, kept: RowCache | None
    ) -> contextlib.AbstractContextManager[RowCache]:
        """The rows' keys and values, for ``max_slots`` slots at most.

        Args:
            prompts: token ids of each row.
            max_slots: slots that steps will ever need.
            kept: the cache of an earlier text, for a single row: what that has in common with the prompt stays.

        Returns:
            A context manager of the cache.
        """
        ...

    def run(self, plan: Plan, state: DecodeState) -> StepResult:
        """Run a step that feeds what the plan says for the rows of the state."""
        ...


class StepShape(NamedTuple):
    """What a step feeds for every row."""

    num_drafts: int  # draft tokens fed for each row, c
    num_verified: list[int]  # how many of them are to be verified, one per row
    layouts: tuple[StepLayout, ...]  # the different layouts, of one size
    layout_index: list[int]  # which one each row has


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
    return StepShape(c, num_verified, layouts, [layouts.index(each) for each in of_row])


class EagerExecutor:
    """Runs steps one operation after another; the model is prepared for decoding."""

    fixed_shapes = False

    def __init__(self, model: MTPNetwork, options: DecodingOptions, choice: TokenChoice) -> None:
        self.model, self.choice, self.sampler_head = model, choice, options.sampler_head
        self.acceptance, self.mode = acceptance_rule(choice), DecodingMode(model)
        self._max_slots = 0
        with self.mode.active():
            self.masks = StepMasks(model.base, model.context)

    @contextlib.contextmanager
    def open_cache(self, prompts: Sequence[Tensor], max_slots: int, kept: RowCache | None) -> Iterator[RowCache]:
        """See ``Executor``."""
        self._max_slots = max_slots
        cache = RowCache(self.model.base, len(prompts)) if kept is None else kept
        cache.rewind(prompts[0].tolist())
        yield cache

    def run(self, plan: Plan, state: DecodeState) -> StepResult:
        """See ``Executor``."""
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
        if min(cache.lengths) != max(cache.lengths):
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
                acceptance=self.acceptance,
                sampler_head=self.sampler_head,
            )
        )
        return StepResult(output, read_rows(output.packed(), c))


class CompiledExecutor(EagerExecutor):
    """Runs steps as graphs, one for each shape, once that shape has come up a few times; see ``can_compile``."""

    fixed_shapes = True

    def __init__(self, model: MTPNetwork, options: DecodingOptions, choice: TokenChoice) -> None:
        super().__init__(model, options, choice)
        self._generation = -1

    @contextlib.contextmanager
    def open_cache(self, prompts: Sequence[Tensor], max_slots: int, kept: RowCache | None) -> Iterator[RowCache]:
        """See ``Executor``. The cache has all its slots from the beginning, and later texts take it again."""
        weights = decode_cache(self.model)
        weights.drop_stale_graphs(self.model)
        with contextlib.ExitStack() as stack:
            if kept is None:
                cache = stack.enter_context(weights.kv_cache(self.model, len(prompts), max_slots))
            else:
                cache = kept
                cache.rewind(prompts[0].tolist())
            self._max_slots = rounded_slots(max_slots)
            cache.reserve(self._max_slots, self._max_slots)
            cache.wipe()
            yield cache

    def _run(
        self, shape: StepShape, cache: RowCache, tokens: Tensor, draft_scores: Tensor | None, lengths: list[int]
    ) -> StepResult:
        graph, is_new = self._graph(shape, cache)
        if graph is None:
            result = super()._run(shape, cache, tokens, draft_scores, lengths)
            return result._replace(from_graph=None if is_new else False)
        output, packed = graph.run(tokens, cache.lengths, lengths, shape.layout_index, shape.num_verified, self.choice.seeds)
        return StepResult(output, read_rows(packed, shape.num_drafts), from_graph=None if is_new else True)

    def _graph(self, shape: StepShape, cache: RowCache) -> tuple[StepGraph | None, bool]:
        """The graph of a step, made when it is due, and whether that was now; None: the step runs eagerly."""
        weights, graphs = decode_cache(self.model), cache.graphs
        if shape.layouts[0].last or max(cache.lengths) == 0 or weights.graphs_failed:  # a prompt's shape comes once
            return None, False
        if self._generation != weights.generation:  # weights that graphs read may be gone, or be another model's
            if graphs.get("made for") != (weights, weights.generation):
                graphs.clear()
                graphs["made for"] = weights, weights.generation
            self._generation = weights.generation
        key = (shape.layouts, shape.num_drafts, len(cache.lengths), self.choice.key, self.sampler_head)
        known = graphs.get(key, 0)
        if isinstance(known, StepGraph):
            return known, False
        if known < EAGER_RUNS[self.model.base.device.type]:
            graphs[key] = known + 1
            while len(graphs) > MAX_GRAPHS:  # the oldest, which comes after what they were made for
                graphs.pop(list(graphs)[1])
            return None, False
        try:
            graphs[key] = StepGraph(
                self.model, cache, self.choice, self.acceptance, self.sampler_head, shape.layouts, shape.num_drafts
            )
        except Exception as error:  # compilers and drivers raise anything; the text does not depend on them
            weights.graphs_failed = True
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            warnings.warn(f"steps could not be compiled, decoding continues without: {reason}", stacklevel=2)
            return None, True
        return graphs[key], True


def can_compile(model: MTPNetwork, options: DecodingOptions) -> bool:
    """True if steps are to be graphs and can be: nothing in them runs on the host, and no other process takes part."""
    device = model.base.device
    if not options.compile or options.logits_processor or options.repetition_penalty != 1.0 or device.type not in CAPTURES:
        return False
    if not options.coupled or model.is_sharded or is_autocast(device) or decode_cache(model).graphs_failed:
        return False
    return all(parameter.device == device for parameter in model.parameters()) and not any(map(has_hooks, model.modules()))


def make_executor(model: MTPNetwork, options: DecodingOptions, choice: TokenChoice) -> Executor:
    """The executor that the options ask for."""
    return (CompiledExecutor if can_compile(model, options) else EagerExecutor)(model, options, choice)


def token_choice(model: MTPNetwork, options: DecodingOptions, seeds: list[int]) -> TokenChoice:
    """How tokens are chosen; the model is prepared for decoding."""
    count = None if options.draft_candidates == "all" else options.draft_candidates
    # Rows of the unembedding can be read one by one only where it is a plain linear layer in memory.
    if count is not None and (count >= model.unembed.vocab_size or decode_cache(model).output is None or model.is_sharded):
        count = None
    return TokenChoice(options, seeds, model.base.device, count)
