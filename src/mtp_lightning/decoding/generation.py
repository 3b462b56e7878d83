# SPDX-License-Identifier: Apache-2.0
"""``generate``: decodes the rows of a batch to the end, as transformers users know it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mtp_lightning.decoding.limits import end_tokens
from mtp_lightning.decoding.loop import decode_rows
from mtp_lightning.decoding.noise import row_seeds
from mtp_lightning.decoding.options import DecodingOptions
from mtp_lightning.errors import UsageError
from mtp_lightning.modeling.network import MTPNetwork


@dataclass
class Generation:
    """What ``generate`` returns.

    Attributes:
        sequences: prompt and generated tokens, right-padded, [B, L] int64.
        num_steps: forward passes of the base that each row took part in, [B] int64.
        acceptance_length: tokens generated over steps for each row, [B] float64.
        accepted_per_step: draft tokens accepted in each step, one list a row. A row generated their sum plus its steps.
        finish_reasons: ``stop`` at an end token, else ``length``, one per row.
        seeds: each row's seed, with which it can be generated again alone; None if decoding was greedy.
        texts: the generated text of each row, where the prompts were text or messages; else None.
    """

    sequences: Tensor
    num_steps: Tensor
    acceptance_length: Tensor
    accepted_per_step: list[list[int]]
    finish_reasons: list[str]
    seeds: list[int] | None = None
    texts: list[str] | None = None


def generate(
    model: MTPNetwork, input_ids: Tensor, attention_mask: Tensor | None = None, streamer: Any = None, **options: Any
) -> Generation:
    """Generate for the rows of a batch together. Each row gets the text that it would get alone.

    Args:
        model: the model.
        input_ids: prompts, padded on either side, [B, L] int64.
        attention_mask: 1 at prompt tokens, 0 at padding, [B, L]; None: no padding.
        streamer: transformers' streamer, given the prompt and then the tokens of each step; for one row. None: none.
        **options: see ``DecodingOptions``.

    Returns:
        Sequences, steps and acceptance lengths.

    Raises:
        UsageError: a wrong option or a prompt that does not fit.
    """
    settings = DecodingOptions.from_kwargs(options)
    check_input_ids(input_ids, attention_mask)
    stop, B = end_tokens(model, settings), input_ids.shape[0]
    seeds = row_seeds(settings.drawing_seed, B)
    settings = replace(settings, seed=seeds)
    prompts = [
        input_ids[r] if attention_mask is None else input_ids[r][attention_mask[r].bool().to(input_ids.device)]
        for r in range(B)
    ]
    if streamer is not None:
        if B != 1:
            raise UsageError(f"a streamer takes one row, got {B}.")
        streamer.put(prompts[0].cpu())
    new: list[list[int]] = [[] for _ in prompts]
    accepted: list[list[int]] = [[] for _ in prompts]
    reasons = [""] * B
    for steps in decode_rows(model, prompts, settings):
        for row, step, reason in steps:
            new[row] += step.tokens
            accepted[row].append(len(step.tokens) - 1)
            reasons[row] = reason or ""
            if streamer is not None:
                streamer.put(torch.tensor(step.tokens))
    if streamer is not None:
        streamer.end()
    rows = [torch.cat([prompt.cpu(), torch.tensor(tokens)]) for prompt, tokens in zip(prompts, new, strict=True)]
    num_steps = torch.tensor([len(row) for row in accepted])
    totals = torch.tensor([len(tokens) for tokens in new])
    padding = next(iter(stop), 0)
    return Generation(
        torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=padding).to(input_ids.device),
        num_steps,
        totals.double() / num_steps,
        accepted,
        reasons,
        None if settings.temperature == 0 else seeds,
    )


def check_input_ids(input_ids: Tensor, attention_mask: Tensor | None) -> None:
    """Refuse prompts that are not rows of token ids, and an attention mask of another shape."""
    if not isinstance(input_ids, Tensor) or input_ids.is_floating_point() or input_ids.ndim != 2 or not len(input_ids):
        got = f"{input_ids.dtype} {list(input_ids.shape)}" if isinstance(input_ids, Tensor) else type(input_ids).__name__
        raise UsageError(
            f"input_ids must be a tensor of token ids [rows, tokens], got {got}."
            " A single prompt is one row: input_ids[None]."
        )
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        raise UsageError(
            f"attention_mask must have the shape of input_ids, {list(input_ids.shape)}, got {list(attention_mask.shape)}."
        )
