# SPDX-License-Identifier: Apache-2.0
"""The load table that is expected to be fastest, from what passes cost. No vLLM."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mtp_lightning.integrations.vllm.load_table import KINDS, PLAIN, Blocks, blocks_of

ACCEPTANCE = 0.55
"""Probability that a draft token is accepted if those before it are: about that of a small adapter on its own domain."""
MIN_GAIN = 1.15
"""Least estimated gain over plain passes at which masks are added: attention and vLLM's own work are not in the costs."""

Cost = Callable[[int, int, Blocks], float]
"""Seconds of a pass by requests, draft tokens of each that it verifies, and the blocks of each."""


def gain(cost: Cost, requests: int, kind: str, masks: int) -> float:
    """Expected tokens a second over those of plain passes."""
    blocks, plain = blocks_of(kind, masks), cost(requests, 0, PLAIN)
    drafted = sum(ACCEPTANCE**j for j in range(1, masks + 1))  # accepted tokens of a draft
    if kind == "alternating":
        return (2 + drafted) * plain / (cost(requests, 0, blocks) + cost(requests, masks, PLAIN))
    # In linear decoding the pass after a draft that was not accepted whole has no draft.
    share = 1.0 if kind == "quadratic" else 1 / (2 - ACCEPTANCE**masks)
    seconds = share * cost(requests, masks, blocks) + (1 - share) * cost(requests, 0, blocks)
    return (1 + share * drafted) * plain / seconds


def choose_loads(cost: Cost, decoding: str, num_masks: int, max_requests: int) -> list[list[Any]]:
    """The fastest table.

    Args:
        cost: what passes cost.
        decoding: quadratic: all kinds are tried; linear: all but that one.
        num_masks: the largest number of masks in a block.
        max_requests: the largest number of requests in a pass.

    Returns:
        Rows ``[requests, kind, masks]``, up to the load from which plain passes are best.
    """
    kinds = [kind for kind in KINDS if kind != "quadratic" or decoding == "quadratic"]
    table: list[list[Any]] = []
    requests = 1
    while requests <= max_requests:
        gains = {(kind, k): gain(cost, requests, kind, k) for kind in kinds for k in range(1, num_masks + 1)}
        best = max(gains, key=lambda key: gains[key])
        if gains[best] < MIN_GAIN:
            break
        if table and table[-1][1:] == [*best]:
            table[-1][0] = requests
        else:
            table.append([requests, *best])
        requests *= 2
    return table
