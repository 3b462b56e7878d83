# SPDX-License-Identifier: Apache-2.0
"""What passes cost on a CPU, measured at start: decoder layers, unembedding and drafting, without attention."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from vllm.forward_context import set_forward_context

from mtp_lightning.integrations.vllm.choose_loads import Cost
from mtp_lightning.integrations.vllm.load_table import Blocks

ROWS = (1, 2, 4, 6, 9, 12, 16, 25, 36, 64, 128)
REPEATS = 5
BYTES = 64e6
"""Weights of the layers that are timed, at least, so that they are read from memory as in a whole pass, not from a cache."""


def _seconds(run: Callable[[], object]) -> float:
    """The shortest of a few runs, in time of this thread: what else runs on the machine does not count."""
    times = []
    for _ in range(REPEATS):
        begin = time.thread_time()
        run()
        times.append(time.thread_time() - begin)
    return min(times)


def _curve(seconds: Callable[[int], float]) -> Callable[[int], float]:
    """Seconds by number of rows: measured for some, in between interpolated, and in proportion above the last one."""
    # Noise only adds, so no number of rows takes longer than a larger one.
    times = np.minimum.accumulate([seconds(rows) for rows in reversed(ROWS)])[::-1]
    return lambda rows: float(np.interp(rows, ROWS, times)) * max(1.0, rows / ROWS[-1])


@torch.inference_mode()
def measured_costs(model: Any, vllm_config: Any) -> Cost:
    """Time parts of a pass of a model of ours whose weights are loaded; a few seconds."""
    mtp, parameter, width = model.mtp, next(model.parameters()), model.mtp.mask_embeddings.shape[1]
    layers = list(model.model.layers)[: math.ceil(BYTES / (12 * width**2 * parameter.element_size()))]

    def hidden(rows: int) -> torch.Tensor:
        return torch.randn(rows, width).to(parameter)

    def decoder(rows: int, masks: int) -> float:
        x, positions = hidden(rows), torch.zeros(rows, dtype=torch.int64)

        def run() -> None:
            mtp.state.layout = SimpleNamespace(num_tokens=rows - masks) if masks else None
            states, residual = x, None
            for layer in layers:
                states, residual = layer(positions, states.clone(), residual)

        try:
            return _seconds(run) * len(model.model.layers) / len(layers)
        finally:
            mtp.state.layout = None

    with set_forward_context(None, vllm_config, skip_compiled=True):
        plain, masked = _curve(lambda rows: decoder(rows, 0)), _curve(lambda rows: decoder(rows, rows - rows // 2))
        logits = _curve(lambda rows: _seconds(functools.partial(model.plain_logits, hidden(rows))))
        token, known = torch.zeros(1, dtype=torch.int64), model.plain_logits(hidden(1))[None]
        draft = _seconds(lambda: model.draft(hidden(1)[None], known, token))

    def cost(requests: int, drafts: int, blocks: Blocks) -> float:
        verified, masks = requests * (1 + drafts), requests * blocks.rows
        if not masks:
            return plain(verified) + logits(verified)
        seconds = masked(verified + masks) + draft * blocks.masks  # the sampler head's steps, each for all requests
        if not mtp.uses_base_head:
            return seconds + logits(verified)
        if masks <= mtp.max_joint_masks:
            return seconds + logits(verified + masks)
        return seconds + logits(verified) + logits(requests * blocks.masks)

    return cost
