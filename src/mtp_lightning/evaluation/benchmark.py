# SPDX-License-Identifier: Apache-2.0
"""Acceptance length for every number of masks, both decodings and both drafting heads, against one autoregressive text.

The layout of the paper's Table 1 (Samragh et al. 2025, §3.2, where acceptance length is called acceptance rate).
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch

from mtp_lightning.decoding.limits import resolve_auto
from mtp_lightning.decoding.loop import calibrate, decode_rows
from mtp_lightning.decoding.noise import row_seeds
from mtp_lightning.decoding.options import Decoding, DecodingOptions
from mtp_lightning.evaluation.acceptance import PromptResult, summarise
from mtp_lightning.evaluation.losslessness import autoregressive, first_difference
from mtp_lightning.metrics.functional import repeated_ngrams
from mtp_lightning.modeling.network import MTPNetwork
from mtp_lightning.text.prompts import Prompt
from mtp_lightning.text.stream import stop_token_index


class Setting(NamedTuple):
    """One way to decode.

    Attributes:
        decoding: ``quadratic`` or ``linear``.
        sampler_head: whether the sampler head drafts.
        num_masks: masks in a block, or ``auto``.
    """

    decoding: Decoding
    sampler_head: bool
    num_masks: int | Literal["auto"]

    @property
    def family(self) -> str:
        """The setting without its number of masks: a block of rows in the table."""
        return f"{self.decoding}, {'sampler head' if self.sampler_head else 'base head'}"

    @property
    def masks(self) -> str:
        """The number of masks in words."""
        return "auto" if self.num_masks == "auto" else "1 mask" if self.num_masks == 1 else f"{self.num_masks} masks"


class BatchText(NamedTuple):
    """What decoding a batch gave.

    Attributes:
        tokens: the text of each row.
        accepted: draft tokens kept in each step, one list a row.
        drafted: draft tokens verified in each step, one list a row.
        seconds: wall-clock time.
    """

    tokens: list[list[int]]
    accepted: list[list[int]]
    drafted: list[list[int]]
    seconds: float


Told = Callable[[str, int, int], None]
"""Told what is being decoded, how many prompts are done, and of how many."""


def decode_batch(
    model: MTPNetwork, prompts: Sequence[Prompt], options: DecodingOptions, stop: str | None = None
) -> BatchText:
    """Decode a batch of prompts.

    Args:
        model: the model.
        prompts: the prompts.
        options: how to decode.
        stop: a text that ends a row's text; with it come the tokens up to the one that completes it. None: none.

    Returns:
        Texts and counts.
    """
    out = BatchText([[] for _ in prompts], [[] for _ in prompts], [[] for _ in prompts], 0.0)
    finished: set[int] = set()
    calibrate(model, options)
    begin = time.perf_counter()
    # Each step ends by reading its tokens from the device, so no work is left when the clock is read.
    for steps in decode_rows(model, [torch.tensor(prompt.input_ids) for prompt in prompts], options, finished=finished):
        for row, step, _ in steps:
            tokens = step.tokens
            if stop and (end := stop_token_index(model.tokenizer, out.tokens[row], tokens, [stop])) is not None:
                tokens = tokens[: end + 1]
                finished.add(row)
            out.tokens[row].extend(tokens)
            out.accepted[row].append(len(tokens) - 1)
            out.drafted[row].append(step.num_drafts)
    return out._replace(seconds=time.perf_counter() - begin)


def grid_settings(
    model: MTPNetwork, decodings: Iterable[Decoding], heads: Iterable[bool], num_masks: Iterable[int | Literal["auto"]]
) -> list[Setting]:
    """All combinations that the model has; without a sampler head there is one drafting head.

    Args:
        model: the model.
        decodings: kinds of decoding.
        heads: with the sampler head, without it, or both.
        num_masks: numbers of masks.

    Returns:
        The settings, family by family.
    """
    known = [head for head in heads if model.sampler_head is not None or not head] or [False]
    return [Setting(*each) for each in itertools.product(decodings, known, num_masks)]


def acceptance_grid(
    model: MTPNetwork,
    prompts: Sequence[Prompt],
    settings: Sequence[Setting],
    options: DecodingOptions,
    batch_size: int = 1,
    told: Told | None = None,
    stop: str | None = None,
) -> dict[str, Any]:
    """Decode all prompts in every setting and compare each text with autoregressive decoding by the same model.

    Args:
        model: the model.
        prompts: the prompts.
        settings: ways to decode.
        options: limits, and how tokens are chosen.
        batch_size: so many prompts are decoded together.
        told: told of progress.
        stop: a text that ends a text; None: none.

    Returns:
        ``settings``: for each its decoding, head and masks and the figures of ``acceptance.summarise``; ``texts``: figures
        of the autoregressive texts; ``order``: how often what should be ahead is behind. Ready for JSON.
    """
    reference = _texts(model, prompts, autoregressive(options), batch_size, told, "autoregressive", stop)
    expected = [text for batch in reference for text in batch.tokens]
    compared = options.coupled
    grid: list[dict[str, Any]] = []
    results: dict[Setting, list[PromptResult]] = {}
    for setting in settings:
        chosen = replace(options, decoding=setting.decoding, sampler_head=setting.sampler_head, num_masks=setting.num_masks)
        if setting.num_masks != "auto":
            chosen = resolve_auto(model, chosen)
        label = f"{setting.family}, {setting.masks}"
        batches = _texts(model, prompts, chosen, batch_size, told, label, stop)
        results[setting] = _results(model, prompts, batches, expected, options, compared)
        grid.append({**setting._asdict(), **summarise(results[setting])})
    ordinary = _results(model, prompts, reference, expected, options, False)
    return {"settings": grid, "texts": summarise(ordinary), "order": order(results)}


def _texts(
    model: MTPNetwork,
    prompts: Sequence[Prompt],
    options: DecodingOptions,
    batch_size: int,
    told: Told | None,
    label: str,
    stop: str | None,
) -> list[BatchText]:
    batches = []
    for first in range(0, len(prompts), batch_size):
        # A row's seed does not depend on the batch that it is in.
        seeded = replace(options, seed=row_seed(options, first, len(prompts[first : first + batch_size])))
        batches.append(decode_batch(model, prompts[first : first + batch_size], seeded, stop))
        if told is not None:
            told(label, min(first + batch_size, len(prompts)), len(prompts))
    return batches


def row_seed(options: DecodingOptions, first: int, count: int) -> list[int] | None:
    """Seeds of the prompts from ``first`` on, as ``mtp generate`` gives them; None when decoding is greedy."""
    return None if options.temperature == 0 else row_seeds(options.seed or 0, count, first)


def _results(
    model: MTPNetwork,
    prompts: Sequence[Prompt],
    batches: Sequence[BatchText],
    expected: Sequence[list[int]],
    options: DecodingOptions,
    compared: bool,
) -> list[PromptResult]:
    rows = [(*row, batch.seconds / len(batch.tokens)) for batch in batches for row in zip(*batch[:3], strict=True)]
    found = []
    for index, (prompt, (tokens, accepted, drafted, seconds)) in enumerate(zip(prompts, rows, strict=True)):
        difference = None
        if compared:
            # With max_steps a text may stop anywhere.
            length = len(expected[index]) if options.max_steps is None else len(tokens)
            seeded = replace(options, seed=row_seed(options, index, 1))
            difference = first_difference(model, prompt, expected[index][:length], tokens, seeded)
        found.append(
            PromptResult(
                index,
                prompt.domain,
                len(tokens),
                len(accepted),
                accepted,
                drafted,
                repeated_ngrams(tokens),
                difference is None if compared else None,
                seconds,
                difference,
            )
        )
    return found


def order(results: dict[Setting, list[PromptResult]]) -> dict[str, list[float]]:
    """Share of prompts where what should be ahead is behind: one mask more, or quadratic against linear.

    Step by step neither can be behind; over a whole text a longer jump may land where the draft is worse.

    Args:
        results: one list of results a setting.

    Returns:
        For each comparison one share a number of masks.
    """
    shares: dict[str, list[float]] = {}
    for (family, each), (following, more) in itertools.pairwise(results.items()):
        if family[:2] == following[:2]:
            shares.setdefault(f"one mask more is lower: {family.family}", []).append(_behind(each, more))
    for setting, each in results.items():
        if setting.decoding == "quadratic" and (linear := results.get(setting._replace(decoding="linear"))):
            head = "sampler head" if setting.sampler_head else "base head"
            shares.setdefault(f"quadratic is below linear: {head}", []).append(_behind(linear, each))
    return shares


def _behind(worse: Sequence[PromptResult], better: Sequence[PromptResult]) -> float:
    """Share of prompts where ``better`` has the lower acceptance length. Fractions are compared, not rounded quotients."""
    pairs = zip(worse, better, strict=True)
    return sum(b.num_tokens * w.num_steps < w.num_tokens * b.num_steps for w, b in pairs) / len(worse)
