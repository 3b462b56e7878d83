# SPDX-License-Identifier: Apache-2.0
"""Evaluation by real decoding: counts against plain loops, a planted lossy decoder, shares, timing, the summary."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bigram import bigram_base, bigram_text, planted_drafts
from prompt_results import result
from tiny import greedy_text, tiny_model

from mtp_lightning.decoding import loop as decoding
from mtp_lightning.decoding.execution import step as decoding_step
from mtp_lightning.decoding.noise import TOKEN_STREAM, gumbel_noise, noise_keys
from mtp_lightning.decoding.options import DecodingOptions
from mtp_lightning.errors import UsageError
from mtp_lightning.evaluation import acceptance, losslessness
from mtp_lightning.evaluation.acceptance import PromptResult, evaluate_prompts, paired_speed_ups, summarise
from mtp_lightning.evaluation.losslessness import Difference
from mtp_lightning.model import MTPModel
from mtp_lightning.modeling.gated_lora import LoRA
from mtp_lightning.text.prompts import Prompt

VOCAB = 96
PROMPTS = [Prompt("", [1 + i, 5], domain) for i, domain in enumerate(("code", "code", "maths", "code", "maths"))]
OPTIONS = DecodingOptions(num_masks=3, max_new_tokens=20)


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> MTPModel:
    """It counts up, token by token, and its drafts have planted mistakes: of J tokens 0, 1, .. or J are kept."""
    monkeypatch.setattr(decoding_step, "draft_block", planted_drafts(VOCAB, VOCAB))
    return MTPModel(bigram_base(VOCAB, VOCAB), 3, LoRA(rank=2)).eval()


@pytest.mark.parametrize("kind", ["quadratic", "linear", "autoregressive"])
def test_results_against_plain_loops(model: MTPModel, kind: Any) -> None:
    seen: list[int] = []
    told: list[tuple[int, int]] = []
    handle = model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].num_drafts))
    options = replace(OPTIONS, decoding=kind)
    results = evaluate_prompts(model, PROMPTS, options, lambda *done: told.append(done))
    handle.remove()
    assert told == [(i, 5) for i in (1, 2, 3, 4, 5)]
    assert sum((r.drafted_per_step for r in results), []) == seen
    for r, prompt in zip(results, PROMPTS, strict=True):
        assert (r.domain, r.num_tokens, r.num_steps) == (prompt.domain, 20, len(r.accepted_per_step))
        assert r.num_tokens == sum(r.accepted_per_step) + r.num_steps
        assert (r.lossless, r.difference, r.speed_up) == (None, None, None)
        assert r.seconds > 0
    assert [r.prompt_index for r in results] == list(range(5))
    kept = {accepted for r in results for accepted in r.accepted_per_step}
    assert kept == {0} if kind == "autoregressive" else kept >= {0, 1, 2}


@pytest.mark.parametrize("kind", ["quadratic", "linear"])
@pytest.mark.parametrize(
    "n, max_new_tokens, max_steps", [(2, 1, None), (2, 2, None), (2, 7, None), (2, 40, 5), (61, 40, None), (58, 40, None)]
)
def test_drafted_per_step_near_every_limit(
    model: MTPModel, kind: Any, n: int, max_new_tokens: int, max_steps: int | None
) -> None:
    seen: list[int] = []
    model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].num_drafts))
    options = DecodingOptions(kind, max_new_tokens=max_new_tokens, max_steps=max_steps)
    steps = list(decoding.decode(model, torch.arange(1, n + 1), options))
    assert [step.num_drafts for step in steps] == seen


def test_the_first_prompts_of_each_domain_are_checked(model: MTPModel) -> None:
    results = evaluate_prompts(model, PROMPTS, OPTIONS, num_lossless=1)
    assert [r.lossless for r in results] == [True, None, True, None, None]
    assert all(r.lossless for r in evaluate_prompts(model, PROMPTS, OPTIONS, num_lossless=9))


@pytest.mark.parametrize("max_steps", [None, 3])
def test_a_lossy_decoder_is_caught(model: MTPModel, max_steps: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = [greedy_text(model.base, torch.tensor(prompt.input_ids), 20) for prompt in PROMPTS]
    # Every draft is believed.
    monkeypatch.setattr(decoding_step, "num_accepted", lambda draft, *others: torch.full((len(draft),), draft.shape[1]))
    options = replace(OPTIONS, max_steps=max_steps)
    results = evaluate_prompts(model, PROMPTS, options, num_lossless=9)
    assert not all(r.lossless for r in results)
    for r, prompt, text in zip(results, PROMPTS, expected, strict=True):
        got = [t for step in decoding.decode(model, torch.tensor(prompt.input_ids), options) for t in step.tokens]
        assert r.lossless == (got == text[: len(got)])
        if r.difference is not None:
            place = next(i for i in range(len(got)) if got[i] != text[i])
            before = torch.tensor([prompt.input_ids + text[:place]])
            top = model.base(before).logits[0, -1].sort(descending=True).values
            assert r.difference[:3] == (place, text[place], got[place])
            assert r.difference.gap == pytest.approx((top[0] - top[1]).item(), abs=1e-12)  # other order of sums


def test_a_text_that_stops_too_early_is_caught(model: MTPModel, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = acceptance.decode
    monkeypatch.setattr(acceptance, "decode", lambda *arguments: list(whole(*arguments))[:2])
    (r,) = evaluate_prompts(model, PROMPTS[:1], OPTIONS, num_lossless=1)
    assert r.lossless is False and r.difference is not None
    assert (r.difference.position, r.difference.got) == (r.num_tokens, None)


@pytest.mark.parametrize("gated", [True, False])
def test_the_model_that_verifies_is_the_reference(gated: bool) -> None:
    # A standard LoRA changes next tokens: the text is then that of base and LoRA together.
    model = tiny_model(lora=LoRA(rank=4, gated=gated))
    results = evaluate_prompts(model, PROMPTS, OPTIONS, num_lossless=9)
    assert all(r.lossless for r in results)
    text = greedy_text(model.base, torch.tensor(PROMPTS[0].input_ids), 20)
    tokens = [t for step in decoding.decode(model, torch.tensor(PROMPTS[0].input_ids), OPTIONS) for t in step.tokens]
    assert (tokens == text) == gated
    # The gap is of the same logits: the likeliest token there is the next of the text.
    gap = losslessness.top_two_gap(model, PROMPTS[0].input_ids + tokens[:5], OPTIONS)
    with model.gate.open(0 if gated else 7):
        logits = model.base(torch.tensor([PROMPTS[0].input_ids + tokens[:5]])).logits[0, -1]
    assert logits.argmax() == tokens[5]
    assert gap == pytest.approx((logits.max() - logits.topk(2).values[1]).item(), abs=1e-12)


@pytest.mark.parametrize("world", [2, 7])
def test_shares_make_the_whole(model: MTPModel, world: int) -> None:
    def counted(results: list[PromptResult]) -> dict[str, Any]:
        return summarise(r._replace(seconds=0.0, speed_up=r.speed_up and 1.0) for r in results)

    def evaluated(rank: int, world: int) -> list[PromptResult]:
        return evaluate_prompts(model, PROMPTS, OPTIONS, num_lossless=1, num_speed_pairs=3, rank=rank, world_size=world)

    parts = [evaluated(rank, world) for rank in reversed(range(world))]
    assert counted(sum(parts, [])) == counted(evaluated(0, 1))
    assert sum(r.speed_up is not None for part in parts for r in part) == 3


def test_timed_prompts_are_taken_evenly(model: MTPModel) -> None:
    results = evaluate_prompts(model, PROMPTS, OPTIONS, num_speed_pairs=3)
    assert [r.prompt_index for r in results if r.speed_up is not None] == [0, 1, 2]


def test_speed_pairs_are_interleaved_and_of_equal_length(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, calls = [0.0], []

    def decode(_: Any, prompt: torch.Tensor, options: DecodingOptions) -> Any:
        calls.append((prompt[0].item(), options.decoding, options.max_new_tokens))
        if options.decoding == "autoregressive":
            for _ in range(options.max_new_tokens):
                clock[0] += 1.0
                yield decoding.StepTokens([0], 0)
        else:
            for _ in range(3):
                clock[0] += prompt[0].item()  # a step as slow as its prompt says
                yield decoding.StepTokens([0, 0], 1)

    monkeypatch.setattr(acceptance, "decode", decode)
    monkeypatch.setattr(acceptance, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    ratios = paired_speed_ups(
        None, [Prompt("", [1], ""), Prompt("", [4], "")], DecodingOptions(max_new_tokens=50, max_steps=3)
    )  # type: ignore[arg-type]
    assert ratios == [2.0, 0.5]
    warm_up = [(1, "quadratic", 16), (1, "autoregressive", 16)]
    assert calls == [
        *warm_up,
        (1, "quadratic", 50),
        (1, "autoregressive", 6),
        (4, "quadratic", 50),
        (4, "autoregressive", 6),
    ]


def test_summary_by_hand() -> None:
    results = [
        result(2, "maths", (0, 2, 2), repeated_8grams=0.5, lossless=True, speed_up=3.0),
        result(0, "code", (0, 1, 0), repeated_8grams=0.05, lossless=True, speed_up=1.0),
        result(1, "code", (0,), repeated_8grams=0.1, lossless=False, difference=Difference(4, 8, 9, 0.001), speed_up=2.0),
        result(3, "code", (0, 1)),
    ]
    summary = summarise(results, {"acceptance_length": 1.905, "reference": 2.81})
    assert list(summary["domains"]) == ["code", "maths"]
    overall, code = summary["overall"], summary["domains"]["code"]
    assert overall["acceptance_length"] == (7 + 4 + 1 + 3) / (3 + 3 + 1 + 2)
    assert code["acceptance_length"] == (4 + 1 + 3) / (3 + 1 + 2)
    assert overall["repeated_8grams"] == pytest.approx(0.65 / 4)
    # 10 % is not under 10 %.
    assert overall["non_repeating"] == {"num_prompts": 2, "acceptance_length": 7 / 5}
    assert summary["domains"]["maths"]["non_repeating"] == {"num_prompts": 0, "acceptance_length": None}
    assert overall["kept_by_position"] == [4 / 5, 2 / 5]  # five steps had a draft
    assert code["kept_by_position"] == [2 / 3, 0.0]
    assert overall["lossless"] == {
        "equal": 2,
        "checked": 3,
        "differences": [{"prompt": 1, "position": 4, "expected": 8, "got": 9, "gap": 0.001}],
    }
    assert overall["speed_up"] == {"median": 2.0, "quartiles": [1.5, 2.5], "num_pairs": 3}
    assert summary["forced"] == pytest.approx({"acceptance_length": 1.905, "reference": 2.81, "share_of_reference": 0.5})
    json.dumps(summary, allow_nan=False)


def test_a_position_counts_only_where_it_was_drafted() -> None:
    mixed = result(0)._replace(accepted_per_step=[0, 1, 3, 1], drafted_per_step=[0, 1, 3, 2])
    assert summarise([mixed])["overall"]["kept_by_position"] == [3 / 3, 1 / 2, 1 / 1]


def test_summary_where_there_is_little() -> None:
    summary = summarise([result(0, accepted=(0, 0))])
    assert (summary["domains"], summary["forced"], summary["overall"]["speed_up"]) == ({}, None, None)
    assert list(summarise([result(0, "code"), result(1)])["domains"]) == ["code", "other"]
    assert summarise([result(0)], {"acceptance_length": 1.0, "reference": 1.0})["forced"]["share_of_reference"] is None
    forced = summarise([result(0)], {"acceptance_length": math.nan, "reference": math.nan})["forced"]
    assert set(forced.values()) == {None}
    assert summarise([])["overall"]["acceptance_length"] is None


@pytest.mark.parametrize("cycle", [3, 12, VOCAB])
def test_looping_text_counts_as_repeating(cycle: int) -> None:
    model = MTPModel(bigram_base(VOCAB, cycle), 3, LoRA(rank=2)).eval()
    (r,) = evaluate_prompts(model, [Prompt("", [5], "")], replace(OPTIONS, max_new_tokens=40))
    text = bigram_text(5, 40, VOCAB, cycle)
    grams = [text[i : i + 8] for i in range(33)]
    assert r.repeated_8grams == sum(grams[i] in grams[:i] for i in range(33)) / 33
    assert (r.repeated_8grams > 0.6) == (cycle < VOCAB)
    assert summarise([r])["overall"]["non_repeating"]["num_prompts"] == (cycle == VOCAB)


def test_the_gap_is_of_what_the_token_is_chosen_from() -> None:
    model = tiny_model()
    options = DecodingOptions(max_new_tokens=6, temperature=1.5, top_k=20, repetition_penalty=1.7, seed=[11])
    tokens = [t for step in decoding.decode(model, torch.tensor(PROMPTS[0].input_ids), options) for t in step.tokens]
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
    assert losslessness.top_two_gap(model, text, options) == pytest.approx(first - second, abs=1e-12)
    assert losslessness.top_two_gap(model, text, replace(options, top_k=1)) is None


@pytest.mark.parametrize("wrong", [{"seed": None}, {"verification": "rejection"}])
def test_texts_that_are_other_draws_are_not_compared(wrong: dict[str, Any]) -> None:
    options = replace(DecodingOptions(temperature=1.0, seed=3, max_new_tokens=6), **wrong)
    with pytest.raises(UsageError, match="sampled texts can be compared only with a seed and coupled verification"):
        losslessness.find_difference(tiny_model(), PROMPTS[0], options, [1, 2])
