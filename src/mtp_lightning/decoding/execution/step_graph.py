# SPDX-License-Identifier: Apache-2.0
"""StepGraph: a decoding step as one graph, from the tokens it feeds to the next drafts, without Python in between.

A graph is a recording of the operations of one step over buffers at fixed addresses. So everything that changes from step
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
from mtp_lightning.decoding.step_masks import StepLayout, StepMasks
from mtp_lightning.decoding.token_choice import TokenChoice
from mtp_lightning.modeling.network import MTPNetwork

WAITS = {"_local_scalar_dense", "nonzero", "masked_select"}
"""Operations that make the host, or a shape, depend on the values of tensors."""
COPIES = {"lift_fresh", "lift_fresh_copy"}
"""Tensors made from numbers of the host, which a CUDA graph can't contain."""
HOST = "a layer decides on the host what to do next, which a recording can't follow."

Step = Callable[..., tuple[Tensor, ...]]
Replay = Callable[[], tuple[Tensor, ...]]


def recorded(step: Step, inputs: Sequence[Tensor]) -> Step:
    """Record a step with example inputs; the recording takes other inputs of these shapes. RuntimeError: it can't be."""
    with packed_linear.as_operators():
        graph = make_fx(step)(*inputs)
    refused = WAITS | COPIES if inputs[0].is_cuda else WAITS
    if refused & {getattr(node.target, "_opname", "") for node in graph.graph.nodes}:
        raise RuntimeError(HOST)
    return graph


def compiled(step: Step, inputs: Sequence[Tensor]) -> Replay:
    """Compile a step for a CPU; ``inputs`` are buffers that it reads at each run."""
    recording = recorded(step, inputs)
    _compare(step, lambda: recording(*inputs), inputs)
    run = torch.compile(recording, dynamic=False, fullgraph=True)
    run(*inputs)  # compiles
    return lambda: run(*inputs)


def cuda_graph(step: Step, inputs: Sequence[Tensor]) -> Replay:
    """Capture a step as a CUDA graph; ``inputs`` are buffers that it reads, and its outputs are overwritten, at each run."""
    recorded(step, inputs)  # refuses what would fail in the middle of a capture
    with torch.cuda.device(inputs[0].device):
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # what kernels allocate at their first call must not be recorded
            for _ in range(2):
                step(*inputs)
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        # The outer context restores the stream if a capture fails; other threads may continue to use the device.
        with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph, capture_error_mode="thread_local"):
            outputs = step(*inputs)

    def replay() -> tuple[Tensor, ...]:
        graph.replay()
        return outputs

    _compare(step, replay, inputs)
    return replay


def _compare(step: Step, replay: Replay, inputs: Sequence[Tensor]) -> None:
    """Refuse a recording that differs from the step on other tokens than those it was made with."""
    tokens = inputs[0]
    tokens.copy_(torch.arange(1, 1 + tokens.numel(), device=tokens.device).view_as(tokens))
    expected = [each.clone() for each in step(*inputs) if not each.is_floating_point()]
    found = [each for each in replay() if not each.is_floating_point()]
    if not all(map(torch.equal, expected, found)):
        raise RuntimeError(HOST)


CAPTURES: dict[str, Callable[[Step, Sequence[Tensor]], Replay]] = {"cpu": compiled, "cuda": cuda_graph}
"""How graphs are made on each kind of device."""


class StepGraph:
    """A step of one shape over one cache; the model's fused layers are in use.

    ``layouts`` are all that rows may feed. Making one raises whatever a compiler or driver raises.
    """

    def __init__(
        self,
        model: MTPNetwork,
        cache: RowCache,
        choice: TokenChoice,
        sampler_head: bool,
        layouts: tuple[StepLayout, ...],
        num_drafts: int,
    ) -> None:
        device, B, c = model.base.device, len(cache.lengths), num_drafts
        # The graph's inputs; for each row: tokens in the cache, verified tokens, layout, drafts to verify.
        self.tokens = torch.zeros(B, 1 + c, dtype=torch.int64, device=device)
        self.rows = torch.zeros(B, 4, dtype=torch.int64, device=device)
        # It is run while it is made: at the rows' ends, so that nothing that counts is written over.
        self.rows.copy_(torch.tensor([[length, length + 1, 0, c] for length in cache.lengths]))
        self.seeds = choice.seeds.clone()
        # The graph reads the tables of masks and of indices: they must stay.
        self.masks, self.choice = (masks := StepMasks(model.base, model.context)), copy.copy(choice)
        size, several = layouts[0].size, len(layouts) > 1

        def step(tokens: Tensor, rows: Tensor, seeds: Tensor) -> tuple[Tensor, ...]:
            lengths, first_positions, layout, num_verified = rows.unbind(1)
            self.choice.seeds = seeds
            layout_index, slots = layout if several else None, lengths[:, None]
            position_ids, attention_mask = masks.get(layouts, layout_index, cache, slots)
            cache.begin_step(size, tokens, slots)
            output = decode_step(
                model,
                StepInput(
                    tokens=tokens,
                    num_drafts=c,
                    verify_mask=torch.arange(c, device=device) < num_verified[:, None] if c else None,
                    num_verified=None,
                    draft_scores=None,
                    layouts=layouts,
                    layout_index=layout_index,
                    position_ids=position_ids,
                    attention_mask=attention_mask,
                    lengths=[],
                    first_positions=first_positions,
                    cache=cache,
                    choice=self.choice,
                    sampler_head=sampler_head,
                    max_new_drafts=layouts[0].depth,
                    joint_logits=True,
                ),
            )
            return (output.base_tokens, output.num_accepted, output.packed(), output.drafts.tokens)

        inputs = (self.tokens, self.rows, self.seeds)
        before, cache.fixed = cache.fixed, True
        try:
            # Once eagerly: it makes tables that steps share. The slots that it writes are the next step's own.
            step(*inputs)
            if layouts[0].num_mtp:
                self.indices = mask_index(layouts[0], device), block_index(layouts, c, device)
            self.replay = CAPTURES[device.type](step, inputs)
        finally:
            cache.fixed = before

    def run(
        self,
        tokens: Tensor,
        slots: list[int],
        lengths: list[int],
        layout_index: list[int],
        num_verified: list[int],
        seeds: Tensor,
    ) -> tuple[StepOutput, Tensor]:
        """Run the step; returns its output, overwritten by the next run, and that ``packed`` for the host.

        ``tokens`` [B, 1 + c] as ``StepInput`` has them; for each row its tokens in the cache (``slots``), verified tokens
        (``lengths``), layout, drafts to verify, and seed.
        """
        self.tokens.copy_(tokens)
        self.rows.copy_(torch.tensor([slots, lengths, layout_index, num_verified]).t())
        self.seeds.copy_(seeds)
        base_tokens, accepted, packed, drafts = self.replay()
        return StepOutput(base_tokens, accepted, Drafts(drafts, None)), packed
