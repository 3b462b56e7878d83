# SPDX-License-Identifier: Apache-2.0
"""Repairs sampling under speculative decoding in vLLM's CPU build, which gives wrong distributions for any drafter.

vLLM 0.32 copies the temperature, top-k and top-p of each request to its draft tokens into a temporary tensor, so those that
are used are uninitialised memory (vLLM's issue 55005). Greedy decoding and GPUs are not affected.
"""

from __future__ import annotations

import torch
from torch import Tensor


def expand_to_tokens(
    x: Tensor, cu_num_tokens: Tensor, num_tokens: int, replace_from: int = 0, replace_to: int = 0
) -> Tensor:
    """Each request's value for each of its tokens.

    Args:
        x: values of requests, [R].
        cu_num_tokens: tokens of each request and those before it, added up, [R].
        num_tokens: tokens of all requests.
        replace_from: a value to replace.
        replace_to: what it is replaced by.

    Returns:
        The values, [num_tokens], in the dtype of ``x``.
    """
    counts = torch.diff(cu_num_tokens, prepend=cu_num_tokens.new_zeros(1)).long()
    replaced = torch.where(x == replace_from, torch.full_like(x, replace_to), x)
    return replaced.repeat_interleave(counts, output_size=num_tokens)


def repair_cpu_sampling() -> bool:
    """Replace vLLM's function in this process if it gives wrong values; returns whether it did."""
    import vllm.v1.sample.rejection_sampler as sampler

    x, ends = torch.tensor([0.5, 0.0]), torch.tensor([2, 5], dtype=torch.int32)
    if torch.equal(sampler.expand_batch_to_tokens(x, ends, 5, 0, 1), expand_to_tokens(x, ends, 5, 0, 1)):
        return False
    sampler.expand_batch_to_tokens = expand_to_tokens
    return True
