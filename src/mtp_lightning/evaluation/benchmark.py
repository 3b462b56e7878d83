# SPDX-License-Identifier: Apache-2.0
"""Plain decoding and other ways to decode, on the same prompts in interleaved rounds: acceptance, losslessness, speed-up."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Literal, NamedTuple

from mtp_lightning.decoding.noise import row_seeds
from mtp_lightning.decoding.options import Decoding, DecodingOptions
from mtp_lightning.evaluation.acceptance import WARM_UP_TOKENS, Progress, PromptResult, prompt_result
from mtp_lightning.evaluation.decoded_text import DecodedText, decode_batch
from mtp_lightning.evaluation.losslessness import Difference, first_difference, with_gap
from mtp_lightning.modeling.network import MTPNetwork
from mtp_lightning.text.prompts import Prompt, by_domain, round_robin

PLAIN = "plain"
"""The system that all others are compared with: autoregressive decoding."""


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
    def masks(self) -> str:
        """The number of masks in words."""
        return "auto" if self.num_masks == "auto" else "1 mask" if self.num_masks == 1 else f"{self.num_masks} masks"

    @property
    def label(self) -> str:
        """The setting in words."""
        return f"{self.family}, {self.masks}"


def settings_grid(
    model: MTPNetwork, decodings: Iterable[Decoding], heads: Iterable[bool], num_masks: Iterable[int | Literal["auto"]]
) -> list[Setting]:
    """All combinations, family by family. A model without a sampler head has the base head only."""
    heads = list(heads) if model.sampler_head is not None else [False]
    return [Setting(*setting) for setting in itertools.product(decodings, heads, num_masks)]


class Batch(NamedTuple):
    """What a system made of one batch of prompts."""

    texts: list[DecodedText]  # the text of each prompt; without steps if they are not known
    seconds: float  # wall-clock time
    num_steps: int | None = None  # steps of all texts, where nothing else is known of them


System = Callable[[Sequence[int], int], Batch]
"""Decodes the prompts with these indices to at most the given number of tokens each."""

FindDifference = Callable[[int, list[int], list[int]], Difference | None]
"""The first difference of a prompt's text from the expected one: ``(index, expected, tokens)``."""


def decoding_system(
    model: MTPNetwork, prompts: Sequence[Prompt], options: DecodingOptions, stop: str | None = None
) -> System:
    """Our own decoding with these options."""

    def decode(indices: Sequence[int], limit: int) -> Batch:
        chosen = replace(options, max_new_tokens=limit, seed=prompt_seeds(options, indices))
        return Batch(*decode_batch(model, [prompts[i] for i in indices], chosen, stop))

    return decode


def prompt_seeds(options: DecodingOptions, indices: Iterable[int]) -> list[int] | None:
    """The seed of each prompt, the same as in ``mtp generate`` and in every batch; None: greedy."""
    return None if options.temperature == 0 else [row_seeds(options.seed or 0, 1, index)[0] for index in indices]


def difference_finder(model: MTPNetwork, prompts: Sequence[Prompt], options: DecodingOptions) -> FindDifference | None:
    """Compares texts of the model, with the gap between the two best tokens there; None: texts may differ anyway."""
    if not options.coupled:
        return None

    def find(index: int, expected: list[int], tokens: list[int]) -> Difference | None:
        if options.max_steps is not None:  # the text may end anywhere
            expected = expected[: len(tokens)]
        seeded = replace(options, seed=prompt_seeds(options, [index]))
        return with_gap(first_difference(expected, tokens), model, prompts[index], tokens, seeded)

    return find


def batches_by_domain(domains: Sequence[str], batch_size: int) -> list[list[int]]:
    """Indices of prompts in batches of one domain each, evenly from the domains; a domain's last one may be smaller.

    ``[code, code, maths, code], 2 -> [[0, 1], [2], [3]]``
    """
    members = by_domain(domains).values()
    batches = [rows[i : i + batch_size] for rows in members for i in range(0, len(rows), batch_size)]
    return [batches[i] for i in round_robin([domains[batch[0]] for batch in batches])]


