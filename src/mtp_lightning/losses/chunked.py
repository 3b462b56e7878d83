# SPDX-License-Identifier: Apache-2.0
"""Sums of per-position losses over an unembedding, a chunk of positions at a time: never positions x vocabulary at once.

The gradient of each chunk is computed in the forward pass, while its logits exist, so that the unembedding is run once.
``torch.nn.functional.linear_cross_entropy`` (torch 2.13) was measured first: its chunked mean accumulates in the input's
dtype (a bfloat16 loss of 10.42 came out as 9.12), it is slower than this, it takes no other loss than cross-entropy, and
older releases lack it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mtp_lightning.types import compute_dtype

LOGITS_PER_CHUNK = 2**23
"""How many logits exist at once on a CPU, 32 MB of float32; on a GPU 16 times as many, for larger products."""


def chunk_size(hidden: Tensor, vocab_size: int) -> int:
    """How many positions are unembedded at once.

    Args:
        hidden: the states.
        vocab_size: V.

    Returns:
        At least 16.
    """
    return max(16, LOGITS_PER_CHUNK * (16 if hidden.is_cuda else 1) // vocab_size)


class _ChunkedSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weights: Tensor,
        losses: Callable[[Tensor, slice], Tensor],
        size: int,
        *parameters: Tensor,
    ) -> Tensor:
        dtype = compute_dtype(hidden.dtype)
        total = torch.zeros((), dtype=dtype, device=hidden.device)
        wanted = [t.requires_grad for t in (hidden, *parameters)]
        grads = [torch.zeros_like(t) if w else None for t, w in zip((hidden, *parameters), wanted, strict=True)]
        for begin in range(0, hidden.shape[0], size):
            part = slice(begin, min(begin + size, hidden.shape[0]))
            chunk = hidden[part].detach().requires_grad_(wanted[0])
            with torch.enable_grad():
                value = (losses(chunk, part).to(dtype) * weights[part].to(dtype)).sum()
            if any(wanted):
                inputs = [t for t, w in zip((chunk, *parameters), wanted, strict=True) if w]
                found = iter(torch.autograd.grad(value, inputs, allow_unused=True))
                for index, want in enumerate(wanted):
                    if want and (g := next(found)) is not None:
                        target = grads[index]
                        assert target is not None
                        target[part].copy_(g) if index == 0 else target.add_(g)
            total += value.detach()
        ctx.grads = grads
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        scaled = [None if g is None else g * upstream[0].to(g.dtype) for g in ctx.grads]
        return scaled[0], None, None, None, *scaled[1:]


def chunked_sum(
    hidden: Tensor,
    weights: Tensor,
    losses: Callable[[Tensor, slice], Tensor],
    vocab_size: int,
    parameters: tuple[Tensor, ...] = (),
) -> Tensor:
    """``(losses(hidden, all) * weights).sum()``, computed in chunks of positions.

    Args:
        hidden: states that the unembedding is applied to, [N, D].
        weights: weight of each position's loss, [N].
        losses: gives the loss per position of a chunk from its states [n, D] and the slice of N that it is; [n].
        vocab_size: V; sets the chunk's size.
        parameters: trained tensors that ``losses`` uses beside the states; they get their gradients too.

    Returns:
        The sum, scalar float32 (float64 for float64 states); 0 for N = 0. Once differentiable.
    """
    if hidden.shape[0] == 0:
        # 0, and still part of the graph of all that is trained.
        dtype = compute_dtype(hidden.dtype)
        return sum((p.flatten()[:0].sum() for p in parameters), hidden.sum()).to(dtype)
    size = chunk_size(hidden, vocab_size)
    return _ChunkedSum.apply(hidden, weights, losses, size, *parameters)
