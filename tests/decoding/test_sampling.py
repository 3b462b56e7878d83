# SPDX-License-Identifier: Apache-2.0
"""Sampled text is a function of prompt and seed alone, the same for every way to decode, and has the base's distribution."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from reference_sampling import sampled_text
from sampled_rows import (
    LENGTHS,
    ROWS,
    SEED,
    SETTINGS,
    TESTS,
    G,
    K,
    enumerated,
    fitted,
    p_value,
    padded,
    prompts,
    reference,
    rows_of,
)
from tiny import tiny_base
from torch import Tensor
from transformers import LogitsProcessorList, NoRepeatNGramLogitsProcessor, RepetitionPenaltyLogitsProcessor

from mtp_lightning.decoding import token_choice
from mtp_lightning.decoding.noise import row_seeds
from mtp_lightning.errors import UsageError


@pytest.mark.parametrize("setting", [0, 1])
def test_autoregressive_sampling_is_the_documented_rule(setting: int) -> None:
    model, (ids, mask) = fitted("gru"), padded(prompts())
    out = model.generate(ids, mask, decoding="autoregressive", max_new_tokens=G, seed=SEED, **SETTINGS[setting])
    assert rows_of(out) == [list(text) for text in reference(setting)]
    assert out.seeds == row_seeds(SEED, ROWS) and out.num_steps.tolist() == [G] * ROWS


@pytest.mark.parametrize(("kind", "setting"), [("quadratic", 0), ("linear", 1)])
def test_every_decoding_draws_the_same_text(kind: str, setting: int) -> None:
    model, expected, seeds = fitted("gru"), [list(text) for text in reference(setting)], row_seeds(SEED, ROWS)
    common = {"decoding": kind, "max_new_tokens": G, **SETTINGS[setting]}
    accepted: set[int] = set()
    for J in (1, 3, K, "auto"):
        out = model.generate(*padded(prompts()), seed=SEED, num_masks=J, **common)
        assert rows_of(out) == expected, J
        accepted |= {count for row in out.accepted_per_step for count in row}
        alone = model.generate(prompts()[3][None], seed=seeds[3], num_masks=J, **common)
        assert alone.sequences[0, LENGTHS[3] :].tolist() == expected[3]
        if J != "auto":  # the best plan depends on the whole batch
            assert alone.accepted_per_step[0] == out.accepted_per_step[3]
    assert {0, 1, 2} <= accepted
    for options in (
        {"num_masks": K, "draft_candidates": 24},
        {"draft_candidates": 5},
        {"sampler_head": False},
        {"num_masks": 4, "sampler_head": False, "draft_candidates": 9},
    ):
        assert rows_of(model.generate(*padded(prompts()), seed=SEED, **common, **options)) == expected, options


def test_seeds() -> None:
    model, prompt = fitted("gru"), prompts()[3]
    batch = prompt.expand(4, -1)
    options = {"max_new_tokens": 8, "temperature": 1.0}
    same = model.generate(batch, seed=[5, 5, 6, 5], **options).sequences.tolist()
    assert same[0] == same[1] == same[3] != same[2]
    derived = model.generate(batch, seed=5, **options)
    assert derived.sequences[0].tolist() == same[0] and len(set(map(tuple, derived.sequences.tolist()))) == 4
    torch.manual_seed(3)
    drawn = model.generate(batch, **options)
    assert drawn.seeds is not None
    assert torch.equal(model.generate(batch, seed=drawn.seeds, **options).sequences, drawn.sequences)
    assert not torch.equal(model.generate(batch, **options).sequences, drawn.sequences)
    torch.manual_seed(3)
    assert torch.equal(model.generate(batch, **options).sequences, drawn.sequences)
    assert model.generate(batch, max_new_tokens=2).seeds is None
    with pytest.raises(UsageError, match="seed"):
        model.generate(batch, seed=[1, 2], **options)


@pytest.mark.parametrize("kind", ["quadratic", "linear", "autoregressive"])
def test_top_k_and_processors(kind: str) -> None:
    """Processors see the row's own tokens up to the position, drafts included, and come before the temperature."""
    model, base, rows = fitted("gru"), tiny_base("qwen3"), prompts()[:4]
    seeds = row_seeds(SEED, 4)
    penalty, no_pairs = RepetitionPenaltyLogitsProcessor(1.4), NoRepeatNGramLogitsProcessor(2)

    def both(text: Tensor, scores: Tensor) -> Tensor:
        return no_pairs(text, penalty(text, scores))

    expected = [sampled_text(base, p, 10, seed, 0.8, 0.95, 20, both) for p, seed in zip(rows, seeds, strict=True)]
    out = model.generate(
        *padded(rows),
        decoding=kind,
        num_masks=4,
        max_new_tokens=10,
        temperature=0.8,
        top_p=0.95,
        top_k=20,
        seed=SEED,
        repetition_penalty=1.4,
        logits_processor=LogitsProcessorList([no_pairs]),
    )
    assert [out.sequences[r, len(p) : len(p) + 10].tolist() for r, p in enumerate(rows)] == expected


# --- Distribution: sequences of three tokens against their exactly enumerated probabilities ----------------------------


def planted(bias: float) -> Callable[..., Tensor]:
    """Noise that favours token 2 by so much of log-probability."""
    original = token_choice.gumbel_noise

    def noise(keys: Tensor, vocab_size: int) -> Tensor:
        out = original(keys, vocab_size)
        out[..., 2] += bias
        return out

    return noise


@pytest.mark.parametrize(
    ("verification", "listed", "count"),
    [
        ("coupled", "all", 40_000),
        ("rejection", 3, 40_000),
        pytest.param("coupled", 3, 200_000, marks=pytest.mark.slow),
        pytest.param("rejection", "all", 200_000, marks=pytest.mark.slow),
    ],
)
def test_sequences_have_the_bases_probabilities(verification: str, listed: Any, count: int) -> None:
    p, share = p_value(count, 5_000, num_masks=2, verification=verification, draft_candidates=listed)
    assert p > 0.01 / TESTS
    assert 0.2 < share < 0.8  # both outcomes are frequent


@pytest.mark.slow
@pytest.mark.parametrize("verification", ["coupled", "rejection"])
def test_a_bias_of_one_percentage_point_is_caught(verification: str, monkeypatch: pytest.MonkeyPatch) -> None:
    first = enumerated(torch.tensor([1, 3, 0]), 2.0).sum((1, 2))[2]
    bias = torch.log((first + 0.01) / (1 - first - 0.01) / (first / (1 - first)))
    monkeypatch.setattr(token_choice, "gumbel_noise", planted(float(bias)))
    p, _ = p_value(200_000, 5_000, num_masks=2, verification=verification)
    assert p < 0.001 / TESTS
