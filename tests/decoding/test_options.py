# SPDX-License-Identifier: Apache-2.0
"""What decoding is asked: prompts, ids and options, wrong ones and those of torch and numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from injected_drafts import N, new_tokens, prompt_and_text, shared_model
from tiny import CONTEXT, VOCAB

from mtp_lightning.decoding.options import DecodingOptions
from mtp_lightning.errors import UsageError

WRONG: dict[str, list[Any]] = {
    "decoding": ["cubic"],
    "num_masks": [1.5, True, "all"],
    "sampler_head": [None],
    "max_new_tokens": [0],
    "max_steps": [1.5],
    "eos_token_id": ["</s>", [1, 0.5]],
    "temperature": [-1, float("nan"), 1e-40, "1"],
    "top_k": [2.0],
    "top_p": [0.0, 1.5],
    "repetition_penalty": [0],
    "seed": [torch.tensor([0.5])],
    "verification": ["hope"],
    "draft_candidates": [0, "most"],
    "prompt_lookup": [1],
    "compile": ["false"],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_wrong_values_are_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(UsageError, match=f"^{name} must be "):
        DecodingOptions(**{name: value})


@pytest.mark.parametrize(
    ("prompt", "options", "named"),
    [
        (N, {"num_masks": 9}, "num_masks"),
        (N, {"max_new_token": 4}, "max_new_tokens"),
        (0, {}, "empty"),
        (CONTEXT, {}, f"{CONTEXT} tokens"),
    ],
)
def test_wrong_options_and_prompts_are_refused(prompt: int, options: dict[str, Any], named: str) -> None:
    with pytest.raises(UsageError, match=named):
        shared_model("llama").generate(torch.ones(1, prompt, dtype=torch.int64), **options)


@pytest.mark.parametrize(
    ("ids", "mask", "message"),
    [
        ([5, 6], None, "input_ids"),
        ([[5.0, 6.0]], None, "input_ids"),
        ([[5, VOCAB]], None, f"token ids .* got {VOCAB}"),
        ([[-100, 5]], None, "token ids .* got -100"),
        ([[5, 6]], [[1, 1, 1]], "attention_mask"),
        ([[5, 6]], [[0, 0]], "empty"),
    ],
)
def test_wrong_ids_are_refused(ids: Any, mask: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        shared_model("llama").generate(torch.tensor(ids), None if mask is None else torch.tensor(mask))


def test_numbers_of_torch_and_numpy_are_as_good_as_pythons() -> None:
    model, (prompt, text) = shared_model("llama"), prompt_and_text("llama")
    end = text[5]
    ended = list(text[: text.index(end) + 1])
    for token in (torch.tensor(end), torch.tensor([end]), [torch.tensor(end)], np.int64(end), {end}):
        assert new_tokens(model, prompt, eos_token_id=token, max_new_tokens=np.int64(9), num_masks=torch.tensor(3)) == ended
    sampled = model.generate(prompt[None], seed=3, temperature=1.0, max_new_tokens=9).sequences
    for seed in (torch.tensor(3), np.int64(3), [np.int64(3)], torch.tensor([3])):
        assert torch.equal(model.generate(prompt[None], seed=seed, temperature=1.0, max_new_tokens=9).sequences, sampled)
    padded = torch.cat([torch.full((1, 2), -100), prompt[None]], dim=1)  # what stands at padding is not looked at
    assert model.generate(padded, padded >= 0, max_new_tokens=4).sequences[0, N:].tolist() == list(text[:4])
