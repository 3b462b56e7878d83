# SPDX-License-Identifier: Apache-2.0
"""Evaluation by real decoding, without Lightning: tokens a step, losslessness, speed-up. Processes share the prompts."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from mtp_lightning.decoding.loop import calibrate, decode
from mtp_lightning.decoding.options import DecodingOptions
from mtp_lightning.evaluation.losslessness import Difference, autoregressive, find_difference
from mtp_lightning.metrics.functional import REPETITION_THRESHOLD, repeated_ngrams, share_of_reference, survival_counts
from mtp_lightning.modeling.network import MTPNetwork
from mtp_lightning.text.prompts import Prompt, round_robin

Progress = Callable[[int, int], None]
"""Told how many prompts are done, of how many."""


class PromptResult(NamedTuple):
    """What decoding one prompt gave.

    Attributes:
        prompt_index: number of the prompt in the list.
        domain: its domain.
        num_tokens: tokens generated, G.
        num_steps: steps, T.
        accepted_per_step: draft tokens kept in each step.
        drafted_per_step: draft tokens fed in each step; the first step has none.
        repeated_8grams: share of the text's 8-grams that came before in it.
        lossless: whether autoregressive decoding gives the same text; None: not checked.
        seconds: wall-clock time.
        difference: where not, the first difference.
        speed_up: tokens per second over those of autoregressive decoding; None: not timed.
    """

    prompt_index: int
    domain: str
    num_tokens: int
    num_steps: int
    accepted_per_step: list[int]
    drafted_per_step: list[int]
    repeated_8grams: float
    lossless: bool | None
    seconds: float
    difference: Difference | None = None
    speed_up: float | None = None


class _Decoded(NamedTuple):
    tokens: list[int]
    accepted: list[int]
    drafted: list[int]
    seconds: float


def evaluate_prompts(
    model: MTPNetwork,
    prompts: Sequence[Prompt],
    options: DecodingOptions,
    progress: Progress | None = None,
    num_lossless: int = 0,
    num_speed_pairs: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> list[PromptResult]:
    """Decode this process's share of the prompts.

    Args:
        model: the model.
        prompts: all prompts, the same in every process.
        options: how to decode.
        progress: called after each prompt.
        num_lossless: prompts of each domain whose text is compared with autoregressive decoding.
        num_speed_pairs: prompts, evenly from the domains, that are timed against autoregressive decoding.
        rank: rank of this process.
        world_size: number of processes.

    Returns:
        One result for each prompt of the share.
    """
    domains = [prompt.domain for prompt in prompts]
    checked = {index for index in range(len(prompts)) if domains[:index].count(domains[index]) < num_lossless}
    mine = range(rank, len(prompts), world_size)
    results = {}
    calibrate(model, options)
    for done, index in enumerate(mine, 1):
        results[index] = _evaluate(model, index, prompts[index], options, index in checked)
        if progress is not None:
            progress(done, len(mine))
    pairs = [index for index in round_robin(domains)[:num_speed_pairs] if index in mine]
    for index, ratio in zip(pairs, paired_speed_ups(model, [prompts[i] for i in pairs], options), strict=True):
        results[index] = results[index]._replace(speed_up=ratio)
    return list(results.values())


def _evaluate(model: MTPNetwork, index: int, prompt: Prompt, options: DecodingOptions, check: bool) -> PromptResult:
    decoded = _decode(model, prompt, options)
    lossless = difference = None
    if check:
        difference = find_difference(model, prompt, options, decoded.tokens)
        lossless = difference is None
    return PromptResult(
        prompt_index=index,
        domain=prompt.domain,
        num_tokens=len(decoded.tokens),
        num_steps=len(decoded.accepted),
        accepted_per_step=decoded.accepted,
        drafted_per_step=decoded.drafted,
        repeated_8grams=repeated_ngrams(decoded.tokens),
        lossless=lossless,
        seconds=decoded.seconds,
        difference=difference,
    )


def _decode(model: MTPNetwork, prompt: Prompt, options: DecodingOptions) -> _Decoded:
    begin = time.perf_counter()
    # Each step ends by reading its tokens from the device, so no work is left when the clock is read.
    steps = list(decode(model, torch.tensor(prompt.input_ids), options))
    seconds = time.perf_counter() - begin
    return _Decoded(
        [token for step in steps for token in step.tokens],
        [len(step.tokens) - 1 for step in steps],
        [step.num_drafts for step in steps],
        seconds,
    )


def paired_speed_ups(model: MTPNetwork, prompts: Sequence[Prompt], options: DecodingOptions) -> list[float]:
    """Speed-up on each prompt: decode, decode autoregressively to the same length, and so on, after a short warm-up.

    Args:
        model: the model.
        prompts: the prompts.
        options: how to decode.

    Returns:
        Tokens per second over those of autoregressive decoding, one a prompt.
    """
    ratios = []
    for number, prompt in enumerate(prompts):
        if number == 0:
            warm_up = replace(options, max_new_tokens=min(options.max_new_tokens, 16))
            _decode(model, prompt, warm_up)
            _decode(model, prompt, autoregressive(warm_up))
        fast = _decode(model, prompt, options)
        slow = _decode(model, prompt, autoregressive(options, len(fast.tokens)))
        ratios.append(len(fast.tokens) / fast.seconds / (len(slow.tokens) / slow.seconds))
    return ratios


def summarise(results: Iterable[PromptResult], forced: dict[str, float] | None = None) -> dict[str, Any]:
    """The figures of many prompts, ready for JSON.

    Args:
        results: one a prompt, of all processes, in any order.
        forced: ``acceptance_length`` and ``reference`` of teacher-forced text, or None.

    Returns:
        ``overall``; ``domains``: domain -> the same figures, empty if no prompt names one; ``forced``: also with
        ``share_of_reference``, or None. What there is no number for is None.
    """
    ordered = sorted(results, key=lambda result: result.prompt_index)
    num_masks = max((max(result.drafted_per_step, default=0) for result in ordered), default=0)
    members: dict[str, list[PromptResult]] = {}
    for result in ordered:
        members.setdefault(result.domain or "other", []).append(result)
    named = any(result.domain for result in ordered)
    domains = {name: _figures(group, num_masks) for name, group in members.items()} if named else {}
    if forced is not None:
        forced = {**forced, "share_of_reference": share_of_reference(forced["acceptance_length"], forced["reference"])}
    return {
        "overall": _figures(ordered, num_masks),
        "domains": domains,
        "forced": None if forced is None else {name: _number(value) for name, value in forced.items()},
    }


def _figures(results: Sequence[PromptResult], num_masks: int) -> dict[str, Any]:
    steady = [result for result in results if result.repeated_8grams < REPETITION_THRESHOLD]
    checked = [result for result in results if result.lossless is not None]
    drafted = survival_counts([drafts for result in results for drafts in result.drafted_per_step], num_masks)
    kept = survival_counts([accepted for result in results for accepted in result.accepted_per_step], num_masks)
    return {
        "num_prompts": len(results),
        "num_tokens": sum(result.num_tokens for result in results),
        "num_steps": sum(result.num_steps for result in results),
        "acceptance_length": _acceptance_length(results),
        "repeated_8grams": sum(result.repeated_8grams for result in results) / len(results) if results else None,
        "non_repeating": {"num_prompts": len(steady), "acceptance_length": _acceptance_length(steady)},
        "kept_by_position": [count / max(1, of) for count, of in zip(kept.tolist(), drafted.tolist(), strict=True)],
        "lossless": {
            "equal": sum(result.lossless is True for result in checked),
            "checked": len(checked),
            "differences": [
                {"prompt": result.prompt_index, **result.difference._asdict()}
                for result in checked
                if result.difference is not None
            ],
        },
        "speed_up": spread([result.speed_up for result in results if result.speed_up is not None]),
        "seconds": sum(result.seconds for result in results),
    }


def _acceptance_length(results: Sequence[PromptResult]) -> float | None:
    steps = sum(result.num_steps for result in results)
    return sum(result.num_tokens for result in results) / steps if steps else None


def spread(values: list[float]) -> dict[str, Any] | None:
    """Median and quartiles of paired ratios, or None without any."""
    if not values:
        return None
    low, median, high = torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.25, 0.5, 0.75]).double()).tolist()
    return {"median": median, "quartiles": [low, high], "num_pairs": len(values)}


def _number(value: float) -> float | None:
    return value if value == value else None  # JSON has no NaN
