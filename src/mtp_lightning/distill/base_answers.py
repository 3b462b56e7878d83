# SPDX-License-Identifier: Apache-2.0
"""The base model answers prompts: batched, greedy or sampled, by transformers' own ``generate``. No mask, no adapter.

The random numbers of a sampled answer come from the row's own seed, and the batches are the same in every run over the same
prompts, so an interrupted and resumed run writes what an uninterrupted one would have written.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from mtp_lightning.decoding.execution.packed_base import PackedBase
from mtp_lightning.decoding.limits import base_end_tokens
from mtp_lightning.decoding.noise import TOKEN_STREAM, noise_keys, uniform_noise
from mtp_lightning.distill.options import AnswerOptions
from mtp_lightning.errors import RunError
from mtp_lightning.modeling.decoder import context_length, text_config
from mtp_lightning.text.prompts import Prompt

BATCHES_SORTED_TOGETHER = 32
"""Prompts are sorted by length within this many batches, so that few positions are padding."""


class NamedPrompt(NamedTuple):
    """A prompt and the id of its row."""

    row_id: str | int
    prompt: Prompt

    @property
    def length(self) -> int:
        """Tokens of the prompt."""
        return len(self.prompt.input_ids)


class Answer(NamedTuple):
    """An answer to the prompt of a row."""

    row_id: str | int  # id of the row
    token_ids: list[int]  # the answer's tokens, its end token included
    ended: bool  # True if it ends in an end token, False if it was cut at the limit


class SeededDraw(LogitsProcessor):
    """Draws a token from each row's distribution, by one random number that depends on the row's seed and the step alone.

    Where cumulated probabilities pass it, the token lies (Devroye 1986, section III.2): one number a row, not one a token.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device) -> None:
        self.seeds, self.step = torch.tensor(seeds, device=device), 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores [B, V] that are 0 for the token drawn from the logits, and minus infinity elsewhere."""
        cumulated = scores.float().softmax(-1).cumsum(-1, dtype=torch.float64)
        steps = torch.full((len(self.seeds), 1), self.step, device=scores.device)
        number = uniform_noise(noise_keys(self.seeds, steps, TOKEN_STREAM)) * cumulated[:, -1:]
        self.step += 1
        tokens = torch.searchsorted(cumulated, number, right=True).clamp_max_(scores.shape[-1] - 1)
        return torch.full_like(scores, -math.inf).scatter_(-1, tokens, 0.0)


class TokenCount(LogitsProcessor):
    """Leaves the scores as they are, and says at each step how many tokens the answers of a batch have."""

    def __init__(self, prompt_length: int, report: Callable[[int], None]) -> None:
        self.prompt_length, self.report = prompt_length, report

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """The scores [B, V]."""
        self.report(input_ids.shape[1] - self.prompt_length)
        return scores


def base_batches(prompts: Sequence[NamedPrompt], batch_size: int, context: int, new_tokens: int) -> list[list[NamedPrompt]]:
    """Batches of prompts of similar length, the same in every run; each prompt leaves room for at least one token.

    A prompt that leaves less than ``new_tokens`` of the context is a batch by itself: it may not shorten others' answers.
    """
    batches, window = [], BATCHES_SORTED_TOGETHER * batch_size
    for first in range(0, len(prompts), window):
        ordered = sorted(prompts[first : first + window], key=lambda prompt: prompt.length)
        short = [prompt for prompt in ordered if prompt.length + new_tokens <= context]
        batches += [short[start : start + batch_size] for start in range(0, len(short), batch_size)]
        batches += [[prompt] for prompt in ordered[len(short) :]]
    return batches


@torch.inference_mode()
def base_answers(
    base: PreTrainedModel,
    tokenizer: Any,
    prompts: Sequence[NamedPrompt],
    options: AnswerOptions,
    batch_size: int,
    done: Collection[str | int] = (),
    on_step: Callable[[int, int, int], None] = lambda answers, limit, tokens: None,
) -> Iterator[list[Answer]]:
    """The base model's answers, batch by batch, without those of the row ids in ``done``.

    ``prompts`` are all of this process, in the same order in every run; each leaves room for at least one token.
    ``on_step`` is called at each step of a batch with the number of its answers, the limit of their tokens, and their
    tokens so far.
    RunError if a batch does not fit in memory.
    """
    context, ends = context_length(text_config(base)), base_end_tokens(base, tokenizer)
    # Some configurations say -1 where there is no padding token.
    pad = next((token for token in (text_config(base).pad_token_id, *ends) if token is not None and token >= 0), 0)
    packed = PackedBase(base)
    base.generation_config = GenerationConfig()  # the base's own may hold a temperature or a penalty
    for batch in base_batches(prompts, batch_size, context, options.max_new_tokens):
        if not (num_answers := sum(prompt.row_id not in done for prompt in batch)):
            continue
        longest = max(prompt.length for prompt in batch)
        ids = torch.full((len(batch), longest), pad)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(batch):  # padding on the left: all answers begin at the same position
            ids[row, longest - prompt.length :] = torch.tensor(prompt.prompt.input_ids)
            mask[row, longest - prompt.length :] = 1
        limit = min(options.max_new_tokens, context - longest)
        count = TokenCount(longest, partial(on_step, num_answers, limit))
        config = GenerationConfig(
            do_sample=False,
            max_new_tokens=limit,
            eos_token_id=sorted(ends) or None,
            pad_token_id=pad,
        )
        try:
            with packed.active():
                out = base.generate(
                    ids.to(base.device),
                    attention_mask=mask.to(base.device),
                    generation_config=config,
                    logits_processor=_processors(options, [prompt.row_id for prompt in batch], base.device, count),
                )
        except torch.OutOfMemoryError as error:
            remedy = f"lower --batch_size ({batch_size}) and run the command again to resume"
            raise RunError(f"a batch of {len(batch)} prompts does not fit in memory: {remedy}.") from error
        texts = zip(batch, out[:, longest:].tolist(), strict=True)
        yield [_answer(prompt.row_id, tokens, ends) for prompt, tokens in texts if prompt.row_id not in done]


def _answer(row_id: str | int, tokens: list[int], ends: set[int]) -> Answer:
    """An answer up to its first end token."""
    end = next((index for index, token in enumerate(tokens) if token in ends), None)
    return Answer(row_id, tokens if end is None else tokens[: end + 1], end is not None)


def _processors(
    options: AnswerOptions, row_ids: list[str | int], device: torch.device, count: TokenCount
) -> LogitsProcessorList:
    if options.temperature == 0:
        return LogitsProcessorList([count])
    chain: list[Any] = [count, TemperatureLogitsWarper(float(options.temperature))]
    chain += [TopKLogitsWarper(options.top_k)] if options.top_k is not None else []
    chain += [TopPLogitsWarper(options.top_p)] if options.top_p is not None else []
    return LogitsProcessorList([*chain, SeededDraw([options.row_seed(row_id) for row_id in row_ids], device)])
