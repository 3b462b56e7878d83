# SPDX-License-Identifier: Apache-2.0
"""Does a text equal what the same model writes autoregressively, and where does it first differ?"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import NamedTuple

import torch

from mtp_lightning.decoding.execution.decoding_mode import DecodingMode
from mtp_lightning.decoding.noise import row_seeds
from mtp_lightning.decoding.options import DecodingOptions
from mtp_lightning.decoding.token_choice import Prefixes, TokenChoice
from mtp_lightning.errors import UsageError
from mtp_lightning.evaluation.decoded_text import decode_batch
from mtp_lightning.modeling.network import MTPNetwork
from mtp_lightning.text.prompts import Prompt


class Difference(NamedTuple):
    """Where a text first differs from autoregressive decoding."""

    position: int  # index of the generated token
    expected: int | None  # autoregressive decoding's token there; None: its text had ended
    got: int | None  # the text's token there; None: the text had ended
    # difference of the two largest scores that this token is chosen from (greedy: the base's logits). In low precision a
    # gap near 0 can flip. None: a server, a sharded model, or only one token could be chosen.
    gap: float | None


def autoregressive(options: DecodingOptions, num_tokens: int | None = None) -> DecodingOptions:
    """The same options for autoregressive decoding of at most ``num_tokens`` tokens (default: ``max_new_tokens``)."""
    limit = options.max_new_tokens if num_tokens is None else num_tokens
    return replace(options, decoding="autoregressive", num_masks="auto", max_new_tokens=limit, max_steps=None)


def find_difference(model: MTPNetwork, prompt: Prompt, options: DecodingOptions, tokens: list[int]) -> Difference | None:
    """The first difference of a text from autoregressive decoding of its prompt, or None.

    With ``max_steps`` the text may end anywhere, so only its length is compared. UsageError if with these options two texts
    of the same model may differ.
    """
    if options.temperature and (options.seed is None or options.verification == "rejection"):
        raise UsageError("sampled texts can be compared only with a seed and coupled verification.")
    reference = autoregressive(options, None if options.max_steps is None else len(tokens))
    (expected,), _ = decode_batch(model, [prompt], reference)
    return with_gap(first_difference(expected.tokens, tokens), model, prompt, tokens, options)


def first_difference(expected: list[int], tokens: list[int]) -> Difference | None:
    """Where two texts of a prompt first differ, without the gap; None: they are equal."""
    pairs = enumerate(itertools.zip_longest(expected, tokens))
    return next((Difference(position, *pair, None) for position, pair in pairs if pair[0] != pair[1]), None)


def with_gap(
    difference: Difference | None, model: MTPNetwork, prompt: Prompt, tokens: list[int], options: DecodingOptions
) -> Difference | None:
    """A difference with its gap, unless the model is sharded; ``options`` hold the seed of the prompt."""
    if difference is None or model.is_sharded:
        return difference
    return difference._replace(gap=top_two_gap(model, prompt.input_ids + tokens[: difference.position], options))


@torch.inference_mode()
def top_two_gap(model: MTPNetwork, tokens: list[int], options: DecodingOptions) -> float | None:
    """Difference of the two largest scores that the token after ``tokens`` is chosen from; None: only one is possible."""
    with DecodingMode(model, fused=False).active(), model.gate.over_last(0 if model.lora.gated else len(tokens)):
        ids = torch.tensor([tokens], device=model.base.device)
        hidden = model.base.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
    choice = TokenChoice(options, row_seeds(options.drawing_seed, 1), ids.device)
    scores = choice.target(model.unembed(hidden[:, -1:]), Prefixes(ids, [len(tokens)]))
    noisy = choice.noisy(scores, torch.tensor([[len(tokens)]], device=ids.device))
    first, second = noisy[0, 0].double().topk(2).values.tolist()
    return first - second if second > -math.inf else None
