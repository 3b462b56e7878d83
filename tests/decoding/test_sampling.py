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
from tiny import greedy_text, tiny_base
from torch import Tensor
from transformers import LogitsProcessorList, NoRepeatNGramLogitsProcessor, RepetitionPenaltyLogitsProcessor

from mtp_lightning.decoding import token_choice
from mtp_lightning.decoding.noise import row_seeds
from mtp_lightning.decoding.options import DecodingOptions
from mtp_lightning.decoding.token_choice import Prefixes, TokenChoice
from mtp_lightning.errors import UsageError


@pytest.mark.parametrize("setting", [0, 1])
def test_autoregressive_sampling_is_the_documented_rule(setting: int) -> None:
    model, (ids, mask) = fitted("gru"), padded(prompts())
    out = model.generate(ids, mask, decoding="autoregressive", max_new_tokens=G, seed=SEED, **SETTINGS[setting])
    assert rows_of(out) == [list(text) for text in reference(setting)]
    assert out.seeds == row_seeds(SEED, ROWS) and out.num_steps.tolist() == [G] * ROWS


@pytest.mark.parametrize("setting", [0, 1])
@pytest.mark.parametrize("kind", ["quadratic", "linear"])
@pytest.mark.parametrize("head", ["mlp", "gru"])
def test_every_decoding_draws_the_same_text(head: str, kind: str, setting: int) -> None:
    model, expected, kept = fitted(head), [list(text) for text in reference(setting)], []
    seeds = row_seeds(SEED, ROWS)
    for J in [*range(1, K + 1), "auto"]:
        options = {"decoding": kind, "num_masks": J, "max_new_tokens": G, **SETTINGS[setting]}
        out = model.generate(*padded(prompts()), seed=SEED, **options)
        assert rows_of(out) == expected, J
        kept += [count for row in out.accepted_per_step for count in row]
        for r in (0, 5, 10) if J in (1, 3, 8, "auto") else (3,):  # a row by itself
            alone = model.generate(prompts()[r][None], seed=seeds[r], **options)
            assert alone.sequences[0, LENGTHS[r] :].tolist() == expected[r]
            if J != "auto":  # what pays depends on the whole batch
                assert alone.accepted_per_step[0] == out.accepted_per_step[r]
    assert {0, 1, 2, 4} <= set(kept)  # the drafts are of all kinds
    kept.clear()
    for J, listed in ((8, 5), (3, 24), ("auto", 5), ("auto", 48)):
        options = {"decoding": kind, "num_masks": J, "max_new_tokens": G, **SETTINGS[setting]}
        out = model.generate(*padded(prompts()), seed=SEED, draft_vocabulary=listed, **options)
        assert rows_of(out) == expected, (J, listed)
        kept += [count for row in out.accepted_per_step for count in row]
    assert {0, 1} <= set(kept)
    without = model.generate(
        *padded(prompts()), seed=SEED, sampler_head=False, decoding=kind, **SETTINGS[setting], max_new_tokens=G
    )
    assert rows_of(without) == expected
    options = {"decoding": kind, "max_new_tokens": G, "sampler_head": False, "draft_vocabulary": 9, **SETTINGS[setting]}
    assert rows_of(model.generate(*padded(prompts()), seed=SEED, num_masks=4, **options)) == expected


def test_seeds() -> None:
    model, prompt = fitted("mlp"), prompts()[3]
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
    with pytest.raises(UsageError, match="seed must be an int or one for each of the 4 rows, got 2"):
        model.generate(batch, seed=[1, 2], **options)


@pytest.mark.parametrize("kind", ["quadratic", "linear", "autoregressive"])
def test_top_k_and_processors(kind: str) -> None:
    """Processors see the row's own tokens up to the position, drafts included, and come before the temperature."""
    model, base, rows = fitted("gru"), tiny_base("qwen3"), prompts()[:4]
    seeds = row_seeds(SEED, 4)
    penalty, no_pairs = RepetitionPenaltyLogitsProcessor(1.4), NoRepeatNGramLogitsProcessor(2)
    expected = []
    for prompt, seed in zip(rows, seeds, strict=True):
        both: Callable[[Tensor, Tensor], Tensor] = lambda text, scores: no_pairs(text, penalty(text, scores))  # noqa: E731
        expected.append(sampled_text(base, prompt, 10, seed, 0.8, 0.95, 20, both))
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


@pytest.mark.parametrize("kind", ["quadratic", "linear", "autoregressive"])
def test_greedy_decoding_with_processors_is_transformers_own(kind: str) -> None:
    model, base, rows = fitted("gru"), tiny_base("qwen3"), prompts()[:4]
    processors = LogitsProcessorList([NoRepeatNGramLogitsProcessor(2)])
    out = model.generate(
        *padded(rows), decoding=kind, num_masks=4, max_new_tokens=12, repetition_penalty=1.3, logits_processor=processors
    )
    for r, prompt in enumerate(rows):
        expected = greedy_text(base, prompt, 12, repetition_penalty=1.3, no_repeat_ngram_size=2)
        assert out.sequences[r, len(prompt) : len(prompt) + 12].tolist() == expected
        assert expected != greedy_text(base, prompt, 12)


# --- Distribution: sequences of three tokens against their exactly enumerated probabilities ----------------------------


def planted(bias: float) -> Callable[..., Tensor]:
    """Noise that favours token 2 by so much of log-probability."""
    original = token_choice.gumbel_noise

    def noise(keys: Tensor, vocab_size: int) -> Tensor:
        out = original(keys, vocab_size)
        out[..., 2] += bias
        return out

    return noise


@pytest.mark.parametrize("count", [40_000, pytest.param(200_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("listed", ["all", 3])
@pytest.mark.parametrize("verification", ["coupled", "rejection"])
def test_sequences_have_the_bases_probabilities(verification: str, listed: Any, count: int) -> None:
    p, share = p_value(count, 5_000, num_masks=2, verification=verification, draft_vocabulary=listed)
    assert p > 0.01 / TESTS
    assert 0.2 < share < 0.8  # both outcomes are frequent


@pytest.mark.parametrize("count", [pytest.param(200_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("verification", ["coupled", "rejection"])
def test_a_bias_of_one_percentage_point_is_caught(verification: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    first = enumerated(torch.tensor([1, 3, 0]), 2.0).sum((1, 2))[2]
    bias = torch.log((first + 0.01) / (1 - first - 0.01) / (first / (1 - first)))
    monkeypatch.setattr(token_choice, "gumbel_noise", planted(float(bias)))
    p, _ = p_value(count, 5_000, num_masks=2, verification=verification)
    assert p < 0.001 / TESTS


def test_processors_see_the_text_and_verified_drafts_only() -> None:
    """A plan may feed more drafts than a row has; what is fed in their place is padding."""
    seen: list[list[int]] = []

    def processor(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        seen.append(ids[0].tolist())
        return scores + 1.0

    choice = TokenChoice(DecodingOptions(logits_processor=[processor]), [0, 0], torch.device("cpu"))
    tokens, logits = torch.arange(20).view(2, 10), torch.zeros(2, 4, 5)
    scores = choice.target(logits, Prefixes(tokens, [3, 2], [1, 3]))
    assert scores[:, :, 0].tolist() == [[1.0, 1.0, 0.0, 0.0], [1.0] * 4]
    assert [len(ids) for ids in seen] == [3, 4, 2, 3, 4, 5] and seen[1] == [0, 1, 2, 3]
