# SPDX-License-Identifier: Apache-2.0
"""With ``exact`` the logits that choose each token have the same bits, whatever is drafted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from injected_drafts import RUNS, InjectedDrafts
from tiny import tiny_model, token_row
from torch import Tensor

from mtp_lightning.decoding.acceptance import VerifiedStep
from mtp_lightning.decoding.execution import step as decoding_step
from mtp_lightning.decoding.loop import decode
from mtp_lightning.decoding.options import DecodingOptions
from mtp_lightning.decoding.row_cache import RowCache
from mtp_lightning.decoding.token_choice import TokenChoice
from mtp_lightning.errors import UsageError
from mtp_lightning.model import MTPModel

G = 24
"""Tokens of a text."""


@pytest.fixture
def verified(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[int, int], Tensor]:
    """The logits [V] that chose the token of each row at each position, by number of the row and position."""
    found: dict[tuple[int, int], Tensor] = {}
    base_tokens = decoding_step.base_tokens

    def recorded(choice: TokenChoice, step: VerifiedStep) -> Tensor:
        tokens = base_tokens(choice, step)
        for r, row in enumerate(step.scores):
            for c, scores in enumerate(row):
                found[r, int(step.positions[r, c])] = scores
                if c == step.draft.shape[1] or not (step.verify_mask is None or step.verify_mask[r, c]):
                    break
                if step.draft[r, c] != tokens[r, c]:
                    break
        return tokens

    monkeypatch.setattr(decoding_step, "base_tokens", recorded)
    return found


def decoded(model: MTPModel, prompts: list[Tensor], **options: Any) -> Tensor:
    width = max(map(len, prompts))
    ids = torch.stack([torch.nn.functional.pad(prompt, (width - len(prompt), 0)) for prompt in prompts])
    mask = torch.stack([torch.arange(width) >= width - len(prompt) for prompt in prompts]).long()
    sequences = model.generate(ids, mask, max_new_tokens=G, eos_token_id=[], exact=True, **options).sequences
    return torch.stack([row[len(prompt) : len(prompt) + G] for row, prompt in zip(sequences, prompts, strict=True)])


@pytest.mark.parametrize(("architecture", "dtype"), [("llama", "bfloat16"), ("llama", "float32"), ("gemma3", "bfloat16")])
@pytest.mark.parametrize("sizes", [(7,), (7, 30, 2)])
def test_logits_have_the_same_bits_whatever_is_drafted(
    architecture: str,
    dtype: str,
    sizes: tuple[int, ...],
    inject: Callable[..., InjectedDrafts],
    verified: dict[tuple[int, int], Tensor],
) -> None:
    """Prompts longer than a pass (25 positions) and shorter; drafts that are right always, never and sometimes."""
    model = tiny_model(architecture, 8, dtype=getattr(torch, dtype)).eval()
    prompts = [token_row([size], seed=seed).input_ids for seed, size in enumerate(sizes)]
    seeds = list(range(len(sizes)))  # the injected drafts of a row are found by its seed
    plain = decoded(model, prompts, decoding="autoregressive", seed=seeds)
    expected = dict(verified)
    assert len(expected) == G * len(sizes)
    texts = [[*prompt.tolist(), *text.tolist()] for prompt, text in zip(prompts, plain, strict=True)]
    for decoding, num_masks in (("quadratic", 4), ("linear", 4), ("quadratic", "auto")):
        for run in RUNS.values():
            verified.clear()
            inject(model, texts, run)
            assert torch.equal(decoded(model, prompts, decoding=decoding, num_masks=num_masks, seed=seeds), plain)
            for place, scores in expected.items():
                assert torch.equal(verified[place], scores), (decoding, place)


def test_a_kept_cache_that_other_passes_filled_is_not_used() -> None:
    """A conversation that goes on with ``exact``: the text is that of a cache of its own."""
    model, options = tiny_model("llama", 4, dtype=torch.bfloat16).eval(), {"max_new_tokens": 8, "eos_token_id": []}
    prompt, cache, steps = token_row([30]).input_ids, RowCache(model.base, 1), []
    expected = [step.tokens for step in decode(model, prompt, DecodingOptions(exact=True, **options))]
    list(decode(model, prompt, DecodingOptions(num_masks=2, **options), cache))
    model.register_forward_pre_hook(lambda _, args: steps.append(args[0]))
    assert [step.tokens for step in decode(model, prompt, DecodingOptions(exact=True, **options), cache)] == expected
    assert cache.capacity % 512 == 0 and type(steps[0]).__name__ == "PromptChunk"
    steps.clear()
    list(decode(model, prompt, DecodingOptions(exact=True, **options), cache))
    assert type(steps[0]).__name__ == "StepInput"  # what passes of the same shape computed is used
    steps.clear()
    list(decode(model, prompt, DecodingOptions(exact=True, num_masks=2, **options), cache))
    assert type(steps[0]).__name__ == "PromptChunk"  # what passes of another shape computed is not


def test_what_cannot_be_exact_is_refused() -> None:
    prompt, eight_bit = torch.ones(1, 3, dtype=torch.int64), tiny_model("llama", 2)
    eight_bit.base.is_loaded_in_8bit = True
    for model, options in (
        (tiny_model("qwen3_moe", 2), {}),
        (eight_bit, {}),
        (tiny_model("llama", 2), {"compile": True}),
        (tiny_model("llama", 2), {"temperature": 1.0, "verification": "rejection"}),
    ):
        with pytest.raises(UsageError, match="exact"):
            model.generate(prompt, exact=True, **options)
