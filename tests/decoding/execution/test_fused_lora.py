# SPDX-License-Identifier: Apache-2.0
"""Fused layers compute what PEFT's layers do, and the base's bits before the tail."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hidden import fused, hidden_states, join_layers
from tiny import FEW, tiny_model
from torch import nn

from mtp_lightning.decoding.execution import fused_lora
from mtp_lightning.decoding.execution.fused_lora import can_fuse
from mtp_lightning.decoding.packed_linear import PackedLinear, packed_dtypes
from mtp_lightning.model import MTPModel
from mtp_lightning.modeling.gated_lora import LoRA
from mtp_lightning.modeling.peft_private import lora_layers

EXACT = {"rtol": 1e-11, "atol": 1e-11}
"""float64 sums in another order, through a few layers."""


@pytest.mark.parametrize("architecture", FEW)
def test_fused_layers_compute_what_pefts_do(architecture: str) -> None:
    model = tiny_model(architecture, 4)
    for rows, num_mtp in ((1, 4), (2, 13), (2, 0)):
        expected = hidden_states(model, num_mtp, rows)
        with fused(model):
            assert all("forward" in vars(layer) for layer in lora_layers(model.base))
            torch.testing.assert_close(hidden_states(model, num_mtp, rows), expected, **EXACT)
        if num_mtp == 4:  # the adapters have an effect
            assert (hidden_states(model, 0, rows) - expected)[:, -4:].abs().max() > 1e-3


@pytest.mark.parametrize("max_copy_bytes", [fused_lora.MAX_COPY_BYTES, 0])
def test_packed_layers_compute_what_pefts_do(max_copy_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """float32 on a CPU, where weights are packed unless too large to copy, and sums are rounded differently."""
    monkeypatch.setattr(fused_lora, "MAX_COPY_BYTES", max_copy_bytes)
    model = tiny_model("qwen2", 4, dtype=torch.float32)
    for rows in (1, 3):
        expected = hidden_states(model, 4, rows)
        with fused(model), torch.inference_mode():
            found = hidden_states(model, 4, rows)
            packs = max_copy_bytes > 0 and torch.float32 in packed_dtypes()
            assert ("forward" in vars(model.base.get_output_embeddings())) == packs
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
            logits = model.unembed(found)
        torch.testing.assert_close(logits, model.unembed(expected).detach(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("architecture", FEW)
def test_joined_layers_compute_what_pefts_do(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float64, where nothing is packed, so that only the order of sums differs."""
    join_layers(monkeypatch)
    model = tiny_model(architecture, 4)
    products: list[tuple[int, ...]] = []
    product = PackedLinear.__call__
    monkeypatch.setattr(PackedLinear, "__call__", lambda self, x: products.append(tuple(x.shape)) or product(self, x))
    for rows, num_mtp in ((1, 4), (2, 13), (2, 0)):
        expected = hidden_states(model, num_mtp, rows)
        with fused(model):
            products.clear()
            torch.testing.assert_close(hidden_states(model, num_mtp, rows), expected, **EXACT)
            if architecture == "llama":  # q, k and v; o; gate and up; down
                assert len(products) == model.base.config.num_hidden_layers * (4 + (6 if num_mtp else 0))


def test_joined_layers_of_other_inputs_and_orders(monkeypatch: pytest.MonkeyPatch) -> None:
    join_layers(monkeypatch)
    model = tiny_model("qwen2", 4)  # with biases
    attention = model.base.get_decoder().layers[0].self_attn
    q, k, v = attention.q_proj, attention.k_proj, attention.v_proj
    assert fused_lora._joined(attention, lora_layers(attention)) == [[q, k, v]]
    x, y = torch.randn(2, 2, 6, q.in_features, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    calls = ((q, x), (k, y), (v, x), (v, y), (q, y), (q, y), (k, x))
    with torch.inference_mode(), model.gate.over_last(2):
        expected = [layer(each) + 1 for layer, each in calls]
        with fused(model):
            found = [layer(each).add_(1) for layer, each in calls]  # what a caller changes is its own
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, **EXACT)


def test_what_is_not_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_lora, "joining_pays", lambda weight: True)

    def num_joined(rank: int, bias_of_v: bool = True) -> list[int]:
        model = tiny_model("qwen2", 4, lora=LoRA(rank=rank))
        if not bias_of_v:
            model.base.get_decoder().layers[0].self_attn.v_proj.base_layer.bias = None
        return [len(group) for group in fused_lora._joined(model.base, lora_layers(model.base))]

    layers = tiny_model("qwen2", 4).base.config.num_hidden_layers
    assert num_joined(1) == [3, 2] * layers
    assert num_joined(1, bias_of_v=False) == [2, *[3, 2] * (layers - 1)]
    assert num_joined(32) == []  # the matrices A would be as large as the weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_keep_the_bits_of_the_base(dtype: torch.dtype) -> None:
    model = tiny_model("llama", 4, dtype=dtype)
    model.mask_embeddings.data = model.mask_embeddings.data.to(dtype)
    with fused(model):
        assert torch.equal(hidden_states(model, 4, 2)[:, :9], hidden_states(model, 0, 2)[:, :9])


def test_layers_that_cannot_be_fused_keep_pefts_forward() -> None:
    def layers(**options: Any) -> tuple[MTPModel, list[Any]]:
        model = tiny_model("llama", 3, **options)
        return model, lora_layers(model.base)

    model, found = layers()
    assert all(can_fuse(layer, model.gate) for layer in found)
    found[0].register_forward_hook(lambda *_: None)
    found[1].base_layer.register_forward_pre_hook(lambda *_: None)
    found[2].base_layer.__class__ = type("Linear4bit", (nn.Linear,), {})
    found[3].base_layer.forward = found[3].base_layer.forward  # as accelerate does to load weights late
    found[4].enable_adapters(False)
    assert [can_fuse(layer, model.gate) for layer in found[:6]] == [False] * 5 + [True]
    assert not can_fuse(found[6], tiny_model("llama", 3).gate)
    expected = hidden_states(model, 3, 2)
    with fused(model):
        torch.testing.assert_close(hidden_states(model, 3, 2), expected, **EXACT)
    always, found = layers(lora=LoRA(rank=4, gated=False))
    assert all(can_fuse(layer, always.gate) for layer in found)
