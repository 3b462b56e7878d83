# SPDX-License-Identifier: Apache-2.0
"""transformers' ``generate`` with speculative decoding inside: what ``custom_generate`` takes. Its options, its output.

A function: ``base.generate(**inputs, custom_generate=mtp.custom_generate, num_masks=4)``. A saved folder:
``base.generate(**inputs, custom_generate=FOLDER, mtp_model=FOLDER, trust_remote_code=True)``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation import EosTokenCriteria, GenerateDecoderOnlyOutput, MaxLengthCriteria

from mtp_lightning.decoding.limits import token_list
from mtp_lightning.decoding.loop import decode_rows
from mtp_lightning.decoding.noise import row_seeds
from mtp_lightning.decoding.options import DecodingOptions
from mtp_lightning.errors import UsageError
from mtp_lightning.modeling.network import MTPNetwork

FROM_GENERATE = {
    "max_new_tokens",
    "eos_token_id",
    "temperature",
    "top_k",
    "top_p",
    "repetition_penalty",
    "logits_processor",
}
"""Options of decoding that ``generate`` decides with its own arguments; the others are arguments of ``custom_generate``."""
OPTIONS = [field for field in fields(DecodingOptions) if field.name not in FROM_GENERATE]


def generate_function(mtp: MTPNetwork) -> Callable[..., Any]:
    """A function for ``custom_generate`` of transformers' ``generate``, called on the model's base.

    In addition to what ``generate`` prepares it takes the options of ``DecodingOptions`` that ``generate`` does not have,
    and ``mtp_streamer`` (transformers keeps ``streamer`` to itself).
    """

    def custom_generate(
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        generation_config: GenerationConfig | None = None,
        mtp_streamer: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        if model is not mtp.base:
            raise UsageError("custom_generate belongs to another model: call generate on the base of the same MTPModel.")
        config = generation_config if generation_config is not None else model.generation_config
        _refuse(config, model_kwargs)
        mask = model_kwargs.get("attention_mask")
        prompts = [row if mask is None else row[mask[r].bool()] for r, row in enumerate(input_ids)]
        if mtp_streamer is not None and len(prompts) > 1:
            raise UsageError(f"a streamer takes one row, got {len(prompts)}.")
        padding = [input_ids.shape[1] - len(prompt) for prompt in prompts]
        options = DecodingOptions(
            max_new_tokens=int(config.max_length) - input_ids.shape[1],
            eos_token_id=token_list(config.eos_token_id),
            **{field.name: model_kwargs[field.name] for field in OPTIONS if field.name in model_kwargs},
            **choice_options(list(logits_processor or []), bool(config.do_sample), padding),
        )
        batch = _TokenColumns(input_ids, list(stopping_criteria or ()), config, mtp_streamer)
        decode = _one_by_one if any(padding) and options.logits_processor else _together
        for row, tokens, is_last in decode(mtp, input_ids, prompts, options, batch.stopped):
            batch.add(row, tokens, is_last)
            if all(batch.ended):
                break
        sequences = batch.finish()
        return GenerateDecoderOnlyOutput(sequences=sequences) if config.return_dict_in_generate else sequences

    # transformers passes on the arguments that are named in the signature.
    signature = inspect.signature(custom_generate)
    *named, rest = signature.parameters.values()
    options = [inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default) for field in OPTIONS]
    custom_generate.__signature__ = signature.replace(parameters=[*named, *options, rest])  # type: ignore[attr-defined]
    return custom_generate


def _refuse(config: GenerationConfig, model_kwargs: dict[str, Any]) -> None:
    """Refuse what only transformers' own loop does."""
    for name in ("output_scores", "output_logits", "output_attentions", "output_hidden_states"):
        if getattr(config, name, None):
            raise UsageError(f"{name} is not given by speculative decoding. Leave it out, or leave custom_generate out.")
    if (config.num_beams or 1) > 1:
        raise UsageError(f"num_beams must be 1 with speculative decoding, got {config.num_beams}.")
    if (getattr(config, "guidance_scale", None) or 1) != 1:
        raise UsageError(f"guidance_scale must be 1 with speculative decoding, got {config.guidance_scale}.")
    if model_kwargs.get("inputs_embeds") is not None:
        raise UsageError("speculative decoding takes input_ids, got inputs_embeds.")
    for name in ("cache", "past_key_values"):  # as transformers from 5.24 on calls it, and before
        if model_kwargs.get(name) is not None and model_kwargs[name].get_seq_length():
            raise UsageError(f"speculative decoding keeps its own cache, got {name}. Give the whole text as input_ids.")


def choice_options(processors: list[Any], do_sample: bool, padding: Sequence[int] = ()) -> dict[str, Any]:
    """Options of ``DecodingOptions`` that do what a list of transformers' processors does.

    A penalty in front and temperature, top-k and top-p at the end are applied to many positions at once; others remain
    processors. ``padding`` is the number of padding tokens of each row.
    """
    options: dict[str, Any] = {"temperature": 1.0 if do_sample else 0.0}
    rest = list(processors)
    if rest and type(rest[0]) is RepetitionPenaltyLogitsProcessor and _ignores_padding(rest[0], padding):
        options["repetition_penalty"] = float(rest.pop(0).penalty)
    if do_sample:
        for warper, name in (
            (TopPLogitsWarper, "top_p"),
            (TopKLogitsWarper, "top_k"),
            (TemperatureLogitsWarper, "temperature"),
        ):
            if rest and type(rest[-1]) is warper and getattr(rest[-1], "min_tokens_to_keep", 1) == 1:
                options[name] = getattr(rest.pop(), name)
    if any(type(each) in (TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper) for each in rest):
        # Something comes after them, so that the order matters.
        return {"temperature": options["temperature"] and 1.0, "logits_processor": LogitsProcessorList(processors)}
    if rest:
        options["logits_processor"] = LogitsProcessorList(rest)
    return options


