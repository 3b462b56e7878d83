# SPDX-License-Identifier: Apache-2.0
"""What a model allows and decoding options mean for it: its context, its masks, its end tokens."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mtp_lightning.data.chat import end_of_turn
from mtp_lightning.decoding.options import DecodingOptions
from mtp_lightning.errors import MTPError, UsageError
from mtp_lightning.modeling.decoder import text_config
from mtp_lightning.modeling.network import MTPNetwork

EXACT_MASKS = 4
"""Masks in a block where ``exact`` is asked for and no number of masks."""


def check_prompt(length: int, context: int) -> None:
    """Refuse a prompt that is empty or leaves no room in the model's context."""
    if length == 0:
        raise UsageError("the prompt is empty: it needs at least one token.")
    if length >= context:
        raise UsageError(
            f"the prompt has {length} tokens and the model's context is {context}: shorten it to {context - 1} or less."
        )


def check_tokens(prompt: Tensor, vocab_size: int) -> None:
    """Refuse token ids that the base has no embedding for; a tokenizer may have more tokens than the base."""
    smallest, largest = torch.stack(prompt.aminmax()).tolist()
    if smallest < 0 or largest >= vocab_size:
        wrong = smallest if smallest < 0 else largest
        raise UsageError(f"token ids must be from 0 to {vocab_size - 1}, the model's vocabulary, got {wrong}.")


def resolve_num_masks(model: MTPNetwork, options: DecodingOptions) -> int:
    """The largest block that the options allow, J masks; 0 for autoregressive decoding. UsageError: J outside 1..k."""
    if options.decoding == "autoregressive":
        return 0
    if options.num_masks == "auto":
        return min(EXACT_MASKS, model.num_masks) if options.exact else model.num_masks
    if type(options.num_masks) is not int or not 1 <= options.num_masks <= model.num_masks:
        raise UsageError(
            f"num_masks must be auto or from 1 to {model.num_masks}, the number this model was trained with,"
            f" got {options.num_masks}."
        )
    return options.num_masks


def exact_masks(model: MTPNetwork, options: DecodingOptions) -> int:
    """The masks whose positions every step feeds with ``exact``, those of plain decoding too; UsageError: J outside 1..k."""
    return resolve_num_masks(model, replace(options, decoding="quadratic"))


def step_positions(model: MTPNetwork, options: DecodingOptions) -> int:
    """The most positions that a step feeds for a row, the prompt's step apart."""
    return ((exact_masks if options.exact else resolve_num_masks)(model, options) + 1) ** 2


def resolve_auto(model: MTPNetwork, options: DecodingOptions) -> DecodingOptions:
    """The options with k masks for ``auto``, so that steps do not depend on the machine. UsageError: J outside 1..k."""
    masks = resolve_num_masks(model, options)
    return options if options.decoding == "autoregressive" else replace(options, num_masks=masks)


def uses_auto(model: MTPNetwork, options: DecodingOptions) -> bool:
    """True if each step is planned by what pays; not for a sharded model, whose processes must plan alike."""
    if options.exact or options.decoding == "autoregressive":
        return False
    return options.num_masks == "auto" and not model.is_sharded


def uses_prompt_lookup(model: MTPNetwork, options: DecodingOptions) -> bool:
    """True if drafts may be read off the text."""
    return options.prompt_lookup and options.coupled and uses_auto(model, options)


def end_tokens(model: MTPNetwork, options: DecodingOptions) -> set[int]:
    """The tokens that decoding ends at: those of the options, else those that the base's configuration names."""
    chosen = options.eos_token_id
    return base_end_tokens(model.base) if chosen is None else set(token_list(chosen))


def with_text_ends(model: MTPNetwork, options: DecodingOptions) -> DecodingOptions:
    """The options for text: without a choice they end at the tokenizer's end token and the chat template's too."""
    if options.eos_token_id is not None:
        return options
    return replace(options, eos_token_id=sorted(base_end_tokens(model.base, model.tokenizer)))


def base_end_tokens(base: PreTrainedModel, tokenizer: Any = None) -> set[int]:
    """The tokens that end a text of the base: those its configuration names, its tokenizer's, its chat template's."""
    chosen = getattr(getattr(base, "generation_config", None), "eos_token_id", None)
    named = text_config(base).eos_token_id if chosen is None else chosen
    ends: set[Any] = set([named] if isinstance(named, str) else token_list(named))
    if not all(isinstance(token, int) for token in ends):
        raise UsageError(f"eos_token_id in the base's configuration must be a token id or several, got {named!r}.")
    if tokenizer is not None:
        ends |= {token for token in (tokenizer.eos_token_id, end_of_turn_token(tokenizer)) if token is not None}
    return ends


def end_of_turn_token(tokenizer: Any) -> int | None:
    """The token that the chat template writes after an answer; bases often do not name it as an end token.

    None if there is no template, or it writes plain text there or rewrites the answer. A token of line breaks, which some
    tokenizers have, ends no turn.
    """
    try:
        ids = end_of_turn([{"role": "user", "content": "question"}], tokenizer)
    except MTPError:
        return None
    added = set(tokenizer.added_tokens_decoder) | set(tokenizer.all_special_ids)
    return next((token for token in ids if token in added and tokenizer.decode([token]).strip()), None)


def token_list(tokens: Any) -> list[int]:
    """Token ids as transformers names them, one, several (a tensor too) or None, as a list."""
    if tokens is None:
        return []
    tokens = tokens.tolist() if isinstance(tokens, Tensor) else tokens
    return [tokens] if isinstance(tokens, int) else list(tokens)
