# SPDX-License-Identifier: Apache-2.0
"""Self-speculative decoding: draft, verify, accept. Lossless: the text is the base model's own, token for token.

Source: Samragh et al. 2025, §2.4. Quadratic decoding places a block after the verified token too, so that every step has a
full draft; the paper leaves it out of its count.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache

from mtp_lightning.attention import text_config
from mtp_lightning.decoding_step import StepInput, StepOutput
from mtp_lightning.errors import UsageError
from mtp_lightning.step_masks import StepMasks, StepShape

if TYPE_CHECKING:
    from mtp_lightning.model import MTPModel

Decoding = Literal["quadratic", "linear", "autoregressive"]


@dataclass
class DecodingOptions:
    """How to decode.

    Args:
        decoding: ``quadratic`` (a block after the verified token and after every draft token), ``linear`` (one block after
            the draft) or ``autoregressive`` (no masks).
        num_masks: masks in a block, m_1..m_J with J at most the trained k; ``auto`` means k.
        sampler_head: draft with the sampler head; False: from the base head at the MTP positions.
        max_new_tokens: at most so many tokens are generated.
        max_steps: at most so many steps (forward passes of the base), the prompt's included; None: no limit.
        eos_token_id: token or tokens that end the text; None: the base's own.
        temperature: 0, greedy. Sampling is not built yet, so anything else is refused.
        top_k: sampling's; no effect on greedy decoding.
        top_p: sampling's.
        seed: sampling's; an int, or one a row.
        verification: sampling's: ``coupled`` or ``rejection``.
    """

    decoding: Decoding = "quadratic"
    num_masks: int | Literal["auto"] = "auto"
    sampler_head: bool = True
    max_new_tokens: int = 256
    max_steps: int | None = None
    eos_token_id: int | Sequence[int] | None = None
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int | Sequence[int] | None = None
    verification: Literal["coupled", "rejection"] = "coupled"


class StepTokens(NamedTuple):
    """What a step gained.

    Attributes:
        tokens: the tokens, at least one: the kept draft tokens and the base model's own; cut after an end token.
        num_drafts: draft tokens that were verified.
    """

    tokens: list[int]
    num_drafts: int


@torch.inference_mode()
def decode(model: MTPModel, prompt: Tensor, options: DecodingOptions) -> Iterator[StepTokens]:
    """Decode one prompt and yield the tokens of each step as they are verified.

    Args:
        model: the model.
        prompt: token ids, [n] int64, n at least 1.
        options: how to decode.

    Yields:
        What each step gained, together at most ``max_new_tokens``.

    Raises:
        UsageError: an empty prompt, one that does not fit the context, or a wrong option.
    """
    n, context = len(prompt), model.context
    J = trained_masks(model, options)
    if n == 0:
        raise UsageError("the prompt is empty: it needs at least one token.")
    if n >= context:
        raise UsageError(
            f"the prompt has {n} tokens and the model's context is {context}: shorten it to {context - 1} or less."
        )
    if options.max_new_tokens < 1:
        raise UsageError(f"max_new_tokens must be 1 or more, got {options.max_new_tokens}.")
    if options.max_steps is not None and options.max_steps < 1:
        raise UsageError(f"max_steps must be 1 or more, got {options.max_steps}.")
    stop = end_tokens(model, options)
    limit = min(n + options.max_new_tokens, context)
    step_masks = StepMasks(model.base, limit)
    # Without the configuration no layer drops keys behind its window: the mask does the windowing, and a crop is exact.
    cache = DynamicCache()
    tokens, drafts, length, steps = prompt.to(model.base.device), 0, n, 0
    with evaluating(model):
        while True:
            # Masks past the last token that may still be generated would be for nothing.
            masks = max(0, min(J, limit - length - 2, context - length - drafts))
            blocks = drafts + 1 if options.decoding == "quadratic" else 1
            shape = StepShape(len(tokens), blocks if masks else 0, masks)
            positions, mask = step_masks.get(shape, cache.get_seq_length())
            out: StepOutput = model(StepInput(tokens, drafts, shape, positions, mask, cache, options.sampler_head))
            # The one place in a step that waits for the device.
            kept, *own = torch.cat([out.num_accepted[None], out.own]).tolist()
            rejected = shape.num_mtp + drafts - kept
            if rejected:
                cache.crop(-rejected)
            gained = own[: kept + 1]
            for index, token in enumerate(gained):
                if token in stop:
                    gained = gained[: index + 1]
                    break
            length += len(gained)
            steps += 1
            yield StepTokens(gained, drafts)
            if gained[-1] in stop or length >= limit or steps == options.max_steps:
                return
            whole = kept == drafts or options.decoding == "quadratic"
            draft = out.draft[: limit - length - 1] if whole else out.draft[:0]
            tokens, drafts = torch.cat([out.own[kept : kept + 1], draft]), len(draft)


def trained_masks(model: MTPModel, options: DecodingOptions) -> int:
    """The number of masks J in a block that the options mean.

    Args:
        model: the model.
        options: how to decode.

    Returns:
        J, 0 for autoregressive decoding.

    Raises:
        UsageError: an unknown decoding, or J outside 1..k.
    """
    if options.decoding not in ("quadratic", "linear", "autoregressive"):
        raise UsageError(f"decoding must be quadratic, linear or autoregressive, got {options.decoding!r}.")
    if options.temperature != 0:
        raise UsageError(f"temperature must be 0 (greedy): sampling is not built yet, got {options.temperature}.")
    if options.decoding == "autoregressive":
        return 0
    if options.num_masks == "auto":
        return model.num_masks
    if not isinstance(options.num_masks, int) or not 1 <= options.num_masks <= model.num_masks:
        raise UsageError(
            f"num_masks must be auto or from 1 to {model.num_masks}, the number this model was trained with,"
            f" got {options.num_masks}."
        )
    return options.num_masks


def end_tokens(model: MTPModel, options: DecodingOptions) -> set[int]:
    """The tokens that end a text."""
    chosen: Any = options.eos_token_id
    if chosen is None:
        generation = getattr(model.base, "generation_config", None)
        chosen = getattr(generation, "eos_token_id", None)
        if chosen is None:
            chosen = text_config(model.base).eos_token_id
    if chosen is None:
        return set()
    return {chosen} if isinstance(chosen, int) else set(chosen)


@contextlib.contextmanager
def evaluating(model: MTPModel) -> Iterator[None]:
    """Evaluation mode and a cache-friendly attention kernel; every module's own mode is put back afterwards."""
    training = [module for module in model.modules() if module.training]
    kernel = model.base.config._attn_implementation
    model.eval()
    if kernel == "flex_attention":  # a step's few queries gain nothing from it, and every cache length would be a compile
        capped = getattr(text_config(model.base), "attn_logit_softcapping", None) is not None
        model.base.set_attn_implementation("eager" if capped else "sdpa")
    try:
        yield
    finally:
        for module in training:
            module.training = True
        if kernel == "flex_attention":
            model.base.set_attn_implementation(kernel)


