# SPDX-License-Identifier: Apache-2.0
"""Wall-clock speed-up by interleaved rounds: in each round every system decodes the same prompts, one after the other."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from mtp_lightning.decoding.limits import end_tokens, with_text_ends
from mtp_lightning.decoding.options import DecodingOptions
from mtp_lightning.evaluation.acceptance import WARM_UP_TOKENS, spread
from mtp_lightning.evaluation.benchmark import OnProgress, Setting, prompt_seeds
from mtp_lightning.evaluation.decoded_text import decode_batch
from mtp_lightning.evaluation.losslessness import autoregressive
from mtp_lightning.modeling.network import MTPNetwork
from mtp_lightning.modeling.peft_private import lora_layers
from mtp_lightning.text.prompts import Prompt, round_robin

AUTOREGRESSIVE, TRANSFORMERS, LOOKUP = "autoregressive", "transformers generate", "transformers prompt lookup"
BASELINES = (AUTOREGRESSIVE, TRANSFORMERS, LOOKUP)


class TimedBatch(NamedTuple):
    """What one system did in one round."""

    texts: list[list[int]]  # generated tokens of each row
    num_steps: int | None  # steps of all rows; None: not known
    seconds: float  # wall-clock time

    @property
    def num_tokens(self) -> int:
        """Tokens generated in all rows."""
        return sum(map(len, self.texts))


System = Callable[[Sequence[Prompt], int], TimedBatch]
"""Decodes a batch of prompts to at most the given number of tokens each."""


def speed_systems(
    model: MTPNetwork, options: DecodingOptions, num_masks: Sequence[Any], batch_size: int, stop: str | None = None
) -> dict[str, System]:
    """The systems to time by name: autoregressive decoding, transformers' own loops where they write the same text, ours.

    ``num_masks`` may hold ``auto``, which is also timed without prompt lookup. ``max_steps`` is ignored: other systems have
    no such limit.
    """
    options = replace(options, max_steps=None)
    systems: dict[str, System] = {AUTOREGRESSIVE: _our_loop(model, autoregressive(options), stop)}
    if options.temperature == 0 and model.lora.gated and not stop:
        systems[TRANSFORMERS] = _transformers_loop(model, options)
        if batch_size == 1:
            systems[LOOKUP] = _transformers_loop(model, options, prompt_lookup_num_tokens=10)
    for count in num_masks:
        name = Setting(options.decoding, options.sampler_head, count).label
        chosen = replace(options, num_masks=count)
        has_lookup = count == "auto" and options.coupled
        if options.prompt_lookup or not has_lookup:
            systems[name] = _our_loop(model, chosen, stop)
        if has_lookup:
            systems[f"{name} without prompt lookup"] = _our_loop(model, replace(chosen, prompt_lookup=False), stop)
    return systems


def _our_loop(model: MTPNetwork, options: DecodingOptions, stop: str | None) -> System:
    def run(prompts: Sequence[Prompt], limit: int) -> TimedBatch:
        seeded = replace(options, max_new_tokens=limit, seed=prompt_seeds(options, 0, len(prompts)))
        texts, seconds = decode_batch(model, prompts, seeded, stop)
        return TimedBatch([text.tokens for text in texts], sum(len(text.accepted) for text in texts), seconds)

    return run


def _transformers_loop(model: MTPNetwork, options: DecodingOptions, **generate_options: Any) -> System:
    ends = sorted(end_tokens(model, with_text_ends(model, options)))
    padding = ends[0] if ends else 0

    def run(prompts: Sequence[Prompt], limit: int) -> TimedBatch:
        longest = max(len(prompt.input_ids) for prompt in prompts)
        gaps = [longest - len(prompt.input_ids) for prompt in prompts]
        rows = zip(gaps, prompts, strict=True)
        ids = torch.tensor([[padding] * gap + prompt.input_ids for gap, prompt in rows], device=model.base.device)
        mask = (torch.arange(longest) >= torch.tensor(gaps)[:, None]).long().to(ids.device)
        settings = {
            "max_new_tokens": min(limit, model.context - longest),  # where our decoding ends too
            "do_sample": False,
            "eos_token_id": ends or None,
            "pad_token_id": padding,
            **generate_options,
        }
        with without_lora(model):
            begin = time.perf_counter()
            texts = model.base.generate(ids, attention_mask=mask, **settings)[:, longest:].tolist()
            seconds = time.perf_counter() - begin
        lengths = [next((i for i, token in enumerate(text, 1) if token in ends), len(text)) for text in texts]
        return TimedBatch([text[:length] for text, length in zip(texts, lengths, strict=True)], None, seconds)

    return run


@contextlib.contextmanager
def without_lora(model: MTPNetwork) -> Iterator[None]:
    """The base without its LoRA layers, as transformers would have loaded it: even a closed adapter costs time."""
    layers = set(lora_layers(model.base))
    by_name = {name: module for name, module in model.base.named_modules() if module in layers}
    try:
        for name, layer in by_name.items():
            model.base.set_submodule(name, layer.base_layer)
        yield
    finally:
        for name, layer in by_name.items():
            model.base.set_submodule(name, layer)


def batches_by_domain(prompts: Sequence[Prompt], batch_size: int, count: int) -> list[list[Prompt]]:
    """At most ``count`` batches of one domain each, evenly from the domains; a domain's last batch may be smaller."""
    by_domain: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        by_domain.setdefault(prompt.domain, []).append(prompt)
    batches = [rows[i : i + batch_size] for rows in by_domain.values() for i in range(0, len(rows), batch_size)]
    return [batches[i] for i in round_robin([batch[0].domain for batch in batches])[:count]]


