# SPDX-License-Identifier: Apache-2.0
"""Decode a batch of prompts and keep what evaluation counts: tokens, accepted and verified drafts, time."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple

import torch

from mtp_lightning.decoding.limits import with_text_ends
from mtp_lightning.decoding.loop import decode_rows
from mtp_lightning.decoding.options import DecodingOptions
from mtp_lightning.decoding.planner import calibrate
from mtp_lightning.modeling.network import MTPNetwork
from mtp_lightning.text.detokenizer import StoppableText
from mtp_lightning.text.prompts import Prompt


class DecodedText(NamedTuple):
    """The text of one prompt."""

    tokens: list[int]  # generated tokens
    accepted: list[int]  # accepted draft tokens of each step
    drafted: list[int]  # verified draft tokens of each step; the first step has none


def decode_batch(
    model: MTPNetwork, prompts: Sequence[Prompt], options: DecodingOptions, stop: str | None = None
) -> tuple[list[DecodedText], float]:
    """Decode prompts together: the text of each, up to the token that completes ``stop``, and the batch's seconds."""
    texts = [DecodedText([], [], []) for _ in prompts]
    stopped: set[int] = set()
    options = with_text_ends(model, options)
    found = [StoppableText(model.tokenizer, prompt.input_ids, [stop]) for prompt in prompts] if stop else []
    calibrate(model, options, [len(prompts)])
    begin = time.perf_counter()
    # Each step ends by reading its tokens from the device, so no work is pending when the clock is read.
    for steps in decode_rows(model, [torch.tensor(prompt.input_ids) for prompt in prompts], options, stopped=stopped):
        for row, step, _ in steps:
            text, tokens = texts[row], step.tokens
            if stop and (end := next((i for i, token in enumerate(tokens) if found[row].add(token)), None)) is not None:
                tokens = tokens[: end + 1]
                stopped.add(row)
            text.tokens.extend(tokens)
            text.accepted.append(len(tokens) - 1)
            text.drafted.append(step.num_drafts)
    return texts, time.perf_counter() - begin
