# SPDX-License-Identifier: Apache-2.0
"""transformers' ``generate`` with speculative decoding inside: what ``custom_generate`` takes. Its options, its output.

A function: ``base.generate(**inputs, custom_generate=mtp.custom_generate, num_masks=4)``. A saved folder:
``base.generate(**inputs, custom_generate=FOLDER, mtp_model=FOLDER, trust_remote_code=True)``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import replace
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

from mtp_lightning.decoding.loop import decode_rows
from mtp_lightning.decoding.noise import row_seeds
from mtp_lightning.decoding.options import DecodingOptions
from mtp_lightning.errors import UsageError
from mtp_lightning.modeling.network import MTPNetwork


def generate_function(mtp: MTPNetwork) -> Callable[..., Any]:
    """A function for ``custom_generate`` of transformers' ``generate``.

    Args:
        mtp: the model whose base ``generate`` is called on.

    Returns:
        The function. Beside what ``generate`` prepares it takes ``decoding``, ``num_masks``, ``sampler_head``, ``seed``,
        ``verification``, ``draft_vocabulary``, ``prompt_lookup``, ``compile`` and ``mtp_streamer`` (transformers keeps
        ``streamer`` to itself).
    """

    def custom_generate(
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        generation_config: GenerationConfig | None = None,
        decoding: Any = "quadratic",
        num_masks: Any = "auto",
        sampler_head: bool = True,
        seed: Any = None,
        verification: Any = "coupled",
        draft_vocabulary: Any = "auto",
        prompt_lookup: bool = True,
        compile: bool = False,
        mtp_streamer: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        if model is not mtp.base:
            raise UsageError("custom_generate belongs to another model. Call generate on the base of the same MTPModel.")
        config = generation_config if generation_config is not None else model.generation_config
        _refuse(config, model_kwargs)
        mask = model_kwargs.get("attention_mask")
        prompts = [row if mask is None else row[mask[r].bool()] for r, row in enumerate(input_ids)]
        padding = [input_ids.shape[1] - len(prompt) for prompt in prompts]
        options = DecodingOptions(
            decoding,
            num_masks,
            sampler_head,
            max_new_tokens=int(config.max_length) - input_ids.shape[1],
            eos_token_id=_end_tokens(config),
            seed=seed,
            verification=verification,
            draft_vocabulary=draft_vocabulary,
            prompt_lookup=prompt_lookup,
            compile=compile,
            **choice_options(list(logits_processor or []), bool(config.do_sample), padding),
        )
        if mtp_streamer is not None and len(prompts) > 1:
            raise UsageError(f"a streamer takes one row, got {len(prompts)}. Leave mtp_streamer out or give one prompt.")
        ended: set[int] = set()
        steps = _alone(mtp, input_ids, prompts, options, ended) if any(padding) else _together(mtp, prompts, options, ended)
        sequences = _collect(steps, input_ids, list(stopping_criteria or ()), config, mtp_streamer, ended)
        if config.return_dict_in_generate:
            return GenerateDecoderOnlyOutput(sequences=sequences)
        return sequences

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


def _end_tokens(config: GenerationConfig) -> list[int]:
    chosen = config.eos_token_id
    if chosen is None:
        return []
    return [chosen] if isinstance(chosen, int) else list(chosen)


def choice_options(processors: list[Any], do_sample: bool, padding: Sequence[int] = ()) -> dict[str, Any]:
    """Options of decoding that mean what a list of transformers' processors does.

    A penalty in front and temperature, top-k and top-p at the end are done for many positions at once; what else there is
    stays a processor.

    Args:
        processors: what ``generate`` prepared.
        do_sample: whether tokens are drawn.
        padding: padding tokens of each row.

    Returns:
        Arguments of ``DecodingOptions``.
    """
    options: dict[str, Any] = {"temperature": 1.0 if do_sample else 0.0}
    rest = list(processors)
    if rest and type(rest[0]) is RepetitionPenaltyLogitsProcessor and _ignores_padding(rest[0], padding):
        options["repetition_penalty"] = float(rest.pop(0).penalty)
    if do_sample:
        for kind, name in (
            (TopPLogitsWarper, "top_p"),
            (TopKLogitsWarper, "top_k"),
            (TemperatureLogitsWarper, "temperature"),
        ):
            if rest and type(rest[-1]) is kind and getattr(rest[-1], "min_tokens_to_keep", 1) == 1:
                options[name] = getattr(rest.pop(), name)
    if any(type(each) in (TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper) for each in rest):
        # Something comes after them, so that the order matters.
        return {"temperature": options["temperature"] and 1.0, "logits_processor": LogitsProcessorList(processors)}
    if rest:
        options["logits_processor"] = LogitsProcessorList(rest)
    return options


def _ignores_padding(penalty: RepetitionPenaltyLogitsProcessor, padding: Sequence[int]) -> bool:
    """Whether a penalty reads each row's whole text and nothing else, as ours does."""
    ignored = getattr(penalty, "prompt_ignore_length", None)
    return not any(padding) if ignored is None else isinstance(ignored, Tensor) and ignored.tolist() == list(padding)


