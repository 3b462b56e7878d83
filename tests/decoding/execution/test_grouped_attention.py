# SPDX-License-Identifier: Apache-2.0
"""Grouped attention gives the bits that repeated keys and values give."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_model, token_row
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mtp_lightning.decoding.execution import grouped_attention
from mtp_lightning.decoding.execution.decoding_mode import DecodingMode
from mtp_lightning.decoding.execution.grouped_attention import decoding_kernel, supports_grouped_sdpa
from mtp_lightning.decoding.loop import decode
from mtp_lightning.decoding.options import DecodingOptions
from mtp_lightning.modeling.attention import GROUPED_SDPA


@pytest.mark.parametrize(("architecture", "dtype"), [("gemma3", torch.float32), ("qwen2", torch.bfloat16)])
def test_the_same_text(architecture: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(architecture, 4, dtype=dtype)
    model.mask_embeddings.data = model.mask_embeddings.data.to(dtype)
    assert supports_grouped_sdpa(model.base)
    prompt, options = token_row([9]).input_ids, DecodingOptions(num_masks=4, max_new_tokens=12)
    grouped = [step.tokens for step in decode(model, prompt, options)]
    monkeypatch.setattr(grouped_attention, "supports_grouped_sdpa", lambda base: False)
    assert [step.tokens for step in decode(model, prompt, options)] == grouped


@pytest.mark.parametrize(("groups", "dtype"), [(2, torch.float64), (3, torch.float32), (4, torch.bfloat16)])
@torch.inference_mode()
def test_single_calls(groups: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    module = type("Attention", (), {"num_key_value_groups": groups, "is_causal": True})()
    for queries, mask in ((5, True), (1, True), (5, False)):
        query = torch.randn(2, 2 * groups, queries, 16, generator=generator, dtype=torch.float64).to(dtype)
        key, value = (torch.randn(2, 2, 9, 16, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
        sees = None
        if mask:
            sees = torch.rand(2, 1, queries, 9, generator=generator) < 0.6
            sees[..., 0] = True
        expected = ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, sees, scaling=0.3, is_causal=False)[0]
        found = grouped_attention.grouped_sdpa(module, query, key, value, sees, scaling=0.3, is_causal=False)[0]
        assert torch.equal(found, expected)


def test_it_is_used_within_steps_only() -> None:
    model = tiny_model("llama", 3)
    steps = decode(model, token_row([6]).input_ids, DecodingOptions(max_new_tokens=12))
    next(steps)
    assert model.base.config._attn_implementation == "sdpa"
    with pytest.raises(KeyError), DecodingMode(model).active():
        assert model.base.config._attn_implementation == GROUPED_SDPA
        raise KeyError
    model.base.set_attn_implementation("eager")  # what the user sets between steps stays
    next(steps)
    assert model.base.config._attn_implementation == decoding_kernel(model.base) == "eager"
