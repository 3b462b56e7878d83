# SPDX-License-Identifier: Apache-2.0
"""The acceptance grid of ``mtp benchmark`` against plain loops."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from bigram import bigram_text
from prompt_results import result
from tiny import tiny_model
from toy_tokenizers import word_tokenizer

from mtp_lightning.decoding.options import DecodingOptions
from mtp_lightning.evaluation.benchmark import Setting, acceptance_grid, grid_settings, order_violations
from mtp_lightning.evaluation.decoded_text import decode_batch
from mtp_lightning.model import MTPModel
from mtp_lightning.sampler_heads import GRUSamplerHead
from mtp_lightning.text.prompts import Prompt

VOCAB = 96
PROMPTS = [Prompt("", [1 + i, 5 + 7 * i], domain) for i, domain in enumerate(("code", "code", "maths", "code", "maths"))]
OPTIONS = DecodingOptions(max_new_tokens=20)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_the_grid_against_plain_loops(model: MTPModel, batch_size: int) -> None:
    progress: list[tuple[str, int, int]] = []
    settings = grid_settings(model, ["quadratic", "linear"], [True, False], [1, 3])
    assert [tuple(setting) for setting in settings] == [
        (decoding, False, masks) for decoding in ("quadratic", "linear") for masks in (1, 3)
    ]
    grid = acceptance_grid(model, PROMPTS, settings, OPTIONS, batch_size, lambda *done: progress.append(done))
    json.dumps(grid, allow_nan=False)
    assert progress[-1] == ("linear, base head, 3 masks", 5, 5) and progress[0][0] == "autoregressive"
    assert grid["texts"]["overall"]["acceptance_length"] == 1
    assert max(figures["overall"]["acceptance_length"] for figures in grid["settings"]) > 1.5
    for setting, figures in zip(settings, grid["settings"], strict=True):
        assert figures["overall"]["lossless"] == {"equal": 5, "checked": 5, "differences": []}
        assert (figures["decoding"], figures["sampler_head"], figures["num_masks"]) == tuple(setting)
        if batch_size > 1:  # a row near its end may be given more masks than alone, and planted drafts depend on that
            continue
        num_steps: dict[str, list[int]] = {}
        for prompt in PROMPTS:
            ids = torch.tensor([prompt.input_ids])
            out = model.generate(ids, max_new_tokens=20, decoding=setting.decoding, num_masks=setting.num_masks)
            assert out.sequences[0, 2:].tolist() == bigram_text(prompt.input_ids[-1], 20, VOCAB, VOCAB)
            num_steps.setdefault(prompt.domain, []).append(int(out.num_steps))
        for domain, steps in num_steps.items():
            assert figures["domains"][domain]["acceptance_length"] == 20 * len(steps) / sum(steps)


def test_sampling_is_compared_seed_by_seed() -> None:
    model = tiny_model(sampler_head=GRUSamplerHead(8))
    options = DecodingOptions(max_new_tokens=12, temperature=0.9, top_p=0.9, seed=4)
    settings = [Setting("quadratic", True, 2), Setting("linear", False, 3)]
    grid = acceptance_grid(model, PROMPTS, settings, options, batch_size=3)
    assert [figures["overall"]["lossless"]["equal"] for figures in grid["settings"]] == [5, 5]
    rejecting = DecodingOptions(max_new_tokens=6, temperature=0.9, verification="rejection", seed=4)
    grid = acceptance_grid(model, PROMPTS, settings[:1], rejecting)
    assert [figures["overall"]["lossless"]["checked"] for figures in grid["settings"]] == [0]


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
    grid = acceptance_grid(model, prompts, [Setting("quadratic", True, 3)], OPTIONS, 3, stop="two")
    assert grid["settings"][0]["overall"]["lossless"]["equal"] == 4
    assert grid["texts"]["overall"]["num_tokens"] == sum(ends)


def test_order_violations() -> None:
    better, worse, same = (2, 2, 2), (0, 0, 0, 0, 0), (1, 1, 1)
    results = {
        Setting("quadratic", True, 1): [result(0, accepted=same), result(1, accepted=same)],
        Setting("quadratic", True, 2): [result(0, accepted=better), result(1, accepted=worse)],
        Setting("linear", True, 1): [result(0, accepted=same), result(1, accepted=better)],
        Setting("linear", True, 2): [result(0, accepted=better), result(1, accepted=better)],
    }
    assert order_violations(results) == {
        "one mask more is lower: quadratic, sampler head": [0.5],
        "one mask more is lower: linear, sampler head": [0.0],
        "quadratic is below linear: sampler head": [0.5, 0.5],
    }
