# SPDX-License-Identifier: Apache-2.0
"""CompiledExecutor: runs steps as graphs, by ``torch.compile`` on a CPU and as CUDA graphs on a GPU."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence

from torch import Tensor

from mtp_lightning.decoding.execution.decode_cache import decode_cache, rounded_slots
from mtp_lightning.decoding.execution.fused_lora import has_hooks
from mtp_lightning.decoding.execution.step import read_rows
from mtp_lightning.decoding.execution.step_graph import CAPTURES, StepGraph
from mtp_lightning.decoding.executor import EagerExecutor, StepShape
from mtp_lightning.decoding.options import DecodingOptions
from mtp_lightning.decoding.packed_linear import is_autocast
from mtp_lightning.decoding.row_cache import RowCache
from mtp_lightning.decoding.state import StepResult
from mtp_lightning.decoding.token_choice import TokenChoice
from mtp_lightning.modeling.network import MTPNetwork

MAX_GRAPHS = 64
"""Shapes of steps over one cache that are remembered."""
EAGER_RUNS = {"cpu": 8, "cuda": 1}
"""Eager steps of a shape before a graph is made, which takes as long as many steps."""


class CompiledExecutor(EagerExecutor):
    """Runs steps as graphs, one for each shape, once that shape has come up a few times; see ``can_compile``."""

    fixed_shapes = True

    def __init__(self, model: MTPNetwork, options: DecodingOptions, choice: TokenChoice) -> None:
        super().__init__(model, options, choice)
        self._generation = -1

    @contextlib.contextmanager
    def open_cache(self, prompts: Sequence[Tensor], max_length: int, kept: RowCache | None) -> Iterator[RowCache]:
        """See ``EagerExecutor``. The cache has all its slots from the beginning, and later texts take it again."""
        weights = decode_cache(self.model)
        weights.drop_stale_graphs(self.model)
        max_slots = max_length + self.max_positions
        with contextlib.ExitStack() as stack:
            if kept is None:
                cache = stack.enter_context(weights.kv_cache(self.model, len(prompts), max_slots))
            else:
                cache = kept
                cache.rewind(prompts[0].tolist())
                cache.exact = 0
            self._max_slots = rounded_slots(max_slots)
            cache.reserve(self._max_slots, self._max_slots)
            cache.wipe()
            yield cache

    def _run(
        self, shape: StepShape, cache: RowCache, tokens: Tensor, draft_scores: Tensor | None, lengths: list[int]
    ) -> StepResult:
        graph = self._graph(shape, cache)
        if graph is None:
            return super()._run(shape, cache, tokens, draft_scores, lengths)
        output, packed = graph.run(tokens, cache.lengths, lengths, shape.layout_index, shape.num_verified, self.choice.seeds)
        return StepResult(output, read_rows(packed, shape.num_drafts))

    def _graph(self, shape: StepShape, cache: RowCache) -> StepGraph | None:
        """The graph of a step, made when it is due; None: the step runs eagerly."""
        weights, graphs = decode_cache(self.model), cache.graphs
        if shape.layouts[0].last or max(cache.lengths) == 0 or weights.graphs_failed:  # a prompt's shape comes once
            return None
        if self._generation != weights.generation:  # weights that graphs read may be gone, or be another model's
            if graphs.get("made for") != (weights, weights.generation):
                graphs.clear()
                graphs["made for"] = weights, weights.generation
            self._generation = weights.generation
        key = (shape.layouts, shape.num_drafts, len(cache.lengths), self.choice.key, self.sampler_head)
        known = graphs.get(key, 0)
        if isinstance(known, StepGraph):
            return known
        if known < EAGER_RUNS[self.model.base.device.type]:
            graphs[key] = known + 1
            while len(graphs) > MAX_GRAPHS:  # the oldest, which comes after what they were made for
                graphs.pop(list(graphs)[1])
            return None
        try:
            graphs[key] = StepGraph(self.model, cache, self.choice, self.sampler_head, shape.layouts, shape.num_drafts)
        except Exception as error:  # compilers and drivers raise anything; the text does not depend on them
            weights.graphs_failed = True
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            warnings.warn(f"steps could not be compiled, decoding continues without: {reason}", stacklevel=2)
            return None
        return graphs[key]


def can_compile(model: MTPNetwork, options: DecodingOptions) -> bool:
    """True if steps are to be graphs and can be: nothing in them runs on the host, and no other process takes part."""
    device = model.base.device
    if not options.compile or options.logits_processor or options.repetition_penalty != 1.0 or device.type not in CAPTURES:
        return False
    if not options.coupled or model.is_sharded or is_autocast(device) or decode_cache(model).graphs_failed:
        return False
    return all(parameter.device == device for parameter in model.parameters()) and not any(map(has_hooks, model.modules()))