@dataclass
class Generation:
    """What ``generate`` gives.

    Attributes:
        sequences: prompt and generated tokens, right-padded, [B, L] int64.
        num_steps: forward passes of the base for each row, [B] int64.
        acceptance_length: tokens generated over steps for each row, [B] float64.
        accepted_per_step: draft tokens kept in each step, one list a row. A row generated their sum plus its steps.
        finish_reasons: ``stop`` at an end token, else ``length``, one a row.
    """

    sequences: Tensor
    num_steps: Tensor
    acceptance_length: Tensor
    accepted_per_step: list[list[int]]
    finish_reasons: list[str]


def generate(model: MTPModel, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Generation:
    """Generate for each row of a batch, one row after another.

    Args:
        model: the model.
        input_ids: prompts, padded on either side, [B, L] int64.
        attention_mask: 1 at prompt tokens, 0 at padding, [B, L]; None: no padding.
        **options: see ``DecodingOptions``.

    Returns:
        Sequences, steps and acceptance lengths.

    Raises:
        UsageError: a wrong option or a prompt that does not fit.
    """
    settings = DecodingOptions(**options)
    stop = end_tokens(model, settings)
    rows, accepted, reasons = [], [], []
    for r in range(input_ids.shape[0]):
        prompt = input_ids[r] if attention_mask is None else input_ids[r][attention_mask[r].bool()]
        steps = list(decode(model, prompt, settings))
        new = [token for step in steps for token in step.tokens]
        rows.append(torch.cat([prompt.cpu(), torch.tensor(new)]))
        accepted.append([len(step.tokens) - 1 for step in steps])
        reasons.append("stop" if new[-1] in stop else "length")
    num_steps = torch.tensor([len(row) for row in accepted])
    totals = torch.tensor([sum(row) + len(row) for row in accepted])
    padding = next(iter(stop), 0)
    return Generation(
        torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=padding).to(input_ids.device),
        num_steps,
        totals.double() / num_steps,
        accepted,
        reasons,
    )
