# SPDX-License-Identifier: Apache-2.0
"""Timing of ``mtp benchmark``: interleaved rounds against a fake clock, and systems that write the same text."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny import greedy_text, tiny_model

from mtp_lightning.decoding.options import DecodingOptions
from mtp_lightning.evaluation.benchmark_speed import (
    AUTOREGRESSIVE,
    LOOKUP,
    TRANSFORMERS,
    TimedBatch,
    batches_by_domain,
    measure_speed,
    speed_systems,
    without_lora,
)
from mtp_lightning.modeling.peft_private import lora_layers
from mtp_lightning.sampler_heads import GRUSamplerHead
from mtp_lightning.text.prompts import Prompt

PROMPTS = [Prompt("", [1 + i, 5 + 7 * i], domain) for i, domain in enumerate(("code", "code", "maths", "code", "maths"))]
OPTIONS = DecodingOptions(max_new_tokens=20)


def test_rounds_are_interleaved_and_ratios_paired() -> None:
    calls: list[tuple[str, int]] = []
    seconds = {
        AUTOREGRESSIVE: [1.0, 2.0, 4.0, 3.0],
        TRANSFORMERS: [0.5, 4.0, 2.0, 3.0],
        "quadratic, base head, 2 masks": [0.4, 1.0, 1.0, 6.0],
    }

    def system(name: str) -> Any:
        times = iter([9.0, *seconds[name]])  # the warm-up first

        def decode(prompts: Sequence[Prompt], limit: int) -> TimedBatch:
            calls.append((name, limit))
            return TimedBatch([[1] * limit for _ in prompts], 5 if "masks" in name else limit, next(times))

        return decode

    speed = measure_speed({name: system(name) for name in seconds}, batches_by_domain(PROMPTS, 1, 4), 20)
    json.dumps(speed, allow_nan=False)
    names = list(seconds)
    assert [name for name, _ in calls] == [*names, *names, *names[1:], names[0], names[2], *names[:2], *names]
    assert [limit for _, limit in calls] == [16] * 3 + [20] * 12
    fast = speed["contenders"][names[2]]
    for baseline in (AUTOREGRESSIVE, TRANSFORMERS):
        ratios = [slow / own for slow, own in zip(seconds[baseline], seconds[names[2]], strict=True)]
        low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
        assert fast["speed_up"][baseline]["num_pairs"] == 4
        # 1e-12: torch's quantile interpolates, which rounds.
        assert fast["speed_up"][baseline]["median"] == pytest.approx(median, rel=1e-12)
        assert fast["speed_up"][baseline]["quartiles"] == pytest.approx([low, high], rel=1e-12)
    assert fast["domains"]["maths"][AUTOREGRESSIVE]["median"] == pytest.approx((2 + 0.5) / 2)
    assert fast["tokens_per_second"] == 80 / 8.4 and fast["acceptance_length"] == 4.0
    assert fast["equal_texts"] == [4, 4]


def test_batches_are_of_one_domain_and_taken_evenly() -> None:
    batches = batches_by_domain(PROMPTS, 2, 9)
    assert [[p.domain for p in batch] for batch in batches] == [["code"] * 2, ["maths"] * 2, ["code"]]
    assert [batch[0].domain for batch in batches_by_domain(PROMPTS, 1, 4)] == ["code", "maths", "code", "maths"]
    assert batches_by_domain(PROMPTS, 2, 0) == []


@pytest.mark.parametrize("batch_size", [1, 2])
def test_systems_write_the_same_text(batch_size: int) -> None:
    model = tiny_model(sampler_head=GRUSamplerHead(8), eos_token_id=[3, 52])
    prompts = [Prompt("", [9, 10, 11], ""), Prompt("", [5, 6, 7, 8, 9], "")][:batch_size]
    # max_steps would end our texts early.
    systems = speed_systems(model, replace(OPTIONS, max_steps=2), [1, 3, "auto"], batch_size)
    ours = [f"quadratic, sampler head, {masks}" for masks in ("1 mask", "3 masks", "auto", "auto without prompt lookup")]
    assert list(systems) == [AUTOREGRESSIVE, TRANSFORMERS, *([LOOKUP] if batch_size == 1 else []), *ours]
    expected = [greedy_text(model.base, torch.tensor(prompt.input_ids), 20) for prompt in prompts]
    assert 1 < len(expected[0]) < 20  # an end token ends it
    for system in systems.values():
        timed = system(prompts, 20)
        assert timed.texts == expected and timed.seconds > 0
        assert timed.num_tokens == sum(map(len, expected))


@pytest.mark.parametrize(
    ("options", "num_masks", "stop", "expected"),
    [
        ({"prompt_lookup": False}, [3, "auto"], None, ["3 masks", "auto without prompt lookup"]),
        ({"temperature": 1.0}, [2], None, ["2 masks"]),
        ({}, [3], "two", ["3 masks"]),
    ],
)
def test_systems_that_take_part(
    options: dict[str, Any], num_masks: list[Any], stop: str | None, expected: list[str]
) -> None:
    model = tiny_model(sampler_head=GRUSamplerHead(8))
    systems = list(speed_systems(model, replace(OPTIONS, **options), num_masks, 1, stop))
    assert systems[-len(expected) :] == [f"quadratic, sampler head, {masks}" for masks in expected]
    assert (TRANSFORMERS in systems) == (stop is None and "temperature" not in options)


def test_transformers_is_timed_without_lora_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    names, layers = list(model.state_dict()), lora_layers(model.base)
    assert layers
    with pytest.raises(KeyError), without_lora(model):
        assert not lora_layers(model.base)
        raise KeyError
    assert lora_layers(model.base) == layers and list(model.state_dict()) == names
    counts: list[int] = []
    generate = model.base.generate
    monkeypatch.setattr(
        model.base, "generate", lambda *a, **b: counts.append(len(lora_layers(model.base))) or generate(*a, **b)
    )
    speed_systems(model, OPTIONS, [], 1)[TRANSFORMERS]([PROMPTS[0]], 4)
    assert counts == [0]