def measure(
    systems: dict[str, System],
    domains: Sequence[str],
    batch_size: int,
    max_new_tokens: int,
    find: FindDifference | None = None,
    on_progress: Progress | None = None,
) -> dict[str, list[PromptResult]]:
    """Decode every prompt with every system, after a warm-up. Each round, one batch, starts with another system.

    ``PLAIN``, if it is among the systems, is what the others are compared with; ``domains`` are those of the prompts.
    Returns each system's results in the order of the rounds. The first prompt of a batch has the batch's ``speed_up``.
    """
    batches, names = batches_by_domain(domains, batch_size), list(systems)
    for system in systems.values():
        system(batches[0], min(WARM_UP_TOKENS, max_new_tokens))
    results: dict[str, list[PromptResult]] = {name: [] for name in names}
    for number, indices in enumerate(batches):
        first, decoded = number % len(names), dict[str, Batch]()
        for done, name in enumerate(names[first:] + names[:first], 1):
            decoded[name] = systems[name](indices, max_new_tokens)
            if on_progress is not None:
                on_progress(number * len(names) + done, len(batches) * len(names))
        for name in names:
            results[name] += _results(decoded[name], None if name == PLAIN else decoded.get(PLAIN), indices, domains, find)
    return results


def _results(
    batch: Batch, plain: Batch | None, indices: Sequence[int], domains: Sequence[str], find: FindDifference | None
) -> list[PromptResult]:
    """The results of a batch's prompts, compared with plain decoding of the same prompts if that is given."""
    checked, results = plain is not None and find is not None, []
    for row, (index, text) in enumerate(zip(indices, batch.texts, strict=True)):
        difference = find(index, plain.texts[row].tokens, text.tokens) if plain is not None and find is not None else None
        seconds = batch.seconds / len(indices)  # its share
        results.append(prompt_result(index, domains[index], text, seconds, checked, difference))
    if plain is not None:
        results[0] = results[0]._replace(speed_up=_rate(batch) / _rate(plain))
    if batch.num_steps is not None:  # each prompt's share, by its tokens
        steps_per_token = batch.num_steps / sum(len(text.tokens) for text in batch.texts)
        results = [result._replace(num_steps=result.num_tokens * steps_per_token) for result in results]
    return results


def _rate(batch: Batch) -> float:
    """Tokens per second."""
    return sum(len(text.tokens) for text in batch.texts) / batch.seconds


def order_violations(results: dict[Setting, list[PromptResult]]) -> dict[str, list[float]]:
    """Share of prompts whose acceptance length falls with one mask more, or from linear to quadratic, by number of masks.

    From the same state neither can happen in a step; over a whole text a longer jump may land where the draft is worse.
    """
    fixed = {setting: group for setting, group in results.items() if setting.num_masks != "auto"}
    shares: dict[str, list[float]] = {}
    for (setting, fewer_masks), (following, more_masks) in itertools.pairwise(fixed.items()):
        if setting.family == following.family:
            name = f"more masks are lower: {setting.family}"
            shares.setdefault(name, []).append(_share_lower(more_masks, fewer_masks))
    for setting, quadratic in fixed.items():
        if setting.decoding == "quadratic" and (linear := fixed.get(setting._replace(decoding="linear"))):
            shares.setdefault(f"quadratic is below linear: {setting.head}", []).append(_share_lower(quadratic, linear))
    return shares


def _share_lower(results: Sequence[PromptResult], others: Sequence[PromptResult]) -> float:
    """Share of prompts where ``results`` have the lower acceptance length, compared as exact fractions."""
    pairs = zip(results, others, strict=True)
    return sum(a.num_tokens * b.num_steps < b.num_tokens * a.num_steps for a, b in pairs) / len(results)
