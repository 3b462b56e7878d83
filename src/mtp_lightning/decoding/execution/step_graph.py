# SPDX-License-Identifier: Apache-2.0
"""StepGraph: a decoding step as one graph, from the tokens it feeds to the next drafts, with nothing left to Python.

A graph is a recording of the operations of one step over buffers that stay where they are. So all that changes from step
to step must be in these buffers, and shapes must not change: a step reads all slots of the cache, and its mask says which
count. On a GPU the recording is a CUDA graph of the same kernels; on a CPU it is compiled by ``torch.compile``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from mtp_lightning.decoding import packed_linear
from mtp_lightning.decoding.execution.step import Drafts, StepInput, StepOutput, block_index, decode_step, mask_index
from mtp_lightning.decoding.row_cache import RowCache
from mtp_lightning.decoding.step_masks import StepMasks
from mtp_lightning.decoding.step_plan import StepPlan
from mtp_lightning.decoding.token_choice import TokenChoice
from mtp_lightning.modeling.network import MTPNetwork

WAITS = {"_local_scalar_dense", "nonzero", "masked_select"}
"""Operations after which the host, or a shape, depends on what tensors hold."""
COPIES = {"lift_fresh", "lift_fresh_copy"}
"""Tensors made from numbers of the host, which a CUDA graph can't hold."""
HOST = "some layer decides on the host what to do next, which a recording can't follow."

Step = Callable[..., tuple[Tensor, ...]]
Replay = Callable[[], tuple[Tensor, ...]]


def recorded(step: Step, inputs: Sequence[Tensor]) -> Step:
    """The operations of a step, one after another.

    Args:
        step: takes the inputs; what else it reads must be buffers that stay.
        inputs: what to record it with.

    Returns:
        The recording, which takes other inputs of these shapes.

    Raises:
        RuntimeError: the step can't be recorded.
    """
    with packed_linear.as_operators():
        graph = make_fx(step)(*inputs)
    refused = WAITS | COPIES if inputs[0].is_cuda else WAITS
    if refused & {getattr(node.target, "_opname", "") for node in graph.graph.nodes}:
        raise RuntimeError(HOST)
    return graph


def compiled(step: Step, inputs: Sequence[Tensor]) -> Replay:
    """A step compiled for a CPU.

    Args:
        step: see ``recorded``.
        inputs: buffers that the step will read each time.

    Returns:
        Runs it.
    """
    recording = recorded(step, inputs)
    _compare(step, lambda: recording(*inputs), inputs)
    run = torch.compile(recording, dynamic=False, fullgraph=True)
    run(*inputs)  # compiles
    return lambda: run(*inputs)


def cuda_graph(step: Step, inputs: Sequence[Tensor]) -> Replay:
    """A step as a CUDA graph.

    Args:
        step: see ``recorded``.
        inputs: buffers that the step will read each time.

    Returns:
        Runs it. What it gives is overwritten by the next run.
    """
    recorded(step, inputs)  # refuses what a capture would fail at half-way
    with torch.cuda.device(inputs[0].device):
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # what kernels make ready at their first call must not be recorded
            for _ in range(2):
                step(*inputs)
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        # The outer one puts the stream back where a capture fails; other threads may go on using the device.
        with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph, capture_error_mode="thread_local"):
            outputs = step(*inputs)

    def replay() -> tuple[Tensor, ...]:
        graph.replay()
        return outputs

    _compare(step, replay, inputs)
    return replay


def _compare(step: Step, replay: Replay, inputs: Sequence[Tensor]) -> None:
    """Refuse a recording that does not do what the step does with other tokens than it was made with."""
    tokens = inputs[0]
    tokens.copy_(torch.arange(1, 1 + tokens.numel(), device=tokens.device).view_as(tokens))
    expected = [each.clone() for each in step(*inputs) if not each.is_floating_point()]
    found = [each for each in replay() if not each.is_floating_point()]
    if not all(map(torch.equal, expected, found)):
        raise RuntimeError(HOST)


CAPTURES: dict[str, Callable[[Step, Sequence[Tensor]], Replay]] = {"cpu": compiled, "cuda": cuda_graph}
"""How graphs are made on each kind of device."""


class StepGraph:
    """A step of one shape over one cache.

    Args:
        model: the model, its fused layers in use.
        cache: the batch's keys and values.
        choice: how tokens are chosen, but for the seeds.
        sampler_head: whether to draft with the sampler head.
        plan: a step of this shape.

    Raises:
        Exception: whatever a compiler or driver raises.
    """

    def __init__(
        self,
        model: MTPNetwork,
        cache: RowCache,
        choice: TokenChoice,
        sampler_head: bool,
        plan: StepPlan,
    ) -> None:
        device, B, c = model.base.device, len(cache.lengths), plan.num_drafts
        self.tokens = torch.zeros(B, 1 + c, dtype=torch.int64, device=device)
        self.rows = torch.zeros(B, 4, dtype=torch.int64, device=device)
        # It is run while it is made: at the rows' ends, so that nothing that counts is written over.
        self.rows.copy_(torch.tensor([[length, length + 1, 0, c] for length in cache.lengths]))
        self.seeds = choice.seeds.clone()
        # The graph reads the tables of masks and of indices: they must stay.
        self.masks, self.choice = (masks := StepMasks(model.base, model.context)), copy.copy(choice)
        self.choice.least = 0.0
        layouts, size = plan.layouts, plan.layouts[0].size
        several = len(layouts) > 1

        def step(tokens: Tensor, rows: Tensor, seeds: Tensor) -> tuple[Tensor, ...]:
            lengths, first, layout, drafted = rows.unbind(1)
            self.choice.seeds = seeds
            layout_of, slots = layout if several else None, lengths[:, None]
            positions, mask = masks.get(layouts, layout_of, cache, slots)
            cache.begin_step(size, tokens, slots)
            verifies = torch.arange(c, device=device) < drafted[:, None] if c else None
            fed = StepInput(
                tokens, c, verifies, None, layouts, layout_of, positions, mask, [], first, cache, self.choice, sampler_head
            )  # fmt: skip
            out = decode_step(model, fed)
            probabilities = [] if out.draft.probabilities is None else [out.draft.probabilities]
            return (out.own, out.num_accepted, out.numbers(), out.draft.tokens, *probabilities)

        inputs = (self.tokens, self.rows, self.seeds)
        before, cache.fixed = cache.fixed, True
        try:
            # Once as it is: it makes tables that steps share. The slots that it writes are the next step's own.
            step(*inputs)
            if layouts[0].num_mtp:
                self.indices = mask_index(layouts[0], device), block_index(layouts, c, device)
            self.replay = CAPTURES[device.type](step, inputs)
        finally:
            cache.fixed = before

    def run(
        self, tokens: Tensor, lengths: list[int], ends: list[int], plan: StepPlan, seeds: Tensor
    ) -> tuple[StepOutput, list[list[int]]]:
        """Run the step.

        Args:
            tokens: see ``StepInput``.
            lengths: tokens of each row in the cache.
            ends: see ``StepInput``.
            plan: what to feed, of the graph's shape.
            seeds: one a row, [B] int64.

        Returns:
            What it gives, good until the next run, and its ``numbers`` as the host reads them.
        """
        self.tokens.copy_(tokens)
        self.rows.copy_(torch.tensor([lengths, ends, plan.choice, plan.drafted]).t())
        self.seeds.copy_(seeds)
        own, kept, numbers, draft, *probabilities = self.replay()
        return StepOutput(own, kept, Drafts(draft, None, *probabilities)), numbers.tolist()
