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
    "decoding": ["cubic", None],
    "num_masks": [1.5, True, "all", None],
    "sampler_head": [1, None],
    "max_new_tokens": [0, True, None],
    "max_steps": [0, 1.5],
    "eos_token_id": ["</s>", [1, 0.5]],
    "temperature": [-1, float("nan"), 10**400, 1e-40, "1", True, None],
    "top_k": [0, 2.0],
    "top_p": ["0.5", 0.0, 1.5, True],
    "repetition_penalty": [10**400, 0, None],
    "seed": [0.5, torch.tensor([0.5])],
    "verification": ["hope"],
    "draft_vocabulary": [0, True, "most", None],
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
        (N, {"num_masks": 0}, "num_masks must be auto or from 1 to 8"),
        (N, {"num_masks": 9}, "num_masks must be auto or from 1 to 8"),
        (N, {"max_new_token": 4}, "unknown option 'max_new_token': did you mean 'max_new_tokens'?"),
        (N, {"do_sample": True}, "unknown option 'do_sample'"),
        (0, {}, "the prompt is empty"),
        (CONTEXT, {}, f"the prompt has {CONTEXT} tokens"),
    ],
)
def test_wrong_options_and_prompts_are_refused(prompt: int, options: dict[str, Any], named: str) -> None:
    with pytest.raises(UsageError, match=named):
        shared_model("llama").generate(torch.ones(1, prompt, dtype=torch.int64), **options)


@pytest.mark.parametrize(
    ("ids", "mask", "message"),
    [
        ([5, 6], None, r"input_ids must be a tensor of token ids \[rows, tokens\], got torch.int64 \[2\]"),
        ([[5.0, 6.0]], None, r"got torch.float32 \[1, 2\]"),
        ([[5, VOCAB]], None, f"input_ids must be from 0 to {VOCAB - 1}, the model's vocabulary, got {VOCAB}"),
        ([[-100, 5]], None, "got -100"),
        ([[5, 6]], [[1, 1, 1]], r"attention_mask must have the shape of input_ids, \[1, 2\], got \[1, 3\]"),
    ],
)
def test_wrong_ids_are_refused(ids: Any, mask: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        shared_model("llama").generate(torch.tensor(ids), None if mask is None else torch.tensor(mask))
    with pytest.raises(UsageError, match="got list"):
        shared_model("llama").generate(ids)


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


def test_a_row_of_padding_alone_is_an_empty_prompt() -> None:
    with pytest.raises(UsageError, match="the prompt is empty"):
        shared_model("llama").generate(torch.ones(1, 4, dtype=torch.int64), torch.zeros(1, 4))