def measure_speed(
    systems: dict[str, System],
    batches: Sequence[Sequence[Prompt]],
    max_new_tokens: int,
    on_progress: OnProgress | None = None,
) -> dict[str, Any]:
    """Time all systems on every batch after a warm-up. Each round, one batch, starts with another system.

    Returns plain types for JSON. For each system tokens per second, acceptance length if known, number of texts equal to
    autoregressive decoding, and median and quartiles of the speed-up over each baseline, overall and by domain.
    """
    for system in systems.values():
        system(batches[0], min(WARM_UP_TOKENS, max_new_tokens))
    names = list(systems)
    rounds: list[dict[str, TimedBatch]] = []
    for number, batch in enumerate(batches):
        first = number % len(names)
        rounds.append({name: systems[name](batch, max_new_tokens) for name in names[first:] + names[:first]})
        if on_progress is not None:
            on_progress("speed", number + 1, len(batches))
    domains = [batch[0].domain for batch in batches]
    return {"num_rounds": len(rounds), "contenders": {name: _figures(name, rounds, domains) for name in names}}


def _figures(name: str, rounds: Sequence[dict[str, TimedBatch]], domains: Sequence[str]) -> dict[str, Any]:
    """Figures of one system over all rounds; ``domains`` names the domain of each round."""
    batches = [timed[name] for timed in rounds]
    num_tokens = sum(batch.num_tokens for batch in batches)
    steps = [batch.num_steps for batch in batches if batch.num_steps is not None]
    pairs = [pair for timed in rounds for pair in zip(timed[name].texts, timed[AUTOREGRESSIVE].texts, strict=True)]
    return {
        "equal_texts": [sum(text == reference for text, reference in pairs), len(pairs)],
        "tokens_per_second": num_tokens / sum(batch.seconds for batch in batches),
        "acceptance_length": num_tokens / sum(steps) if steps else None,
        "speed_up": _speed_ups(name, rounds),
        "domains": {
            domain: _speed_ups(name, [timed for timed, other in zip(rounds, domains, strict=True) if other == domain])
            for domain in dict.fromkeys(domains)
            if domain
        },
    }


def _speed_ups(name: str, rounds: Sequence[dict[str, TimedBatch]]) -> dict[str, dict[str, Any] | None]:
    """Spread of the speed-up over each other baseline, paired within rounds."""
    speed_ups = {}
    for baseline in BASELINES:
        if baseline in rounds[0] and baseline != name:
            pairs = [(timed[name], timed[baseline]) for timed in rounds]
            speed_ups[baseline] = spread([a.num_tokens * b.seconds / (a.seconds * b.num_tokens) for a, b in pairs])
    return speed_ups