class _Padded:
    """A processor that sees a row with its padding in front, as transformers' own loop shows it.

    Args:
        processor: the processor.
        padding: the padding, [1, p].
    """

    def __init__(self, processor: Any, padding: Tensor) -> None:
        self.processor, self.padding = processor, padding

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return self.processor(torch.cat([self.padding.to(input_ids.device), input_ids], dim=1), scores)


def _together(
    mtp: MTPNetwork, prompts: list[Tensor], options: DecodingOptions, ended: Set[int]
) -> Iterator[tuple[int, list[int], bool]]:
    """Row and tokens of every step, and whether the row ends with them. Rows in ``ended`` are not decoded further."""
    for steps in decode_rows(mtp, prompts, options, stopped=ended):
        for row, step, reason in steps:
            yield row, step.tokens, reason is not None


def _alone(
    mtp: MTPNetwork, input_ids: Tensor, prompts: list[Tensor], options: DecodingOptions, ended: Set[int]
) -> Iterator[tuple[int, list[int], bool]]:
    """The same; where processors must see each row's padding, one row after another."""
    if not options.logits_processor:
        yield from _together(mtp, prompts, options, ended)
        return
    seeds = row_seeds(options.seed, len(prompts))
    for r, prompt in enumerate(prompts):
        padding = input_ids[r : r + 1, : input_ids.shape[1] - len(prompt)]
        processors = [_Padded(each, padding) for each in options.logits_processor]
        alone = replace(options, seed=seeds[r : r + 1], logits_processor=processors)
        for _, tokens, last in _together(mtp, [prompt], alone, frozenset()):
            yield r, tokens, last


def _collect(
    steps: Iterator[tuple[int, list[int], bool]],
    input_ids: Tensor,
    criteria: list[Any],
    config: GenerationConfig,
    streamer: Any,
    finished: set[int],
) -> Tensor:
    """What ``generate`` returns, [B, L]: prompts and texts, each ended where transformers' own loop ends it.

    Rows advance by different numbers of tokens. Criteria see them token by token, all rows together, as in that loop.
    """
    B, L = input_ids.shape
    padding = config.pad_token_id if config.pad_token_id is not None else next(iter(_end_tokens(config)), 0)
    # Without end tokens that loop lets a row that a criterion has ended run on until the last one has ended.
    freezes = any(type(each) is EosTokenCriteria for each in criteria)
    own = [each for each in criteria if type(each) not in (MaxLengthCriteria, EosTokenCriteria)]
    waiting: list[list[int]] = [[] for _ in range(B)]
    complete, ended = [False] * B, [False] * B
    text = torch.cat([input_ids, input_ids.new_full((B, int(config.max_length) - L), int(padding))], dim=1)
    end = L
    if streamer is not None:
        streamer.put(input_ids.cpu())
    for row, tokens, last in steps:
        waiting[row] += tokens
        complete[row] |= last
        while not all(ended) and any(waiting) and all(waiting[r] or complete[r] or (freezes and ended[r]) for r in range(B)):
            column = [each.pop(0) if each else None for each in waiting]
            values = [padding if token is None or (freezes and ended[r]) else token for r, token in enumerate(column)]
            text[:, end] = torch.tensor(values, device=text.device)
            end += 1
            if streamer is not None:
                streamer.put(text[0, end - 1 : end].cpu())
            for each in own:
                done = torch.as_tensor(each(text[:, :end], None)).expand(B).tolist()
                ended = [before or now for before, now in zip(ended, done, strict=True)]
            ended = [before or (complete[r] and not waiting[r]) for r, before in enumerate(ended)]
            finished.update(r for r in range(B) if freezes and ended[r])
        if all(ended):
            break
    if streamer is not None:
        streamer.end()
    return text[:, :end]
