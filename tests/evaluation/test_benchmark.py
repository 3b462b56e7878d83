# SPDX-License-Identifier: Apache-2.0
"""``mtp benchmark``: systems against plain loops, interleaved rounds against a fake clock, the expected order."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from prompt_results import result
from tiny import greedy_text, tiny_model
from toy_tokenizers import word_tokenizer

from mtp_lightning.decoding.options import DecodingOptions
from mtp_lightning.evaluation.acceptance import summarise
from mtp_lightning.evaluation.benchmark import (
    PLAIN,
    Batch,
    Setting,
    batches_by_domain,
    decoding_system,
    difference_finder,
    measure,
    order_violations,
    settings_grid,
)
from mtp_lightning.evaluation.decoded_text import DecodedText, decode_batch
from mtp_lightning.evaluation.losslessness import autoregressive
from mtp_lightning.evaluation.transformers_systems import GENERATE, LOOKUP, transformers_systems, without_lora
from mtp_lightning.model import MTPModel
from mtp_lightning.modeling.peft_private import lora_layers
from mtp_lightning.sampler_heads import GRUSamplerHead
from mtp_lightning.text.prompts import Prompt

DOMAINS = ["code", "code", "maths", "code", "maths"]
PROMPTS = [Prompt("", [1 + i, 5 + 7 * i], domain) for i, domain in enumerate(DOMAINS)]
OPTIONS = DecodingOptions(max_new_tokens=20)


def test_rounds_are_interleaved_and_ratios_paired() -> None:
    calls: list[tuple[str, list[int], int]] = []
    progress: list[tuple[int, int]] = []
    seconds = {PLAIN: [1.0, 2.0, 4.0], "other": [0.5, 4.0, 2.0], "server": [0.4, 1.0, 1.0]}

    def system(name: str) -> Any:
        times = iter([9.0, *seconds[name]])  # the warm-up first

        def decode(indices: Sequence[int], limit: int) -> Batch:
            calls.append((name, list(indices), limit))
            # A server tells the steps of a batch alone.
            steps = ([], []) if name == "server" else ([0, limit - 2], [0, limit])
            text = DecodedText([1] * (limit if name != "other" else limit + 1), *steps)
            return Batch([text] * len(indices), next(times), 10 * len(indices) if name == "server" else None)

        return decode

    systems = {name: system(name) for name in seconds}
    results = measure(systems, DOMAINS, 2, 20, lambda i, a, b: None, lambda *done: progress.append(done))
    names, batches = list(seconds), [[0, 1], [2, 4], [3]]
    assert [name for name, _, _ in calls] == [*names, *names, *names[1:], names[0], names[2], *names[:2]]
    assert [(rows, limit) for _, rows, limit in calls] == [([0, 1], 16)] * 3 + [(b, 20) for b in batches for _ in names]
    assert progress == [(done, 9) for done in range(1, 10)]
    plain, other, server = (summarise(results[name]) for name in names)
    assert plain["overall"]["speed_up"] is None and plain["overall"]["lossless"]["checked"] == 0
    ratios = [21 / 20 * slow / fast for slow, fast in zip(seconds[PLAIN], seconds["other"], strict=True)]
    low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
    assert other["overall"]["speed_up"]["median"] == pytest.approx(median, rel=1e-12)
    assert other["overall"]["speed_up"]["quartiles"] == pytest.approx([low, high], rel=1e-12)
    assert other["overall"]["speed_up"]["num_pairs"] == 3 and other["domains"]["maths"]["speed_up"]["num_pairs"] == 1
    assert other["overall"]["tokens_per_second"] == pytest.approx(5 * 21 / 6.5)
    assert other["overall"]["lossless"]["checked"] == 5
    assert server["overall"]["acceptance_length"] == server["domains"]["maths"]["acceptance_length"] == 2.0


def test_batches_are_of_one_domain_and_taken_evenly() -> None:
    assert batches_by_domain(DOMAINS, 2) == [[0, 1], [2, 4], [3]]
    assert batches_by_domain(DOMAINS, 1) == [[0], [2], [1], [4], [3]]


@pytest.mark.parametrize("batch_size", [1, 2])
def test_systems_write_the_same_text(batch_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(sampler_head=GRUSamplerHead(8), eos_token_id=[3, 52])
    prompts = [Prompt("", [9, 10, 11], ""), Prompt("", [5, 6, 7, 8, 9], "")][:batch_size]
    expected = [greedy_text(model.base, torch.tensor(prompt.input_ids), 20) for prompt in prompts]
    assert 1 < len(expected[0]) < 20  # an end token ends it
    monkeypatch.setattr(model.base.generation_config, "suppress_tokens", [expected[0][0]])  # which is for generate alone
    settings = settings_grid(model, ["quadratic", "linear"], [True, False], [1, 3, "auto"])
    assert len(set(settings)) == 12
    systems = {s.label: decoding_system(model, prompts, replace(OPTIONS, **s._asdict())) for s in settings}
    theirs = transformers_systems(model, prompts, OPTIONS, batch_size, None)
    assert list(theirs) == [GENERATE, *([LOOKUP] if batch_size == 1 else [])]
    systems |= {PLAIN: decoding_system(model, prompts, autoregressive(OPTIONS)), **theirs}
    for system in systems.values():
        batch = system(range(batch_size), 20)
        assert [text.tokens for text in batch.texts] == expected and batch.seconds > 0
    results = measure(systems, [""] * batch_size, batch_size, 20, difference_finder(model, prompts, OPTIONS))
    for name, group in results.items():
        assert [r.lossless for r in group] == [None if name == PLAIN else True] * batch_size
        assert (summarise(group)["overall"]["acceptance_length"] is None) == (name in theirs)


@pytest.mark.parametrize("options", [{"temperature": 1.0}, {"max_steps": 3}])
def test_transformers_takes_part_where_it_writes_the_same_text(options: dict[str, Any]) -> None:
    assert not transformers_systems(tiny_model(), PROMPTS, replace(OPTIONS, **options), 1, None)
    assert not transformers_systems(tiny_model(), PROMPTS, OPTIONS, 1, "two")


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
    transformers_systems(model, PROMPTS, OPTIONS, 1, None)[GENERATE]([0], 4)
    assert counts == [0]


def test_a_lossy_text_and_a_text_that_max_steps_ends(model: MTPModel) -> None:
    find = difference_finder(model, PROMPTS, OPTIONS)
    assert find is not None
    (text,), _ = decode_batch(model, [PROMPTS[0]], OPTIONS)
    assert find(0, text.tokens, text.tokens[:4]).position == 4
    short = difference_finder(model, PROMPTS, replace(OPTIONS, max_steps=2))
    assert short is not None and short(0, text.tokens, text.tokens[:4]) is None
    rejecting = replace(OPTIONS, temperature=0.9, verification="rejection", seed=4)
    assert difference_finder(model, PROMPTS, rejecting) is None


def test_sampling_is_compared_seed_by_seed() -> None:
    model = tiny_model(sampler_head=GRUSamplerHead(8))
    options = DecodingOptions(max_new_tokens=12, temperature=0.9, top_p=0.9, seed=4)
    ways = {PLAIN: autoregressive(options), "ours": replace(options, num_masks=2)}
    systems = {name: decoding_system(model, PROMPTS, way) for name, way in ways.items()}
    results = measure(systems, DOMAINS, 2, 12, difference_finder(model, PROMPTS, options))
    assert [r.lossless for r in results["ours"]] == [True] * 5
    alone = systems["ours"]([3], 12).texts[0].tokens
    assert alone == systems["ours"]([1, 3], 12).texts[1].tokens  # whatever it is decoded with


def test_a_stop_string_ends_every_text_at_the_same_token() -> None:
    model = tiny_model(sampler_head=GRUSamplerHead(8), vocab_size=17, seed=3)
    model.tokenizer = word_tokenizer()
    prompts = [Prompt("", [9 + i, 10], "") for i in range(4)]
    ends = []
    for prompt in prompts:
        (text,), _ = decode_batch(model, [prompt], OPTIONS)
        length = len(text.tokens)
        words = [model.tokenizer.decode(text.tokens[: i + 1], skip_special_tokens=True).split() for i in range(length)]
        ends.append(next((i + 1 for i in range(length) if "two" in words[i]), length))
    assert min(ends) < 20 and len(set(ends)) > 1
    for decoding, num_masks in (("quadratic", 3), ("linear", 1)):
        texts, _ = decode_batch(model, prompts, replace(OPTIONS, decoding=decoding, num_masks=num_masks), "two")
        assert [len(text.tokens) for text in texts] == ends
        assert [sum(text.accepted) + len(text.accepted) for text in texts] == ends


def test_order_violations() -> None:
    better, worse, same = (2, 2, 2), (0, 0, 0, 0, 0), (1, 1, 1)
    results = {
        Setting("quadratic", True, 1): [result(0, accepted=same), result(1, accepted=same)],
        Setting("quadratic", True, 2): [result(0, accepted=better), result(1, accepted=worse)],
        Setting("linear", True, 1): [result(0, accepted=same), result(1, accepted=better)],
        Setting("linear", True, 2): [result(0, accepted=better), result(1, accepted=better)],
    }
    assert order_violations(results) == {
        "more masks are lower: quadratic, sampler head": [0.5],
        "more masks are lower: linear, sampler head": [0.0],
        "quadratic is below linear: sampler head": [0.5, 0.5],
    }
