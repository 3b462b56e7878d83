# SPDX-License-Identifier: Apache-2.0
"""Measures what the parts of a decoding step cost on this machine: once per model, in about a second."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from typing import TypeVar

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
"""Where the curve is measured, most important first: for a slow model the last ones are extrapolated."""
MIN_POINTS = 4
"""Points that are measured however slow the model is."""
SECONDS, ROUNDS = 0.6, 5
"""Time for the curve; half and a third of it are for warming up and for the other parts. Rounds after the first."""
CONTEXT = 64
"""Tokens in the cache while measuring."""
NUM_VERIFIED = 9
"""Positions whose verification is timed, against that of one."""
MAX_EXTRA_DRAFTS = 4
"""Draft tokens that are timed in addition to the first."""

Key = TypeVar("Key", int, str)


class _StepParts:
    """The parts of a step of one row, as calls to be timed."""

    def __init__(self, model: MTPNetwork, choice: TokenChoice) -> None:
        self.model, self.choice, self.device = model, choice, model.base.device
        self.max_positions = min(POSITIONS[-1], model.context // 2)
        length = min(CONTEXT, model.context - self.max_positions)
        self.cache, self.masks = RowCache(model.base, 1), StepMasks(model.base, model.context)
        self.cache.reserve(length + self.max_positions, length + self.max_positions)
        self.cache.lengths = [length]
        self.first = torch.tensor([length], device=self.device)
        self.hidden: Tensor | None = None  # of two positions

    def decoder(self, num_positions: int) -> Callable[[], Tensor]:
        """A pass of the decoder over one token and masks."""
        tokens = torch.zeros(1, num_positions, dtype=torch.int64, device=self.device)
        model, layouts = self.model, (StepLayout(num_positions, 0, ()),)
        inputs = model.embed(tokens)

        def call() -> Tensor:
            positions, mask = self.masks.get(layouts, None, self.cache, None)
            self.cache.begin_step(num_positions, tokens, None)
            with model.gate.over_last(num_positions - 1 if model.lora.gated else num_positions):
                return run_decoder(model.base, inputs, mask, positions, self.cache)

        return call

    def warm_up(self, expected_positions: Collection[int]) -> None:
        """Run each size once, so that no step of a text is the first of its shape."""
        begin = time.perf_counter()
        for num_positions in (1, *sorted(expected_positions)):
            if num_positions <= self.max_positions and time.perf_counter() - begin < SECONDS / 2:
                self.decoder(num_positions)()
        self.hidden = self.decoder(2)()

    def verify(self, num_positions: int) -> Callable[[], object]:
        """Unembedding and choice of this number of tokens."""
        assert self.hidden is not None
        hidden = self.hidden[:, :1].expand(-1, num_positions, -1)
        positions = self.first[:, None] + torch.arange(num_positions, device=self.device)
        return lambda: self.choice.draw(self.choice.warped(self.model.unembed(hidden)), positions)

    def draft(self, num_tokens: int) -> Callable[[], object]:
        """Drafting of this number of tokens."""
        assert self.hidden is not None
        hidden = self.hidden[:, 1:].expand(-1, num_tokens, -1)
        verified = torch.zeros(1, dtype=torch.int64, device=self.device)
        return lambda: decoding_step.draft_block(self.model, hidden, verified, self.first, self.choice, True)


def _time(
    calls: Mapping[Key, Callable[[], object]],
    before: Callable[[Key], object],
    min_calls: int,
    limit: float,
    device: torch.device,
) -> dict[Key, float]:
    """Time calls, most important first, over a few rounds, in turn, so that a busy moment affects all alike.

    ``before`` runs what a step runs before the call, so that the CPU's caches contain the same. At least ``min_calls`` are
    timed; after ``limit`` seconds no other one starts. Each call's least seconds count; its first time, which includes
    preparations, only if there was no other.
    """

    def synchronize() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    first: dict[Key, float] = {}
    best: dict[Key, float] = {}
    begin = time.perf_counter()
    for _ in range(ROUNDS + 1):
        for key, call in calls.items():
            if len(first) >= min_calls and time.perf_counter() - begin > limit:
                return {**first, **best}
            before(key)
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
def measure_step_costs(model: MTPNetwork, choice: TokenChoice, expected_positions: Collection[int] = ()) -> StepCosts:
    """Measure the costs of steps of one row; the model is in ``DecodingMode``, ``expected_positions`` are run beforehand."""
    parts = _StepParts(model, choice)
    parts.warm_up(expected_positions)
    draft_one, decode_two = parts.draft(1), parts.decoder(2)

    # The curve. A plain step follows another one, any other step follows the drafting that it verifies.
    decoders = {n: parts.decoder(n) for n in POSITIONS if n <= parts.max_positions}
    curve = _time(decoders, lambda n: draft_one() if n > 1 else None, MIN_POINTS, SECONDS, parts.device)

    # Verification and drafting follow the decoder. All are timed: none may count as free for lack of time.
    extra_drafts = min(model.num_masks, MAX_EXTRA_DRAFTS)
    others = {
        "verify one": parts.verify(1),
        "verify more": parts.verify(NUM_VERIFIED),
        "draft one": draft_one,
        "draft more": parts.draft(1 + extra_drafts),
    }
    seconds = _time(others, lambda _: decode_two(), len(others), SECONDS / 3, parts.device)

    positions = tuple(sorted(curve))
    per_draft = max(0.0, (seconds["draft more"] - seconds["draft one"]) / extra_drafts)
    return StepCosts(
        positions=positions,
        seconds=tuple(curve[n] for n in positions),
        per_verified=max(0.0, (seconds["verify more"] - seconds["verify one"]) / (NUM_VERIFIED - 1)),
        per_draft=per_draft,
        draft_start=max(0.0, seconds["draft one"] - per_draft),
    )
