# SPDX-License-Identifier: Apache-2.0
"""Measures what the parts of a decoding step cost on this machine: once a model, in about a second."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection

import torch
from torch import Tensor

from mtp_lightning.decoding.execution import step as decoding_step
from mtp_lightning.decoding.planning.step_costs import StepCosts
from mtp_lightning.decoding.row_cache import RowCache
from mtp_lightning.decoding.step_masks import StepLayout, StepMasks
from mtp_lightning.decoding.token_choice import TokenChoice
from mtp_lightning.modeling.decoder import run_decoder
from mtp_lightning.modeling.network import MTPNetwork

POSITIONS = (1, 2, 3, 5, 9, 17, 33, 81)
"""Where the curve is measured, in the order of importance: a slow model's last ones are extrapolated."""
SECONDS, ROUNDS = 0.6, 5
CONTEXT = 64
"""Tokens in the cache while measuring."""


def _time(
    calls: dict[int, Callable[[], object]],
    between: Callable[[], object],
    least: int,
    budget: float,
    synchronize: Callable[[], None],
) -> dict[int, float]:
    """Time calls over a few rounds, in turn, so that a busy moment hits all alike.

    Args:
        calls: the calls by number, in the order of importance.
        between: run before each but number 1: what a step runs before it, so that caches hold what they hold then.
        least: calls that are made at least once, whatever it takes.
        budget: seconds after which no other call begins.
        synchronize: waits for the device.

    Returns:
        The least seconds of each call that was made; its first counts only where there was no other, for it also makes
        things ready.
    """
    first: dict[int, float] = {}
    best: dict[int, float] = {}
    begin = time.perf_counter()
    for _ in range(ROUNDS + 1):
        for key, call in calls.items():
            if len(first) >= least and time.perf_counter() - begin > budget:
                return {**first, **best}
            if key != 1:
                between()
            synchronize()
            start = time.perf_counter()
            call()
            synchronize()
            seconds = time.perf_counter() - start
            if key in first:
                best[key] = min(best.get(key, float("inf")), seconds)
            else:
                first[key] = seconds
    return {**first, **best}


@torch.inference_mode()
def measure_step_costs(model: MTPNetwork, choice: TokenChoice, usual_positions: Collection[int] = ()) -> StepCosts:
    """Measure them, with the decoder as it is while decoding.

    Args:
        model: the model, its fused layers in use.
        choice: how tokens are chosen; of one row.
        usual_positions: positions of steps to come.

    Returns:
        The costs.
    """
    device, k = model.base.device, model.num_masks

    def synchronize() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    cache, masks = RowCache(model.base, 1), StepMasks(model.base, model.context)
    largest = min(POSITIONS[-1], model.context // 2)
    cached = min(CONTEXT, model.context - largest)
    cache.reserve(cached + largest, cached + largest)

    def forward(num_positions: int) -> Callable[[], Tensor]:
        tokens = torch.zeros(1, num_positions, dtype=torch.int64, device=device)
        inputs, layouts = model.embed(tokens), (StepLayout(num_positions, 0, ()),)

        def call() -> Tensor:
            positions, mask = masks.get(layouts, None, cache, None)
            cache.begin_step(num_positions, tokens, None)
            with model.gate.open(num_positions - 1 if model.lora.gated else num_positions):
                return run_decoder(model.base, inputs, mask, positions, cache)

        return call

    cache.lengths = [cached]
    begin = time.perf_counter()
    for num_positions in (1, *sorted(usual_positions)):  # so that no step of a text is the first of its shape
        if num_positions <= largest and time.perf_counter() - begin < SECONDS / 2:
            forward(num_positions)()
    hidden = forward(2)()
    deep = min(k, 4)
    at = torch.tensor([cached], device=device)
    verified = torch.zeros(1, dtype=torch.int64, device=device)

    def choose(count: int) -> Callable[[], object]:
        states, places = hidden[:, :1].expand(-1, count, -1), at[:, None] + torch.arange(count, device=device)
        return lambda: choice.draw(choice.warped(model.unembed(states)), places)

    def chain(depth: int) -> Callable[[], object]:
        states = hidden[:, 1:].expand(-1, depth, -1)
        return lambda: decoding_step.draft_block(model, states, verified, at, choice, True)

    # A curve needs a few points, and no part may count as free because there was no time for it.
    seconds = _time({n: forward(n) for n in POSITIONS if n <= largest}, chain(1), 4, SECONDS, synchronize)
    others = {-1: choose(1), 9: choose(9), -2: chain(1), -2 - deep: chain(deep + 1)}
    parts = _time(others, forward(2), len(others), SECONDS / 3, synchronize)
    drafted = max(0.0, (parts[-2 - deep] - parts[-2]) / deep)
    points = tuple(sorted(seconds))
    return StepCosts(
        points,
        tuple(seconds[n] for n in points),
        max(0.0, (parts[9] - parts[-1]) / 8),
        drafted,
        max(0.0, parts[-2] - drafted),
    )
