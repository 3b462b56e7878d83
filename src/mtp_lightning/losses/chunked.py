# SPDX-License-Identifier: Apache-2.0
"""Sums of per-position losses over an unembedding, a chunk of positions at a time: never positions x vocabulary at once.

The gradient of each chunk is computed in the forward pass, while its logits exist, so that the unembedding is run once.
``torch.nn.functional.linear_cross_entropy`` (torch 2.13) is not used: measured, its chunked mean accumulates in the input's
dtype (a bfloat16 loss of 10.42 came out as 9.12) and it is slower; it takes no other loss than cross-entropy, and older
releases lack it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mtp_lightning.types import compute_dtype

LOGITS_PER_CHUNK = 2**23
"""Number of logits that exist at once on a CPU, 32 MB of float32; 16 times as many on a GPU, for larger products."""


def chunk_size(hidden: Tensor, vocab_size: int) -> int:
    """Number of positions that are unembedded at once, at least 16."""
    return max(16, LOGITS_PER_CHUNK * (16 if hidden.is_cuda else 1) // vocab_size)


class _ChunkedSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weights: Tensor, losses: Callable[[Tensor, slice], Tensor], size: int, *parameters: Tensor
    ) -> Tensor:
        dtype = compute_dtype(hidden.dtype)
        total = torch.zeros((), dtype=dtype, device=hidden.device)
        inputs = (hidden, *parameters)
        grads = [torch.zeros_like(t) if t.requires_grad else None for t in inputs]
        for begin in range(0, hidden.shape[0], size):
            positions = slice(begin, min(begin + size, hidden.shape[0]))
            chunk = hidden[positions].detach().requires_grad_(hidden.requires_grad)
            with torch.enable_grad():
                value = (losses(chunk, positions).to(dtype) * weights[positions].to(dtype)).sum()
            # The gradient of the hidden states is written chunk by chunk, those of parameters are summed over chunks.
            wanted = [(t, g) for t, g in zip((chunk, *parameters), grads, strict=True) if g is not None]
            chunk_grads = torch.autograd.grad(value, [t for t, _ in wanted], allow_unused=True) if wanted else ()
            for (tensor, accumulated), grad in zip(wanted, chunk_grads, strict=True):
                if grad is not None:
                    accumulated[positions].copy_(grad) if tensor is chunk else accumulated.add_(grad)
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
    """``(losses(hidden, all) * weights).sum()`` of states [N, D] and weights [N], computed in chunks of positions.

    ``losses`` gives the loss per position of a chunk, [n], from its states [n, D] and its slice of the N positions.
    ``parameters`` are other trained tensors that it uses; they get their gradients too. The sum is a float32 scalar (float64
    for float64 states), 0 for N = 0, once differentiable.
    """
    if hidden.shape[0] == 0:  # 0, and still part of the graph of everything that is trained
        return sum((p.flatten()[:0].sum() for p in parameters), hidden.sum()).to(compute_dtype(hidden.dtype))
    trained = parameters if torch.is_grad_enabled() else ()  # in evaluation there are no gradients to compute
    return _ChunkedSum.apply(hidden, weights, losses, chunk_size(hidden, vocab_size), *trained)
