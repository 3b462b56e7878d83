# SPDX-License-Identifier: Apache-2.0
"""Lockstep: processes that hold shards of one model decode different texts without a deadlock. No Lightning.

Every forward pass of a sharded model needs all processes: each gathers the weights from the others. The number of passes
depends on the text, so a process that is done early runs dummy forward passes until all are done.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.distributed

from mtp_lightning.decoding.generation import generate
from mtp_lightning.modeling.network import MTPNetwork


@contextlib.contextmanager
def in_step(model: MTPNetwork) -> Iterator[None]:
    """Within the block processes may run the model different numbers of times; all must enter and leave it.

    A model that is not sharded needs no synchronisation.
    """
    if not model.is_sharded or torch.distributed.get_world_size() == 1:
        yield
        return
    device = model.base.device

    def any_busy(busy: bool) -> bool:
        count = torch.tensor(float(busy), device=device)
        torch.distributed.all_reduce(count)
        return bool(count.item() > 0)

    def announce(*_: object) -> None:
        any_busy(True)

    # Before the model's own hook, which gathers weights: all processes then do the two in the same order.
    handle = model.register_forward_pre_hook(announce, prepend=True)
    try:
        yield
    finally:
        handle.remove()
    while any_busy(False):
        # A dummy pass: the shortest text possible.
        generate(model, torch.zeros(1, 1, dtype=torch.int64, device=device), max_new_tokens=1, decoding="autoregressive")
