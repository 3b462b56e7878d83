# SPDX-License-Identifier: Apache-2.0
"""Acceptance length for every number of masks, both decodings and both drafting heads, against one autoregressive text.

The layout of the paper's Table 1 (Samragh et al. 2025, §3.2, where acceptance length is called acceptance rate).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

from mtp_lightning.decoding.limits import resolve_auto
from mtp_lightning.decoding.noise import row_seeds
from mtp_lightning.decoding.options import Decoding, DecodingOptions
from mtp_lightning.evaluation.acceptance import PromptResult, prompt_result, summarise
from mtp_lightning.evaluation.decoded_text import DecodedText, decode_batch
from mtp_lightning.evaluation.losslessness import autoregressive, first_difference
from mtp_lightning.modeling.network import MTPNetwork
from mtp_lightning.text.prompts import Prompt

OnProgress = Callable[[str, int, int], None]
"""Called with what is being decoded, the number of prompts that are done and the number of all."""


class Setting(NamedTuple):
    """One way to decode."""

    decoding: Decoding  # ``quadratic`` or ``linear``
    sampler_head: bool  # True to draft with the sampler head, False with the base head
    num_masks: int | Literal["auto"]  # masks in a block, or ``auto``

    @property
    def head(self) -> str:
        """The drafting head in words."""
        return "sampler head" if self.sampler_head else "base head"

    @property
    def family(self) -> str:
        """The setting without its number of masks: one table of the report."""
        return f"{self.decoding}, {self.head}"

    @property
    def label(self) -> str:
        """The setting in words."""
        masks = "auto" if self.num_masks == "auto" else "1 mask" if self.num_masks == 1 else f"{self.num_masks} masks"
        return f"{self.family}, {masks}"


def grid_settings(
    model: MTPNetwork, decodings: Iterable[Decoding], heads: Iterable[bool], num_masks: Iterable[int | Literal["auto"]]
) -> list[Setting]:
    """All combinations, family by family. A model without a sampler head has the base head only."""
    heads = list(heads) if model.sampler_head is not None else [False]
    return [Setting(*setting) for setting in itertools.product(decodings, heads, num_masks)]


def acceptance_grid(
    model: MTPNetwork,
    prompts: Sequence[Prompt],
    settings: Sequence[Setting],
    options: DecodingOptions,
    batch_size: int = 1,
    on_progress: OnProgress | None = None,
    stop: str | None = None,
) -> dict[str, Any]:
    """Decode all prompts in every setting and compare each text with autoregressive decoding by the same model.

    Returns plain types for JSON. ``settings``: each with the figures of ``acceptance.summarise``; ``texts``: the figures of
    the autoregressive texts; ``order``: see ``order_violations``.
    """

    def decode(options: DecodingOptions, label: str) -> list[tuple[DecodedText, float]]:
        """Text of each prompt, and its share of the batch's seconds."""
        texts: list[tuple[DecodedText, float]] = []
        for first in range(0, len(prompts), batch_size):
            batch = prompts[first : first + batch_size]
            # A prompt's seed does not depend on the batch it is in.
            seeded = replace(options, seed=prompt_seeds(options, first, len(batch)))
            decoded, seconds = decode_batch(model, batch, seeded, stop)
            texts += [(text, seconds / len(batch)) for text in decoded]
            if on_progress is not None:
                on_progress(label, len(texts), len(prompts))
        return texts

    def result(index: int, text: DecodedText, seconds: float, compare: bool) -> PromptResult:
        difference = None
        if compare:
            expected = reference[index][0].tokens
            if options.max_steps is not None:  # the text may end anywhere
                expected = expected[: len(text.tokens)]
            seeded = replace(options, seed=prompt_seeds(options, index, 1))
            difference = first_difference(model, prompts[index], expected, text.tokens, seeded)
        return prompt_result(index, prompts[index].domain, text, seconds, compare, difference)

    reference = decode(autoregressive(options), "autoregressive")
    results: dict[Setting, list[PromptResult]] = {}
    for setting in settings:
        chosen = replace(options, **setting._asdict())
        if setting.num_masks != "auto":
            chosen = resolve_auto(model, chosen)
        texts = decode(chosen, setting.label)
        results[setting] = [result(index, *text, options.coupled) for index, text in enumerate(texts)]
    plain = [result(index, *text, False) for index, text in enumerate(reference)]
    return {
        "settings": [{**setting._asdict(), **summarise(group)} for setting, group in results.items()],
        "texts": summarise(plain),
        "order": order_violations(results),
    }


def prompt_seeds(options: DecodingOptions, first: int, count: int) -> list[int] | None:
    """Seeds of ``count`` prompts from ``first`` on, the same as in ``mtp generate``; None: greedy."""
    return None if options.temperature == 0 else row_seeds(options.seed or 0, count, first)


def order_violations(results: dict[Setting, list[PromptResult]]) -> dict[str, list[float]]:
    """Share of prompts whose acceptance length falls with one mask more, or from linear to quadratic, by number of masks.

    From the same state neither can happen in a step; over a whole text a longer jump may land where the draft is worse.
    """
    shares: dict[str, list[float]] = {}
    for (setting, fewer_masks), (following, more_masks) in itertools.pairwise(results.items()):
        if setting.family == following.family:
            name = f"one mask more is lower: {setting.family}"
            shares.setdefault(name, []).append(_share_lower(more_masks, fewer_masks))
    for setting, quadratic in results.items():
        if setting.decoding == "quadratic" and (linear := results.get(setting._replace(decoding="linear"))):
            shares.setdefault(f"quadratic is below linear: {setting.head}", []).append(_share_lower(quadratic, linear))
    return shares


def _share_lower(results: Sequence[PromptResult], others: Sequence[PromptResult]) -> float:
    """Share of prompts where ``results`` have the lower acceptance length, compared as exact fractions."""
    pairs = zip(results, others, strict=True)
    return sum(a.num_tokens * b.num_steps < b.num_tokens * a.num_steps for a, b in pairs) / len(results)
