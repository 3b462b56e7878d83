# SPDX-License-Identifier: Apache-2.0
"""Rows of sampled text by the slow reference, and a model that has learnt half of them. Helpers of the tests, no tests."""

from __future__ import annotations

import functools
from typing import Any

import torch
from reference_sampling import sampled_text
from tiny import learn, tiny_base, tiny_model, token_row
from torch import Tensor

from mtp_lightning.decoding.loop import decode_rows
from mtp_lightning.decoding.noise import row_seeds
from mtp_lightning.decoding.options import DecodingOptions
from mtp_lightning.model import MTPModel
from mtp_lightning.sampler_heads import GRUSamplerHead, MLPSamplerHead

ROWS, G, K, SEED = 8, 14, 8, 11

LENGTHS = [1 + 3 * r % 11 for r in range(ROWS)]

SETTINGS: list[dict[str, Any]] = [{"temperature": 0.7, "top_p": 0.9}, {"temperature": 1.0, "top_p": 0.9}]


def prompts() -> list[Tensor]:
    return [token_row([n], seed=30 + r).input_ids for r, n in enumerate(LENGTHS)]


def padded(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_side="left")
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side="left")
    return ids, mask


@functools.cache
def reference(setting: int) -> tuple[tuple[int, ...], ...]:
    """The texts of all rows, by the slow reference."""
    base, seeds = tiny_base("qwen3"), row_seeds(SEED, ROWS)
    texts = [sampled_text(base, p, G, s, **SETTINGS[setting]) for p, s in zip(prompts(), seeds, strict=True)]
    return tuple(map(tuple, texts))


@functools.cache
def fitted(head: str) -> MTPModel:
    """A model that has learnt a half of the texts: its drafts are often right and often not."""
    model = tiny_model("qwen3", K, sampler_head={"mlp": MLPSamplerHead, "gru": GRUSamplerHead}[head]())
    texts = [torch.tensor([*p.tolist(), *t]) for s in (0, 1) for p, t in zip(prompts(), reference(s), strict=True)][::2]
    return learn(model, texts, 60)


def rows_of(out: Any) -> list[list[int]]:
    return [out.sequences[r, n : n + G].tolist() for r, n in enumerate(LENGTHS)]


SMALL = 5
"""Vocabulary: 125 sequences of three tokens."""


@functools.cache
def small_model() -> MTPModel:
    return tiny_model("llama", 2, sampler_head=GRUSamplerHead(), vocab_size=SMALL, initializer_range=0.2)


@torch.no_grad()
def enumerated(prompt: Tensor, temperature: float) -> Tensor:
    """The probability of each sequence of three tokens, [V, V, V]."""
    base, probabilities = small_model().base, torch.ones((), dtype=torch.float64)
    for n in range(3):
        prefixes = (
            torch.cartesian_prod(*[torch.arange(SMALL)] * n).view(-1, n) if n else torch.empty(1, 0, dtype=torch.int64)
        )
        texts = torch.cat([prompt.expand(len(prefixes), -1), prefixes], dim=1)
        next_token = (base(texts, use_cache=False).logits[:, -1] / temperature).softmax(-1)
        probabilities = probabilities[..., None] * next_token.view(*[SMALL] * n, SMALL)
    return probabilities


def p_value(count: int, batch: int, **options: Any) -> tuple[float, float]:
    """Of a chi-square test of so many sequences, and the share of verified drafts that were kept."""
    model, prompt = small_model(), torch.tensor([1, 3, 0])
    counts, drafted, kept = torch.zeros(SMALL**3, dtype=torch.float64), 0, 0
    for first in range(0, count, batch):
        seeds = row_seeds(77, batch, first)
        texts: list[list[int]] = [[] for _ in seeds]
        # A fourth token: else the third would never be a draft.
        settings = DecodingOptions(temperature=2.0, seed=seeds, max_new_tokens=4, **options)
        for steps in decode_rows(model, [prompt] * batch, settings):
            for row, step, _ in steps:
                texts[row] += step.tokens
                drafted += step.num_drafts
                kept += len(step.tokens) - 1
        codes = torch.tensor(texts)[:, :3] @ torch.tensor([SMALL**2, SMALL, 1])
        counts += codes.bincount(minlength=SMALL**3)
    expected = enumerated(prompt, 2.0).flatten() * count
    assert expected.min() > 5  # else the statistic is not a chi-square
    statistic = ((counts - expected) ** 2 / expected).sum()
    freedom = torch.tensor(SMALL**3 - 1, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom / 2, statistic / 2)), kept / max(1, drafted)


TESTS = 6
"""Tests of the distribution below that must pass: Bonferroni's correction."""
