# SPDX-License-Identifier: Apache-2.0
"""Autoregressive sampling by the documented rule, slowly: whole prefixes through transformers, noise by Python integers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

MASK = (1 << 64) - 1


def mix(x: int) -> int:
    """SplitMix64's finaliser."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & MASK
    return x ^ (x >> 31)


def uniform(seed: int, position: int, token: int, stream: int = 0) -> float:
    """The number in (0, 1) of one token at one position."""
    key = mix((mix((seed + stream * 0x9E3779B97F4A7C15) & MASK) + position * 0xD1342543DE82EF95) & MASK)
    return ((mix((key + (token + 1) * 0x9E3779B97F4A7C15) & MASK) >> 12) + 0.5) / 2**52


def gumbel(seed: int, position: int, vocab_size: int, stream: int = 0) -> list[float]:
    """Gumbel noise of each token."""
    return [-math.log(-math.log(uniform(seed, position, token, stream))) for token in range(vocab_size)]


def nucleus(logits: list[float], temperature: float, top_p: float, top_k: int | None = None) -> list[float]:
    """Probabilities: softmax after the temperature, the top k, then the fewest tokens that have ``top_p`` together."""
    greatest = max(logits)
    weights = [math.exp((logit - greatest) / temperature) for logit in logits]
    order = sorted(range(len(logits)), key=lambda token: -weights[token])[:top_k]
    total, kept, sum_kept = sum(weights[token] for token in order), [], 0.0
    for token in order:
        kept.append(token)
        sum_kept += weights[token]
        if sum_kept >= top_p * total:
            break
    return [weights[token] / sum_kept if token in kept else 0.0 for token in range(len(logits))]


@torch.no_grad()
def sampled_text(
    base: Any,
    prompt: Tensor,
    num_tokens: int,
    seed: int,
    temperature: float,
    top_p: float = 1.0,
    top_k: int | None = None,
    processor: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> list[int]:
    """So many tokens after a prompt [n]."""
    text = prompt[None]
    for _ in range(num_tokens):
        scores = base(text, use_cache=False).logits[:, -1]
        if processor is not None:
            scores = processor(text, scores)
        probabilities = nucleus(scores[0].tolist(), temperature, top_p, top_k)
        noise = gumbel(seed, text.shape[1], len(probabilities))
        drawn = max(
            (math.log(probability) + noise[token], token) for token, probability in enumerate(probabilities) if probability
        )
        text = torch.cat([text, torch.tensor([[drawn[1]]])], dim=1)
    return text[0, len(prompt) :].tolist()