def _ignores_padding(penalty: RepetitionPenaltyLogitsProcessor, padding: Sequence[int]) -> bool:
    """True if a penalty reads each row's whole text and nothing else, as ours does."""
    ignored = getattr(penalty, "prompt_ignore_length", None)
    return not any(padding) if ignored is None else isinstance(ignored, Tensor) and ignored.tolist() == list(padding)


class _Padded:
    """A processor that sees a row with its padding [1, p] in front, as transformers' own loop shows it."""

    def __init__(self, processor: Any, padding: Tensor) -> None:
        self.processor, self.padding = processor, padding

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return self.processor(torch.cat([self.padding.to(input_ids.device), input_ids], dim=1), scores)


def _together(
    mtp: MTPNetwork, input_ids: Tensor, prompts: list[Tensor], options: DecodingOptions, stopped: Set[int]
) -> Iterator[tuple[int, list[int], bool]]:
    """Row and tokens of every step, and True with the row's last ones. Rows in ``stopped`` are not decoded further."""
    for steps in decode_rows(mtp, prompts, options, stopped=stopped):
        for row, step, reason in steps:
            yield row, step.tokens, reason is not None


def _one_by_one(
    mtp: MTPNetwork, input_ids: Tensor, prompts: list[Tensor], options: DecodingOptions, stopped: Set[int]
) -> Iterator[tuple[int, list[int], bool]]:
    """The same one row after another, for processors that must see each row's padding."""
    seeds = row_seeds(options.drawing_seed, len(prompts))
    for r, prompt in enumerate(prompts):
        padding = input_ids[r : r + 1, : input_ids.shape[1] - len(prompt)]
        processors = [_Padded(processor, padding) for processor in options.logits_processor]
        alone = replace(options, seed=seeds[r : r + 1], logits_processor=processors)
        for _, tokens, is_last in _together(mtp, input_ids, [prompt], alone, frozenset()):
            yield r, tokens, is_last


class _TokenColumns:
    """What ``generate`` returns, [B, L]: prompts and texts, each ended where transformers' own loop ends it.

    Rows advance by different numbers of tokens. Stopping criteria see them column by column, all rows together, as in that
    loop; so a column waits until every row that has not ended has a token for it. ``stopped`` are the rows that need not be
    decoded further. A streamer, for one row, gets the prompt and then each column.
    """

    def __init__(self, input_ids: Tensor, criteria: list[Any], config: GenerationConfig, streamer: Any) -> None:
        B, self.length = input_ids.shape
        padding = -1 if config.pad_token_id is None else config.pad_token_id  # some configurations say -1 for none
        self.padding = padding if padding >= 0 else next(iter(token_list(config.eos_token_id)), 0)
        # Without end tokens transformers' loop lets a row that a criterion has ended run on until the last one has ended.
        self.pads_ended = any(type(criterion) is EosTokenCriteria for criterion in criteria)
        self.criteria = [each for each in criteria if type(each) not in (MaxLengthCriteria, EosTokenCriteria)]
        self.streamer = streamer
        self.waiting: list[list[int]] = [[] for _ in range(B)]
        self.complete, self.ended = [False] * B, [False] * B
        self.stopped: set[int] = set()
        space = input_ids.new_full((B, int(config.max_length) - self.length), int(self.padding))
        self.sequences = torch.cat([input_ids, space], dim=1)
        if streamer is not None:
            streamer.put(input_ids.cpu())

    def add(self, row: int, tokens: list[int], is_last: bool) -> None:
        """Take tokens of a row; ``is_last``: no more will come."""
        self.waiting[row] += tokens
        self.complete[row] |= is_last
        while not all(self.ended) and any(self.waiting) and all(map(self._has_next, range(len(self.waiting)))):
            self._append_column()

    def _has_next(self, row: int) -> bool:
        return bool(self.waiting[row]) or self.complete[row] or self._is_padded(row)

    def _is_padded(self, row: int) -> bool:
        return self.pads_ended and self.ended[row]

    def _append_column(self) -> None:
        column = [tokens.pop(0) if tokens else None for tokens in self.waiting]
        values = [self.padding if token is None or self._is_padded(r) else token for r, token in enumerate(column)]
        self.sequences[:, self.length] = torch.tensor(values, device=self.sequences.device)
        self.length += 1
        if self.streamer is not None:
            self.streamer.put(self.sequences[0, self.length - 1 : self.length].cpu())
        for criterion in self.criteria:
            stops = torch.as_tensor(criterion(self.sequences[:, : self.length], None)).expand(len(column)).tolist()
            self.ended = [before or now for before, now in zip(self.ended, stops, strict=True)]
        for r, tokens in enumerate(self.waiting):
            self.ended[r] |= self.complete[r] and not tokens
            if self._is_padded(r):
                self.stopped.add(r)

    def finish(self) -> Tensor:
        """The prompts and texts, [B, L]."""
        if self.streamer is not None:
            self.streamer.end()
        return self.sequences[:, : self.length]
