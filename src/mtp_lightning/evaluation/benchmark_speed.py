# SPDX-License-Identifier: Apache-2.0
"""Wall-clock speed-up by interleaved rounds: in each round every contender decodes the same prompts, one after the other."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from mtp_lightning.decoding.limits import end_tokens
from mtp_lightning.decoding.options import DecodingOptions
from mtp_lightning.evaluation.acceptance import spread
from mtp_lightning.evaluation.benchmark import Setting, Told, decode_batch, row_seed
from mtp_lightning.evaluation.losslessness import autoregressive
from mtp_lightning.modeling.network import MTPNetwork
from mtp_lightning.modeling.peft_private import lora_layers
from mtp_lightning.text.prompts import Prompt, round_robin

AUTOREGRESSIVE, TRANSFORMERS, LOOKUP = "autoregressive", "transformers generate", "transformers prompt lookup"
WARM_UP = 16
"""Tokens that each contender decodes before the first round."""


class Timed(NamedTuple):
    """One contender in one round.

    Attributes:
        texts: tokens generated in each row.
        num_steps: steps of all rows; None: not known.
        seconds: wall-clock time.
    """

    texts: list[list[int]]
    num_steps: int | None
    seconds: float

    @property
    def num_tokens(self) -> int:
        """Tokens generated in all rows."""
        return sum(map(len, self.texts))


Contender = Callable[[Sequence[Prompt], int], Timed]
"""Decodes a batch of prompts to at most so many tokens each."""


def speed_systems(
    model: MTPNetwork, options: DecodingOptions, num_masks: Sequence[Any], batch_size: int, stop: str | None = None
) -> dict[str, Contender]:
    """What takes part: autoregressive decoding, transformers' own loops if they write that text, and speculative decoding.

    Args:
        model: the model.
        options: decoding, head and how tokens are chosen.
        num_masks: numbers of masks, and ``auto``.
        batch_size: rows of a batch; prompt lookup takes one.
        stop: a text that ends a text; None: none.

    Returns:
        Contenders by name; the first ones are what others are compared with.
    """
    options = replace(options, max_steps=None)  # nobody else's text would end there
    found: dict[str, Contender] = {AUTOREGRESSIVE: _ours(model, autoregressive(options), stop)}
    if options.temperature == 0 and model.lora.gated and not stop:
        found[TRANSFORMERS] = _theirs(model, options)
        if batch_size == 1:
            found[LOOKUP] = _theirs(model, options, prompt_lookup_num_tokens=10)
    for count in num_masks:
        setting = Setting(options.decoding, options.sampler_head, count)
        name, chosen = f"{setting.family}, {setting.masks}", replace(options, num_masks=count)
        looks = count == "auto" and options.coupled
        if options.prompt_lookup or not looks:
            found[name] = _ours(model, chosen, stop)
        if looks:  # what the blocks do by themselves
            found[f"{name} without prompt lookup"] = _ours(model, replace(chosen, prompt_lookup=False), stop)
    return found


def _ours(model: MTPNetwork, options: DecodingOptions, stop: str | None) -> Contender:
    def run(prompts: Sequence[Prompt], limit: int) -> Timed:
        seeded = replace(options, max_new_tokens=limit, seed=row_seed(options, 0, len(prompts)))
        out = decode_batch(model, prompts, seeded, stop)
        return Timed(out.tokens, sum(map(len, out.accepted)), out.seconds)

    return run


def _theirs(model: MTPNetwork, options: DecodingOptions, **more: Any) -> Contender:
    stop = sorted(end_tokens(model, options))
    padding = stop[0] if stop else 0

    def run(prompts: Sequence[Prompt], limit: int) -> Timed:
        longest = max(len(prompt.input_ids) for prompt in prompts)
        # As far as the context goes, where our decoding ends.
        limit = min(limit, model.context - longest)
        ids = torch.tensor([[padding] * (longest - len(p.input_ids)) + p.input_ids for p in prompts])
        mask = torch.tensor([[0] * (longest - len(p.input_ids)) + [1] * len(p.input_ids) for p in prompts])
        ids, mask = ids.to(model.base.device), mask.to(model.base.device)
        settings = {
            "max_new_tokens": limit,
            "do_sample": False,
            "eos_token_id": stop or None,
            "pad_token_id": padding,
            **more,
        }
        begin = time.perf_counter()
        texts = model.base.generate(ids, attention_mask=mask, **settings)[:, longest:].tolist()
        seconds = time.perf_counter() - begin
        lengths = [next((i for i, token in enumerate(text, 1) if token in stop), len(text)) for text in texts]
        return Timed([text[:n] for text, n in zip(texts, lengths, strict=True)], None, seconds)

    def without_adapters(prompts: Sequence[Prompt], limit: int) -> Timed:
        with bare(model):
            return run(prompts, limit)

    return without_adapters


@contextlib.contextmanager
def bare(model: MTPNetwork) -> Iterator[None]:
    """The base without its LoRA layers, as transformers would have loaded it: even a closed adapter costs time."""
    layers = {id(layer): layer for layer in lora_layers(model.base)}
    places = [
        (parent, name, child)
        for parent in model.base.modules()
        if id(parent) not in layers
        for name, child in parent.named_children()
        if id(child) in layers
    ]
    try:
        for parent, name, layer in places:
            setattr(parent, name, layer.base_layer)
        yield
    finally:
        for parent, name, layer in places:
            setattr(parent, name, layer)


def batches_by_domain(prompts: Sequence[Prompt], batch_size: int, count: int) -> list[list[Prompt]]:
    """Batches of one domain each, evenly from the domains.

    Args:
        prompts: the prompts.
        batch_size: prompts in a batch; a domain's last batch may have fewer.
        count: at most so many batches.

    Returns:
        The batches.
    """
    members: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        members.setdefault(prompt.domain, []).append(prompt)
    batches = [rows[i : i + batch_size] for rows in members.values() for i in range(0, len(rows), batch_size)]
    return [batches[i] for i in round_robin([batch[0].domain for batch in batches])[:count]]


def measure_speed(
    field: dict[str, Contender], batches: Sequence[Sequence[Prompt]], max_new_tokens: int, told: Told | None = None
) -> dict[str, Any]:
    """Time all contenders on every batch, in rounds, each round beginning with another one.

    Args:
        field: the contenders.
        batches: one round each.
        max_new_tokens: at most so many tokens a prompt.
        told: told of progress.

    Returns:
        For each contender tokens per second, acceptance length where it is known, how many texts are those of autoregressive
        decoding, and for each baseline the median and quartiles of its pairwise speed-ups, overall and by domain. Ready
        for JSON.
    """
    names = list(field)
    if batches:
        for contender in field.values():
            contender(batches[0], min(WARM_UP, max_new_tokens))
    rounds: list[dict[str, Timed]] = []
    for number, batch in enumerate(batches):
        first = number % len(names)
        rounds.append({name: field[name](batch, max_new_tokens) for name in names[first:] + names[:first]})
        if told is not None:
            told("speed", number + 1, len(batches))
    domains = [batch[0].domain for batch in batches]
    return {
        "num_rounds": len(rounds),
        "contenders": {name: _figures(name, rounds, domains, names) for name in names},
    }


def _figures(name: str, rounds: Sequence[dict[str, Timed]], domains: Sequence[str], names: Sequence[str]) -> dict[str, Any]:
    own = [each[name] for each in rounds]
    steps = [each.num_steps for each in own if each.num_steps is not None]
    baselines = [other for other in (AUTOREGRESSIVE, TRANSFORMERS, LOOKUP) if other in names and other != name]
    pairs = [pair for each in rounds for pair in zip(each[name].texts, each[AUTOREGRESSIVE].texts, strict=True)]
    return {
        "equal_texts": [sum(text == reference for text, reference in pairs), len(pairs)],
        "tokens_per_second": sum(each.num_tokens for each in own) / sum(each.seconds for each in own) if own else None,
        "acceptance_length": sum(each.num_tokens for each in own) / sum(steps) if steps else None,
        "speed_up": {other: spread(_ratios(rounds, name, other)) for other in baselines},
        "domains": {
            domain: {
                other: spread(_ratios([r for r, d in zip(rounds, domains, strict=True) if d == domain], name, other))
                for other in baselines
            }
            for domain in dict.fromkeys(domains)
            if domain
        },
    }


def _ratios(rounds: Sequence[dict[str, Timed]], name: str, other: str) -> list[float]:
    """Tokens per second over those of another contender in the same round."""
    pairs = [(each[name], each[other]) for each in rounds]
    return [own.num_tokens * base.seconds / (own.seconds * base.num_tokens) for own, base in pairs]
