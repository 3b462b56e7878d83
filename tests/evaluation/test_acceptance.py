# SPDX-License-Identifier: Apache-2.0
"""Evaluation by real decoding: counts against plain loops, shares of processes, timing, the summary."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
from prompt_results import result

from mtp_lightning.decoding.options import DecodingOptions
from mtp_lightning.evaluation import acceptance
from mtp_lightning.evaluation.acceptance import PromptResult, evaluate_prompts, paired_speed_ups, summarise
from mtp_lightning.evaluation.decoded_text import DecodedText
from mtp_lightning.evaluation.losslessness import Difference
from mtp_lightning.model import MTPModel
from mtp_lightning.text.prompts import Prompt

PROMPTS = [Prompt("", [1 + i, 5], domain) for i, domain in enumerate(("code", "code", "maths", "code", "maths"))]
OPTIONS = DecodingOptions(num_masks=3, max_new_tokens=20)


@pytest.mark.parametrize("decoding_kind", ["quadratic", "linear", "autoregressive"])
def test_results_against_plain_loops(model: MTPModel, decoding_kind: Any) -> None:
    fed: list[int] = []
    progress: list[tuple[int, int]] = []
    handle = model.register_forward_pre_hook(lambda _, inputs: fed.append(inputs[0].num_drafts))
    options = replace(OPTIONS, decoding=decoding_kind)
    results = evaluate_prompts(model, PROMPTS, options, lambda *done: progress.append(done))
    handle.remove()
    assert progress == [(i, 5) for i in (1, 2, 3, 4, 5)]
    assert sum((r.drafted_per_step for r in results), []) == fed
    for r, prompt in zip(results, PROMPTS, strict=True):
        assert (r.domain, r.num_tokens, r.num_steps) == (prompt.domain, 20, len(r.accepted_per_step))
        assert r.num_tokens == sum(r.accepted_per_step) + r.num_steps
        assert (r.lossless, r.difference, r.speed_up) == (None, None, None)
        assert r.seconds > 0 and r.repeated_8grams == 0
    assert [r.prompt_index for r in results] == list(range(5))
    accepted = {count for r in results for count in r.accepted_per_step}
    assert accepted == {0} if decoding_kind == "autoregressive" else accepted >= {0, 1, 2}


def test_processes_share_the_prompts(model: MTPModel) -> None:
    def comparable(results: list[PromptResult]) -> dict[str, Any]:
        return summarise(r._replace(seconds=0.0, speed_up=r.speed_up and 1.0) for r in results)

    def evaluated(rank: int, world_size: int) -> list[PromptResult]:
        return evaluate_prompts(model, PROMPTS, OPTIONS, num_lossless=1, num_speed_pairs=3, rank=rank, world_size=world_size)

    alone = evaluated(0, 1)
    assert [r.lossless for r in alone] == [True, None, True, None, None]  # the first prompt of each domain
    assert [r.prompt_index for r in alone if r.speed_up is not None] == [0, 1, 2]  # evenly from the domains
    parts = [evaluated(rank, 7) for rank in reversed(range(7))]  # two processes have no prompt
    assert comparable(sum(parts, [])) == comparable(alone)
    assert sum(r.speed_up is not None for part in parts for r in part) == 3


def test_speed_pairs_are_interleaved_and_of_equal_length(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def decode_batch(_: Any, prompts: list[Prompt], options: DecodingOptions) -> tuple[list[DecodedText], float]:
        (seconds_a_step,) = prompts[0].input_ids
        calls.append((seconds_a_step, options.decoding, options.max_new_tokens))
        if options.decoding == "autoregressive":
            return [DecodedText([0] * options.max_new_tokens, [], [])], 1.0 * options.max_new_tokens
        return [DecodedText([0] * 6, [], [])], 3.0 * seconds_a_step

    monkeypatch.setattr(acceptance, "decode_batch", decode_batch)
    prompts = [Prompt("", [1], ""), Prompt("", [4], "")]
    ratios = list(paired_speed_ups(None, prompts, DecodingOptions(max_new_tokens=50, max_steps=3)))  # type: ignore[arg-type]
    assert ratios == [2.0, 0.5]
    warm_up = [(1, "quadratic", 16), (1, "autoregressive", 16)]
    pairs = [(number, *pair) for number in (1, 4) for pair in (("quadratic", 50), ("autoregressive", 6))]
    assert calls == warm_up + pairs


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


def test_summary_with_missing_values() -> None:
    summary = summarise([result(0, accepted=(0, 0))])
    assert (summary["domains"], summary["forced"], summary["overall"]["speed_up"]) == ({}, None, None)
    assert list(summarise([result(0, "code"), result(1)])["domains"]) == ["code", "other"]
    assert summarise([result(0)], {"acceptance_length": 1.0, "reference": 1.0})["forced"]["share_of_reference"] is None
    forced = summarise([result(0)], {"acceptance_length": math.nan, "reference": math.nan})["forced"]
    assert set(forced.values()) == {None}
    assert summarise([])["overall"]["acceptance_length"] is None
