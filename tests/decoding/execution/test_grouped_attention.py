# SPDX-License-Identifier: Apache-2.0
"""Grouped attention gives the bits that repeated keys and values give."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from tiny import tiny_model, token_row
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mtp_lightning.decoding.execution import grouped_attention
from mtp_lightning.decoding.execution.decoding_mode import DecodingMode
from mtp_lightning.decoding.execution.grouped_attention import (
    MAX_FOLDED,
    decoding_kernel,
    folded,
    rows_alike,
    supports_grouped_sdpa,
)
from mtp_lightning.decoding.loop import decode
from mtp_lightning.decoding.options import DecodingOptions
from mtp_lightning.decoding.packed_linear import few_rows_differ
from mtp_lightning.decoding.row_cache import RowCache
from mtp_lightning.modeling.attention import GROUPED_SDPA


@pytest.mark.parametrize(("architecture", "dtype"), [("gemma3", torch.float32), ("qwen2", torch.bfloat16)])
def test_the_same_text(architecture: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grouped_attention, "few_rows_differ", lambda dtype: False)
    model = tiny_model(architecture, 4, dtype=dtype)
    model.mask_embeddings.data = model.mask_embeddings.data.to(dtype)
    assert supports_grouped_sdpa(model.base)
    prompt, options = token_row([9]).input_ids, DecodingOptions(num_masks=4, max_new_tokens=12)
    grouped = [step.tokens for step in decode(model, prompt, options)]
    monkeypatch.setattr(grouped_attention, "supports_grouped_sdpa", lambda base: False)
    assert [step.tokens for step in decode(model, prompt, options)] == grouped


@pytest.mark.parametrize(("groups", "dtype"), [(2, torch.float64), (3, torch.float32), (4, torch.bfloat16)])
@torch.inference_mode()
def test_single_calls(groups: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grouped_attention, "few_rows_differ", lambda dtype: False)
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


def attention_input(queries: int, slots: int, groups: int, dtype: torch.dtype) -> list[Tensor]:
    """Query, key, value and an additive mask of two rows, all queries seeing different slots."""
    generator = torch.Generator().manual_seed(queries)
    query = torch.randn(2, 3 * groups, queries, 16, generator=generator, dtype=torch.float64)
    key, value = torch.randn(2, 2, 3, slots, 16, generator=generator, dtype=torch.float64)
    mask = torch.where(torch.rand(2, 1, queries, slots, generator=generator) < 0.6, 0.0, -torch.inf)
    mask[..., 0] = 0
    return [each.to(dtype) for each in (query, key, value, mask)]


@pytest.mark.parametrize("queries", [1, 2, 3, 4, 31, 33, 35, 36, 193])
@pytest.mark.parametrize("groups", [1, 2, 3])
@torch.inference_mode()
def test_folded_and_filled_up_queries_are_the_same_attention(queries: int, groups: int) -> None:
    query, key, value, mask = attention_input(queries, 40, groups, torch.float64)
    weights = (query @ key.repeat_interleave(groups, 1).mT * 0.3 + mask).softmax(-1)
    expected = weights @ value.repeat_interleave(groups, 1)
    for attention in (folded, rows_alike):
        found = attention(query, key, value, mask, 0.3)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)  # float64, another order of sums


@torch.inference_mode()
def test_one_mask_for_all_rows_folds_too() -> None:
    query, key, value, mask = attention_input(5, 40, 2, torch.float64)
    for one in (mask[:1], mask[:1] == 0):
        expected = torch.cat([folded(*(x[b : b + 1] for x in (query, key, value)), one, 0.3) for b in range(2)])
        torch.testing.assert_close(folded(query, key, value, one, 0.3), expected, rtol=1e-12, atol=1e-12)  # as above


@pytest.mark.parametrize(
    ("heads", "queries", "folds"), [(8, 81, True), (8, MAX_FOLDED, True), (8, 600, False), (2, 81, False)]
)
def test_few_grouped_queries_fold_on_a_gpu(heads: int, queries: int, folds: bool) -> None:
    on_gpu = {"device": torch.device("cuda"), "dtype": torch.bfloat16}
    query, key = (SimpleNamespace(shape=(2, n, q, 16), **on_gpu) for n, q in ((heads, queries), (2, 700)))
    assert (grouped_attention._attention(query, key) is folded) is folds


@pytest.mark.skipif(not few_rows_differ(torch.bfloat16), reason="tried on an AMD EPYC with AVX-512 alone")
@pytest.mark.parametrize("slots", [96, 192, 384, 512, 544])
@torch.inference_mode()
def test_bits_do_not_depend_on_the_other_queries(slots: int) -> None:
    query, key, value, mask = attention_input(200, slots, 3, torch.bfloat16)
    whole = rows_alike(query, key, value, mask, 0.3)
    for size in (1, 2, 3, 4, 9, 25, 33, 34, 81):
        for at in range(0, 200 - size, size):
            part = slice(at, at + size)
            assert torch.equal(rows_alike(query[:, :, part], key, value, mask[:, :, part], 0.3), whole[:, :, part]), size


@pytest.mark.skipif(not few_rows_differ(torch.bfloat16), reason="tried on an AMD EPYC with AVX-512 alone")
@torch.inference_mode()
def test_bits_do_not_depend_on_the_slots_that_a_step_reads() -> None:
    cache = RowCache(tiny_model("llama", 3, dtype=torch.bfloat16).base, 1)
    query, key, value, _ = attention_input(4, 1200, 3, torch.bfloat16)
    for length in (31, 150, 190, 191, 200, 300, 380, 511, 700, 702, 890, 1030):
        cache.lengths = [length]
        found = []
        for positions in (1, 9, 25, 81):
            slots = cache.reach(positions)[1]
            mask = torch.zeros(1, 1, 4, slots, dtype=torch.bfloat16)
            mask[..., length:] = -torch.inf
            found.append(rows_alike(query, key[:, :, :slots], value[:, :, :slots], mask, 0.3))
        assert all(torch.equal(each, found[0]) for each in found), length


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
