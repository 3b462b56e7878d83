# SPDX-License-Identifier: Apache-2.0
"""Transformers' own decoding loops as systems of ``mtp benchmark``."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from mtp_lightning.decoding.limits import end_tokens, with_text_ends
from mtp_lightning.decoding.options import DecodingOptions
from mtp_lightning.evaluation.benchmark import Batch, System
from mtp_lightning.evaluation.decoded_text import DecodedText
from mtp_lightning.modeling.network import MTPNetwork
from mtp_lightning.modeling.peft_private import lora_layers
from mtp_lightning.text.prompts import Prompt

GENERATE, LOOKUP = "transformers generate", "transformers prompt lookup"


def transformers_systems(
    model: MTPNetwork, prompts: Sequence[Prompt], options: DecodingOptions, batch_size: int, stop: str | None
) -> dict[str, System]:
    """Transformers' loops by name, where they write the same text: greedy, without limits that it does not know."""
    if options.temperature or options.max_steps is not None or stop or not model.lora.gated:
        return {}
    systems = {GENERATE: _loop(model, prompts, options)}
    if batch_size == 1:
        systems[LOOKUP] = _loop(model, prompts, options, prompt_lookup_num_tokens=10)
    return systems


def _loop(model: MTPNetwork, prompts: Sequence[Prompt], options: DecodingOptions, **generate_options: Any) -> System:
    ends = sorted(end_tokens(model, with_text_ends(model, options)))
    padding = ends[0] if ends else 0

    def decode(indices: Sequence[int], limit: int) -> Batch:
        rows = [prompts[index].input_ids for index in indices]
        longest = max(map(len, rows))
        gaps = [longest - len(row) for row in rows]
        ids = torch.tensor([[padding] * gap + row for gap, row in zip(gaps, rows, strict=True)], device=model.base.device)
        mask = (torch.arange(longest) >= torch.tensor(gaps)[:, None]).long().to(ids.device)
        settings = {
            "max_new_tokens": min(limit, model.context - longest),  # where our decoding ends too
            "do_sample": False,
            "eos_token_id": ends or None,
            "pad_token_id": padding,
            **generate_options,
        }
        with without_lora(model), _without_generation_config(model.base):
            begin = time.perf_counter()
            texts = model.base.generate(ids, attention_mask=mask, **settings)[:, longest:].tolist()
            seconds = time.perf_counter() - begin
        lengths = [next((i for i, token in enumerate(text, 1) if token in ends), len(text)) for text in texts]
        return Batch([DecodedText(text[:length], [], []) for text, length in zip(texts, lengths, strict=True)], seconds)

    return decode


@contextlib.contextmanager
def _without_generation_config(base: PreTrainedModel) -> Iterator[None]:
    """The base without its generation configuration, which may penalise repetitions or sample."""
    before, base.generation_config = base.generation_config, GenerationConfig()
    try:
        yield
    finally:
        base.generation_config = before


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
