# SPDX-License-Identifier: Apache-2.0
"""Small sums over all processes, without the barrier that Lightning puts before each of its own."""

from __future__ import annotations

from typing import Literal

import torch.distributed
from torch import Tensor


def all_reduce(value: Tensor, how: Literal["sum", "mean", "max"]) -> Tensor:
    """A tensor reduced over all processes, in each of them. All must call it; alone it gives the tensor itself.

    Args:
        value: the tensor, the same shape everywhere, of floating point for a mean; it is overwritten.
        how: sum, mean or max.

    Returns:
        The reduced tensor.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return value
    operation = torch.distributed.ReduceOp.MAX if how == "max" else torch.distributed.ReduceOp.SUM
    torch.distributed.all_reduce(value, op=operation)
    return value / torch.distributed.get_world_size() if how == "mean" else value
