# SPDX-License-Identifier: Apache-2.0
"""The base model answers prompts: batched, greedy or sampled, by transformers' own ``generate``. No mask, no adapter.

The noise of a sampled answer comes from the row's own seed, and the batches are the same in every run over the same
prompts, so an interrupted run that goes on writes what an uninterrupted one would have written.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from mtp_lightning.errors import RunError, UsageError
from mtp_lightning.modeling.decoder import context_length, text_config
from mtp_lightning.text.prompts import Prompt

SORTED = 32
"""Batches whose prompts are sorted by length together, so that few positions are padding."""


@dataclass(frozen=True)
class AnswerOptions:
    """How answers are drawn.

    Args:
        max_new_tokens: at most so many tokens an answer.
        temperature: 0: greedy; above: sampled at this temperature.
        top_k: sample from the k likeliest tokens only.
        top_p: sample from the likeliest tokens only that together have this probability.
        seed: with a row's id it gives the row's own seed.
    """

    max_new_tokens: int = 1024
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "top_k"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} must be 1 or more, got {value}. Change --{name}.")
        if self.temperature < 0:
            raise UsageError(f"temperature must be 0 (greedy) or above, got {self.temperature}. Change --temperature.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UsageError(f"top_p must be above 0 and at most 1, got {self.top_p}. Change --top_p.")
        if self.temperature == 0 and (self.top_k is not None or self.top_p is not None):
            raise UsageError("top_k and top_p are for sampling, and temperature is 0 (greedy): set --temperature 1.")

    def as_dict(self) -> dict[str, Any]:
        """The same as plain values."""
        return asdict(self)

    def row_seed(self, name: str | int) -> int:
        """The seed of a row, 0 to 2^31 - 1: what every server takes.

        Args:
            name: the row's id.

        Returns:
            A number that depends on the seed and the id alone.
        """
        digest = hashlib.sha256(f"{self.seed} {name!r}".encode()).digest()
        return int.from_bytes(digest[:4], "big") >> 1


class NamedPrompt(NamedTuple):
    """A prompt and the id of its row."""

    name: str | int
    prompt: Prompt


class Answer(NamedTuple):
    """An answer.

    Attributes:
        name: id of the row.
        token_ids: the answer's tokens, its end token included.
        ended: it ends in an end token; else it was cut at the limit.
    """

    name: str | int
    token_ids: list[int]
    ended: bool


class SeededNoise(LogitsProcessor):
    """Gumbel noise from a generator a row: the argmax of the sum is a draw from the row's distribution.

    Args:
        seeds: one a row.
        device: where the logits are.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device) -> None:
        self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Logits with noise, [B, V]."""
        noise = torch.empty(scores.shape, dtype=torch.float32, device=scores.device)
        for row, generator in zip(noise, self.generators, strict=True):
            row.exponential_(generator=generator)
        return scores.float() - noise.clamp_min_(torch.finfo(torch.float32).tiny).log()


def base_batches(prompts: Sequence[NamedPrompt], batch_size: int, context: int, new_tokens: int) -> list[list[NamedPrompt]]:
    """Batches of prompts of similar length, the same in every run.

    A prompt that leaves less than ``new_tokens`` of the context is a batch of its own: it may not shorten others' answers.

    Args:
        prompts: prompts that leave room for one token at least.
        batch_size: most prompts in a batch.
        context: positions of the base.
        new_tokens: most tokens in an answer.

    Returns:
        The batches.
    """
    batches, window = [], SORTED * batch_size
    for first in range(0, len(prompts), window):
        ordered = sorted(prompts[first : first + window], key=lambda item: len(item.prompt.input_ids))
        roomy = [item for item in ordered if len(item.prompt.input_ids) + new_tokens <= context]
        batches += [roomy[begin : begin + batch_size] for begin in range(0, len(roomy), batch_size)]
        batches += [[item] for item in ordered[len(roomy) :]]
    return batches


@torch.inference_mode()
def base_answers(
    base: PreTrainedModel,
    prompts: Sequence[NamedPrompt],
    options: AnswerOptions,
    batch_size: int,
    done: Collection[str | int] = (),
) -> Iterator[list[Answer]]:
    """The base model's answers, batch after batch, without those that are done.

    Args:
        base: the base model.
        prompts: all prompts of this process, in the same order in every run; each leaves room for one token at least.
        options: how answers are drawn.
        batch_size: prompts that are answered together.
        done: ids of the rows that have an answer.

    Yields:
        The answers of a batch.

    Raises:
        RunError: the memory is not enough for a batch.
    """
    context, ends = context_length(text_config(base)), end_ids(base)
    pad = next((token for token in (text_config(base).pad_token_id, *ends) if token is not None), 0)
    base.generation_config = GenerationConfig()  # the base's own may hold a temperature or a penalty
    for batch in base_batches(prompts, batch_size, context, options.max_new_tokens):
        if all(item.name in done for item in batch):
            continue
        longest = max(len(item.prompt.input_ids) for item in batch)
        ids = torch.full((len(batch), longest), pad)
        mask = torch.zeros_like(ids)
        for row, item in enumerate(batch):  # on the left: all answers begin at the same place
            ids[row, longest - len(item.prompt.input_ids) :] = torch.tensor(item.prompt.input_ids)
            mask[row, longest - len(item.prompt.input_ids) :] = 1
        config = GenerationConfig(
            do_sample=False,
            max_new_tokens=min(options.max_new_tokens, context - longest),
            eos_token_id=sorted(ends) or None,
            pad_token_id=pad,
        )
        try:
            out = base.generate(
                ids.to(base.device),
                attention_mask=mask.to(base.device),
                generation_config=config,
                logits_processor=_processors(options, [item.name for item in batch], base.device),
            )
        except torch.OutOfMemoryError as error:
            raise RunError(
                f"the device's memory is not enough for a batch of {len(batch)} prompts: lower --batch_size"
                f" ({batch_size}) or --max_new_tokens ({options.max_new_tokens}), and run the command again to go on."
            ) from error
        answers = []
        for item, tokens in zip(batch, out[:, longest:].tolist(), strict=True):
            end = next((place for place, token in enumerate(tokens) if token in ends), None)
            kept = tokens if end is None else tokens[: end + 1]
            if item.name not in done:
                answers.append(Answer(item.name, kept, end is not None))
        yield answers


def _processors(options: AnswerOptions, names: list[str | int], device: torch.device) -> LogitsProcessorList:
    if options.temperature == 0:
        return LogitsProcessorList()
    chain: list[Any] = [TemperatureLogitsWarper(float(options.temperature))]
    chain += [TopKLogitsWarper(options.top_k)] if options.top_k is not None else []
    chain += [TopPLogitsWarper(options.top_p)] if options.top_p is not None else []
    return LogitsProcessorList([*chain, SeededNoise([options.row_seed(name) for name in names], device)])


def end_ids(base: PreTrainedModel) -> set[int]:
    """The tokens that end an answer.

    Args:
        base: the base model.

    Returns:
        Token ids; none where the base names none.
    """
    chosen = getattr(base.generation_config, "eos_token_id", None)
    chosen = text_config(base).eos_token_id if chosen is None else chosen
    if chosen is None:
        return set()
    return {chosen} if isinstance(chosen, int) else set(chosen)
