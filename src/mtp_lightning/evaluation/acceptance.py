# SPDX-License-Identifier: Apache-2.0
"""Evaluation by real decoding: acceptance length, losslessness, speed-up. Processes share the prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from mtp_lightning.decoding.options import DecodingOptions
from mtp_lightning.evaluation.decoded_text import DecodedText, decode_batch
from mtp_lightning.evaluation.losslessness import Difference, autoregressive, find_difference
from mtp_lightning.metrics.functional import REPETITION_THRESHOLD, repeated_ngrams, share_of_reference, survival_counts
from mtp_lightning.modeling.network import MTPNetwork
from mtp_lightning.text.prompts import Prompt, by_domain, round_robin

WARM_UP_TOKENS = 16

Progress = Callable[[int, int], None]
"""Called with what is done and the number of all: prompts, or batches of them."""


class PromptResult(NamedTuple):
    """What decoding one prompt gave."""

    prompt_index: int  # index of the prompt in the list
    domain: str  # its domain
    num_tokens: int  # generated tokens
    num_steps: float  # steps; a server tells only those of a batch, and this is then the prompt's share
    accepted_per_step: list[int]  # accepted draft tokens of each step
    drafted_per_step: list[int]  # verified draft tokens of each step; the first step has none
    repeated_8grams: float  # share of the text's 8-grams that occurred earlier in it
    lossless: bool | None  # True if autoregressive decoding gives the same text; None: not checked
    seconds: float  # wall-clock time
    difference: Difference | None = None  # the first difference of a text that is not lossless
    speed_up: float | None = None  # tokens per second over those of autoregressive decoding; None: not timed


def prompt_result(
    index: int, domain: str, text: DecodedText, seconds: float, checked: bool, difference: Difference | None
) -> PromptResult:
    """The result of a text that was compared with autoregressive decoding if ``checked``."""
    return PromptResult(
        prompt_index=index,
        domain=domain,
        num_tokens=len(text.tokens),
        num_steps=len(text.accepted),
        accepted_per_step=text.accepted,
        drafted_per_step=text.drafted,
        repeated_8grams=repeated_ngrams(text.tokens),
        lossless=difference is None if checked else None,
        seconds=seconds,
        difference=difference,
    )


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
    """Decode this process's share of the prompts (the same in every process), one at a time; one result for each.

    ``num_lossless`` prompts of each domain are compared with autoregressive decoding. ``num_speed_pairs``, evenly from the
    domains, are timed against it with what users get by default: as many masks as pay. ``progress`` is called after each
    prompt and each timed pair.
    """
    domains = [prompt.domain for prompt in prompts]
    mine = range(rank, len(prompts), world_size)
    results = {}
    for done, index in enumerate(mine, 1):
        (text,), seconds = decode_batch(model, [prompts[index]], options)
        checked = domains[:index].count(domains[index]) < num_lossless
        difference = find_difference(model, prompts[index], options, text.tokens) if checked else None
        results[index] = prompt_result(index, domains[index], text, seconds, checked, difference)
        if progress is not None:
            progress(done, len(mine))
    timed = [index for index in round_robin(domains)[:num_speed_pairs] if index in mine]
    ratios = paired_speed_ups(model, [prompts[i] for i in timed], replace(options, num_masks="auto"))
    for index, ratio in zip(timed, ratios, strict=True):
        results[index] = results[index]._replace(speed_up=ratio)
        if progress is not None:
            progress(len(mine), len(mine))
    return list(results.values())


def paired_speed_ups(model: MTPNetwork, prompts: Sequence[Prompt], options: DecodingOptions) -> Iterator[float]:
    """Tokens per second over those of autoregressive decoding, one ratio for each prompt, measured when it is asked for.

    Each prompt is decoded speculatively and then autoregressively to the same length, so that both runs of a pair see the
    same machine load. A short warm-up comes first.
    """
    for number, prompt in enumerate(prompts):
        if number == 0:
            warm_up = replace(options, max_new_tokens=min(options.max_new_tokens, WARM_UP_TOKENS))
            decode_batch(model, [prompt], warm_up)
            decode_batch(model, [prompt], autoregressive(warm_up))
        (fast,), fast_seconds = decode_batch(model, [prompt], options)
        (slow,), slow_seconds = decode_batch(model, [prompt], autoregressive(options, len(fast.tokens)))
        yield len(fast.tokens) / fast_seconds / (len(slow.tokens) / slow_seconds)


def summarise(results: Iterable[PromptResult], forced: dict[str, float] | None = None) -> dict[str, Any]:
    """The figures of many prompts as plain types for JSON; a figure that has no value is None.

    Returns ``overall``; ``domains``: the same by domain, empty if no prompt names one; ``forced``: the given teacher-forced
    ``acceptance_length`` and ``reference`` and their ``share_of_reference``, or None.
    """
    ordered = sorted(results, key=lambda result: result.prompt_index)
    num_masks = max((max(result.drafted_per_step, default=0) for result in ordered), default=0)
    groups = by_domain([result.domain or "other" for result in ordered]).items()
    has_domains = any(result.domain for result in ordered)
    if forced is not None:
        forced = {**forced, "share_of_reference": share_of_reference(forced["acceptance_length"], forced["reference"])}
    return {
        "overall": _figures(ordered, num_masks),
        "domains": {name: _figures([ordered[i] for i in group], num_masks) for name, group in groups if has_domains},
        # NaN is not valid JSON.
        "forced": forced and {name: None if value != value else value for name, value in forced.items()},
    }


def _figures(results: Sequence[PromptResult], num_masks: int) -> dict[str, Any]:
    non_repeating = [result for result in results if result.repeated_8grams < REPETITION_THRESHOLD]
    checked = [result for result in results if result.lossless is not None]
    drafted = survival_counts([drafts for result in results for drafts in result.drafted_per_step], num_masks)
    kept = survival_counts([accepted for result in results for accepted in result.accepted_per_step], num_masks)
    return {
        "num_prompts": len(results),
        "num_tokens": (num_tokens := sum(result.num_tokens for result in results)),
        "num_steps": sum(result.num_steps for result in results),
        "acceptance_length": _acceptance_length(results),
        "repeated_8grams": sum(result.repeated_8grams for result in results) / len(results) if results else None,
        "non_repeating": {"num_prompts": len(non_repeating), "acceptance_length": _acceptance_length(non_repeating)},
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
        "seconds": (seconds := sum(result.seconds for result in results)),
        "tokens_per_second": num_tokens / seconds if seconds else None,
    }


def _acceptance_length(results: Sequence[PromptResult]) -> float | None:
    steps = sum(result.num_steps for result in results)
    return sum(result.num_tokens for result in results) / steps if steps else None


def largest_gap(figures: dict[str, Any]) -> float | None:
    """The largest gap between the two best tokens where a text of these figures first differs; None: none is known."""
    differences = figures["lossless"].get("differences", ())  # those that earlier versions saved are without
    gaps = [difference["gap"] for difference in differences]
    return max((gap for gap in gaps if gap is not None), default=None)


def spread(ratios: list[float]) -> dict[str, Any] | None:
    """Median and quartiles of paired ratios, or None without any."""
    if not ratios:
        return None
    low, median, high = torch.tensor(ratios, dtype=torch.float64).quantile(torch.tensor([0.25, 0.5, 0.75]).double()).tolist()
    return {"median": median, "quartiles": [low, high], "num_pairs": len(ratios)}
