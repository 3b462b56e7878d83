# SPDX-License-Identifier: Apache-2.0
"""Texts against autoregressive decoding: planted lossy decoders, the place of the first difference, the gap there."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny import greedy_text, tiny_model

from mtp_lightning.decoding import loop as decoding
from mtp_lightning.decoding.execution import step as decoding_step
from mtp_lightning.decoding.noise import TOKEN_STREAM, gumbel_noise, noise_keys
from mtp_lightning.decoding.options import DecodingOptions
from mtp_lightning.errors import UsageError
from mtp_lightning.evaluation.losslessness import find_difference, top_two_gap
from mtp_lightning.model import MTPModel
from mtp_lightning.modeling.gated_lora import LoRA
from mtp_lightning.text.prompts import Prompt

PROMPTS = [Prompt("", [1 + i, 5], "") for i in range(5)]
OPTIONS = DecodingOptions(num_masks=3, max_new_tokens=20)


def decoded(model: MTPModel, prompt: Prompt, options: DecodingOptions) -> list[int]:
    return [t for step in decoding.decode(model, torch.tensor(prompt.input_ids), options) for t in step.tokens]


@pytest.mark.parametrize("max_steps", [None, 3])
def test_a_lossy_decoder_is_caught(model: MTPModel, max_steps: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    # Every draft is accepted.
    monkeypatch.setattr(decoding_step, "num_accepted", lambda draft, *others: torch.full((len(draft),), draft.shape[1]))
    options = replace(OPTIONS, max_steps=max_steps)
    differences = []
    for prompt in PROMPTS:
        got, expected = decoded(model, prompt, options), greedy_text(model.base, torch.tensor(prompt.input_ids), 20)
        difference = find_difference(model, prompt, options, got)
        differences.append(difference)
        assert (difference is None) == (got == expected[: len(got)])
        if difference is not None:
            place = next(i for i in range(len(got)) if got[i] != expected[i])
            before = torch.tensor([prompt.input_ids + expected[:place]])
            top = model.base(before).logits[0, -1].sort(descending=True).values
            assert difference[:3] == (place, expected[place], got[place])
            assert difference.gap == pytest.approx((top[0] - top[1]).item(), abs=1e-12)  # other order of sums
    assert any(differences)


def test_a_text_that_stops_too_early_is_caught() -> None:
    model = tiny_model()
    text = decoded(model, PROMPTS[0], OPTIONS)
    assert find_difference(model, PROMPTS[0], OPTIONS, text) is None
    difference = find_difference(model, PROMPTS[0], OPTIONS, text[:5])
    assert difference is not None and difference[:3] == (5, text[5], None)


@pytest.mark.parametrize("gated", [True, False])
def test_the_model_that_verifies_is_the_reference(gated: bool) -> None:
    # A standard LoRA changes next tokens: the text is then that of base and LoRA together.
    model = tiny_model(lora=LoRA(rank=4, gated=gated))
    texts = [decoded(model, prompt, OPTIONS) for prompt in PROMPTS]
    assert [find_difference(model, prompt, OPTIONS, text) for prompt, text in zip(PROMPTS, texts, strict=True)] == [None] * 5
    text, prompt = texts[0], PROMPTS[0].input_ids
    assert (text == greedy_text(model.base, torch.tensor(prompt), 20)) == gated
    # The gap is of the same logits: the most likely token there is the next one of the text.
    with model.gate.over_last(0 if gated else 7):
        logits = model.base(torch.tensor([prompt + text[:5]])).logits[0, -1]
    assert logits.argmax() == text[5]
    expected = (logits.max() - logits.topk(2).values[1]).item()
    assert top_two_gap(model, prompt + text[:5], OPTIONS) == pytest.approx(expected, abs=1e-12)


def test_the_gap_is_of_the_scores_that_the_token_is_chosen_from() -> None:
    model = tiny_model()
    options = DecodingOptions(max_new_tokens=6, temperature=1.5, top_k=20, repetition_penalty=1.7, seed=[11])
    tokens = decoded(model, PROMPTS[0], options)
    text = PROMPTS[0].input_ids + tokens[:5]
    logits = model.base(torch.tensor([text])).logits[0, -1].detach()
    seen = torch.tensor(sorted(set(text)))
    logits[seen] = torch.where(logits[seen] < 0, logits[seen] * 1.7, logits[seen] / 1.7)
    noise = gumbel_noise(noise_keys(torch.tensor([11]), torch.tensor([[len(text)]]), TOKEN_STREAM), len(logits))[0, 0]
    scores = logits / 1.5 + noise
    scores[logits < logits.topk(20).values[-1]] = -math.inf
    assert scores.argmax() == tokens[5]
    first, second = scores.topk(2).values.tolist()
    # 1e-12: sums in another order.
    assert top_two_gap(model, text, options) == pytest.approx(first - second, abs=1e-12)
    assert top_two_gap(model, text, replace(options, top_k=1)) is None


@pytest.mark.parametrize("wrong", [{"seed": None}, {"verification": "rejection"}])
def test_texts_that_are_independent_draws_are_not_compared(wrong: dict[str, Any]) -> None:
    options = replace(DecodingOptions(temperature=1.0, seed=3, max_new_tokens=6), **wrong)
    with pytest.raises(UsageError, match="coupled verification"):
        find_difference(tiny_model(), PROMPTS[0], options, [1, 2])
