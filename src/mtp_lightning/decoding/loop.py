# SPDX-License-Identifier: Apache-2.0
"""Self-speculative decoding: draft, verify, accept. Lossless: the text is the base model's own, token for token.

Source: Samragh et al. 2025, §2.4. Quadratic decoding places a block after the verified token too, so that every step has a
full draft; the paper leaves it out of its count.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set

import torch
from torch import Tensor

from mtp_lightning.decoding.compiled_executor import CompiledExecutor, can_compile
from mtp_lightning.decoding.exact_executor import ExactExecutor
from mtp_lightning.decoding.execution.decode_cache import decode_cache
from mtp_lightning.decoding.executor import EagerExecutor, token_choice
from mtp_lightning.decoding.limits import check_prompt, check_tokens, end_tokens, resolve_num_masks
from mtp_lightning.decoding.noise import row_seeds
from mtp_lightning.decoding.options import DecodingOptions
from mtp_lightning.decoding.planner import make_planner
from mtp_lightning.decoding.proposer import make_proposers
from mtp_lightning.decoding.row_cache import RowCache
from mtp_lightning.decoding.state import DecodeState, RowStep, StepTokens
from mtp_lightning.decoding.token_choice import TokenChoice
from mtp_lightning.errors import UsageError
from mtp_lightning.modeling.network import MTPNetwork


def make_executor(model: MTPNetwork, options: DecodingOptions, choice: TokenChoice) -> EagerExecutor:
    """The executor that the options ask for."""
    if options.exact:
        return ExactExecutor(model, options, choice)
    return (CompiledExecutor if can_compile(model, options) else EagerExecutor)(model, options, choice)


def decode(
    model: MTPNetwork, prompt: Tensor, options: DecodingOptions, cache: RowCache | None = None
) -> Iterator[StepTokens]:
    """Decode one prompt and yield the tokens of each step as they are verified.

    Args:
        model: the model.
        prompt: token ids, [n] int64, n at least 1.
        options: how to decode.
        cache: ``RowCache(model.base, 1)``, to continue from what earlier calls left in it: what the prompt has in common
            with the text there is not fed again. It stays usable when the reader stops early. None: nothing is kept.

    Yields:
        What each step gained, together at most ``max_new_tokens``.

    Raises:
        UsageError: an empty prompt, one that does not fit the context, or a wrong option.
    """
    for steps in decode_rows(model, [prompt], options, cache):
        yield steps[0].step


@torch.inference_mode()
def decode_rows(
    model: MTPNetwork,
    prompts: Sequence[Tensor],
    options: DecodingOptions,
    cache: RowCache | None = None,
    stopped: Set[int] = frozenset(),
) -> Iterator[list[RowStep]]:
    """``decode`` for several prompts together: what each row that took part in a step gained.

    Every row gains what it would gain alone. A row that has finished leaves the batch, and so does one of the ``stopped``,
    which the caller may change between steps. Then the model is the user's own: it may be trained, and other texts decoded.
    A ``cache`` goes with a single prompt.
    """
    resolve_num_masks(model, options)  # raises for a wrong number
    seeds = row_seeds(options.drawing_seed, len(prompts))
    if len(seeds) != len(prompts):
        raise UsageError(f"seed must be an int or one for each of the {len(prompts)} rows, got {len(seeds)}.")
    for prompt in prompts:
        check_prompt(len(prompt), model.context)
        check_tokens(prompt, model.unembed.vocab_size)
    limits = [min(len(prompt) + options.max_new_tokens, model.context) for prompt in prompts]
    decode_cache(model).prepare(model)
    choice = token_choice(model, options, seeds)
    executor, proposers = make_executor(model, options, choice), make_proposers(model, options, prompts)
    with executor.open_cache(prompts, max(limits), cache) as rows_cache:
        state = DecodeState(
            prompts, limits, rows_cache, choice, end_tokens(model, options), options.max_steps, executor.fixed_shapes
        )
        planner = make_planner(model, options, state)
        while True:
            plan = planner.plan(state)
            result = executor.run(plan, state)
            gained = state.commit(plan, result)
            for proposer in proposers:
                proposer.propose(state, plan, result)
            planner.update(state, result)
            yield gained
            if not state.compact(stopped):
                return
