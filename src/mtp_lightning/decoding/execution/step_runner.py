# SPDX-License-Identifier: Apache-2.0
"""Runs the steps of one batch, as they are or as graphs."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from mtp_lightning.decoding.execution.decode_cache import decode_cache
from mtp_lightning.decoding.execution.step import StepInput, StepOutput
from mtp_lightning.decoding.execution.step_graph import CAPTURES, StepGraph
from mtp_lightning.decoding.options import DecodingOptions
from mtp_lightning.decoding.packed_linear import is_autocast
from mtp_lightning.decoding.row_cache import RowCache
from mtp_lightning.decoding.step_masks import StepMasks
from mtp_lightning.decoding.step_plan import StepPlan
from mtp_lightning.decoding.token_choice import TokenChoice
from mtp_lightning.modeling.network import MTPNetwork
from mtp_lightning.modeling.transformers_private import offload_hook

MOST = 64
"""Shapes of steps over one cache that are remembered."""
USES = {"cpu": 8, "cuda": 1}
"""Steps of a shape that are run as they are before one is made into a graph, which takes as long as many steps."""


def _is_hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or offload_hook(module) is not None)


class StepRunner:
    """Runs steps, each as it comes.

    Args:
        model: the model, its fused layers in use.
        cache: the batch's keys and values.
        choice: how tokens are chosen.
        sampler_head: whether to draft with the sampler head.

    Attributes:
        padded: whether shapes are to be few, and rows stay in their places when they have finished.
        was_graph: whether the last step ran as a graph; None where it was made first, which takes long.
    """

    padded = False
    was_graph: bool | None = False

    def __init__(self, model: MTPNetwork, cache: RowCache, choice: TokenChoice, sampler_head: bool) -> None:
        self.model, self.cache, self.choice, self.sampler_head = model, cache, choice, sampler_head
        self.masks = StepMasks(model.base, model.context)

    def run(
        self, plan: StepPlan, tokens: Tensor, draft_scores: Tensor | None, ends: list[int]
    ) -> tuple[StepOutput, list[list[int]]]:
        """Run a step.

        Args:
            plan: what to feed.
            tokens: see ``StepInput``.
            draft_scores: see ``StepInput``.
            ends: see ``StepInput``.

        Returns:
            What it gives, and its ``numbers`` as the host reads them: the one place in a step that waits for the device.
        """
        device, cache, c, size = tokens.device, self.cache, plan.num_drafts, plan.layouts[0].size
        lengths = cache.lengths
        slots = None if min(lengths) == max(lengths) else torch.tensor(lengths, device=device)[:, None]
        layout_of = None if len(plan.layouts) == 1 else torch.tensor(plan.choice, device=device)
        positions, mask = self.masks.get(plan.layouts, layout_of, cache, slots)
        cache.begin_step(size, tokens, slots)
        drafted = None
        if min(plan.drafted) < c:
            drafted = torch.arange(c, device=device) < torch.tensor(plan.drafted, device=device)[:, None]
        first = torch.tensor(ends, device=device)
        out: StepOutput = self.model(
            StepInput(
                tokens, c, drafted, draft_scores, plan.layouts, layout_of, positions, mask, ends, first, cache, self.choice,
                self.sampler_head, plan.drafted,
            )
        )  # fmt: skip
        return out, out.numbers().tolist()


class GraphRunner(StepRunner):
    """Runs steps as graphs, once their shapes have come up a few times.

    Args:
        model: the model, its fused layers in use.
        cache: the batch's keys and values, with room for all steps to come.
        choice: how tokens are chosen; see ``takes``.
        sampler_head: whether to draft with the sampler head.
    """

    padded = True

    def __init__(self, model: MTPNetwork, cache: RowCache, choice: TokenChoice, sampler_head: bool) -> None:
        super().__init__(model, cache, choice, sampler_head)
        self.generation = -1

    @staticmethod
    def takes(model: MTPNetwork, options: DecodingOptions) -> bool:
        """Whether steps can be graphs: not where something of the host's has a hand in them, or processes must agree."""
        device = model.base.device
        if options.logits_processor or options.repetition_penalty != 1.0 or device.type not in CAPTURES:
            return False
        if (options.temperature and options.verification == "rejection") or model.is_sharded or is_autocast(device):
            return False
        if decode_cache(model).no_graphs or any(parameter.device != device for parameter in model.parameters()):
            return False
        return not any(_is_hooked(module) for module in model.modules())

    def run(
        self, plan: StepPlan, tokens: Tensor, draft_scores: Tensor | None, ends: list[int]
    ) -> tuple[StepOutput, list[list[int]]]:
        """See ``StepRunner``."""
        self.was_graph = False
        graph = self._graph(plan)
        if graph is None:
            return super().run(plan, tokens, draft_scores, ends)
        if self.was_graph is False:
            self.was_graph = True
        return graph.run(tokens, self.cache.lengths, ends, plan, self.choice.seeds)

    def _graph(self, plan: StepPlan) -> StepGraph | None:
        """The graph of a step, made when it is due; None: the step is run as it is."""
        prepared, graphs = decode_cache(self.model), self.cache.graphs
        if plan.layouts[0].last or max(self.cache.lengths) == 0 or prepared.no_graphs:  # a prompt's shape comes once
            return None
        if self.generation != prepared.generation:  # weights that graphs read may be gone, or be another model's
            if graphs.get("made for") != (prepared, prepared.generation):
                graphs.clear()
                graphs["made for"] = prepared, prepared.generation
            self.generation = prepared.generation
        key = (plan.layouts, plan.num_drafts, len(self.cache.lengths), self.choice.key, self.sampler_head)
        found = graphs.get(key, 0)
        if isinstance(found, StepGraph):
            return found
        device = self.model.base.device.type
        if found < USES[device]:
            graphs[key] = found + 1
            while len(graphs) > MOST:  # the oldest, behind what they were made for
                graphs.pop(list(graphs)[1])
            return None
        self.was_graph = None
        try:
            graphs[key] = StepGraph(self.model, self.cache, self.choice, self.sampler_head, plan)
        except Exception as error:  # compilers and drivers raise anything; the text does not depend on them
            prepared.no_graphs = True
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            warnings.warn(f"steps could not be compiled, decoding goes on without: {reason}", stacklevel=2)
            return None
        return graphs[key]
