# SPDX-License-Identifier: Apache-2.0
"""Lean layers and unrolled heads compute what PEFT's layers and the heads' own steps do, and leave no trace."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from hidden import hidden_states
from tiny import ARCHITECTURES, VOCAB, tiny_model, token_row
from torch import Tensor, nn

from mtp_lightning.decoding.execution.decode_cache import decode_cache, is_plain
from mtp_lightning.decoding.execution.draft_chain import DraftChain, GRUChain, MLPChain, unrolled
from mtp_lightning.decoding.loop import decode
from mtp_lightning.decoding.options import DecodingOptions
from mtp_lightning.decoding.packed_linear import packed_dtypes
from mtp_lightning.model import MTPModel
from mtp_lightning.modeling.gated_lora import LoRA
from mtp_lightning.modeling.peft_private import lora_layers
from mtp_lightning.sampler_heads import GRUSamplerHead, MLPSamplerHead, SamplerHead

EXACT = {"rtol": 1e-11, "atol": 1e-11}
"""float64 sums in another order, through a few layers."""


@pytest.mark.parametrize("joined", [True, False])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_fused_layers_compute_what_pefts_do(architecture: str, joined: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not joined:
        monkeypatch.setattr("mtp_lightning.decoding.execution.decode_cache.LARGEST_COPY", 0)
    model = tiny_model(architecture, 4)
    for rows, num_mtp in ((1, 4), (3, 4), (2, 13), (2, 0)):
        expected = hidden_states(model, num_mtp, rows)
        with decode_cache(model).use(model):
            covered = [layer for layer in lora_layers(model.base) if "forward" in vars(layer)]
            assert covered == lora_layers(model.base)
            torch.testing.assert_close(hidden_states(model, num_mtp, rows), expected, **EXACT)
        if num_mtp == 4:  # and the adapters do something
            assert (hidden_states(model, 0, rows) - expected)[:, -4:].abs().max() > 1e-3


@pytest.mark.parametrize("block", [0, 1 << 16])
def test_adapters_one_by_one_or_in_one_block(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mtp_lightning.decoding.execution.fused_lora.LARGEST_BLOCK", block)
    model = tiny_model("qwen2", 4)
    expected = hidden_states(model, 4, 2)
    with decode_cache(model).use(model):
        torch.testing.assert_close(hidden_states(model, 4, 2), expected, **EXACT)


def test_packed_layers_compute_what_pefts_do() -> None:
    """float32 on a CPU, where weights are packed; the sums are rounded otherwise."""
    model = tiny_model("qwen2", 4, dtype=torch.float32)
    for rows in (1, 3):
        expected = hidden_states(model, 4, rows)
        with decode_cache(model).use(model), torch.inference_mode():
            found = hidden_states(model, 4, rows)
            packs = torch.float32 in packed_dtypes()
            assert ("forward" in vars(model.base.get_output_embeddings())) == packs
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
            logits = model.unembed(found)
        torch.testing.assert_close(logits, model.unembed(expected).detach(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_keep_the_bases_bits(dtype: torch.dtype) -> None:
    """Adapters open or shut, NTP positions are the same to the last bit."""
    model = tiny_model("llama", 4, dtype=dtype)
    model.mask_embeddings.data = model.mask_embeddings.data.to(dtype)
    with decode_cache(model).use(model):
        assert torch.equal(hidden_states(model, 4, 2)[:, :9], hidden_states(model, 0, 2)[:, :9])


HEADS: dict[str, Any] = {
    "mlp": MLPSamplerHead,
    "gru": GRUSamplerHead,
    "gru that reads": lambda: GRUSamplerHead(24, read_hidden=True),
    "wide gru": lambda: GRUSamplerHead(48),
}


@pytest.mark.parametrize("table", [True, False])
@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
@pytest.mark.parametrize("name", HEADS)
def test_unrolled_heads_compute_what_their_steps_do(
    name: str, architecture: str, table: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not table:
        monkeypatch.setattr("mtp_lightning.decoding.execution.draft_chain.LARGEST_TABLE", 0)
    model = tiny_model(architecture, 4, sampler_head=HEADS[name]())
    head, embedding = model.sampler_head, model.base.get_input_embeddings()
    assert head is not None
    fast = unrolled(head, embedding, model.unembed.vocab_size, torch.float64)
    assert isinstance(fast, GRUChain if "gru" in name else MLPChain) and (fast.table is not None) == table
    slow = DraftChain(head, embedding)
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        for rows in (1, 3):
            hidden = torch.randn(rows, 5, 32, generator=generator, dtype=torch.float64)
            fast.begin(hidden)
            slow.begin(hidden)
            for j in range(5):
                tokens = torch.randint(97, (rows,), generator=generator)
                torch.testing.assert_close(fast.next(j, tokens), slow.next(j, tokens), **EXACT)


class Doubled(GRUSamplerHead):
    """Somebody's own head."""

    def step(self, hidden: Tensor, previous: Tensor, state: Any) -> tuple[Tensor, Any]:
        output, state = super().step(hidden, previous, state)
        return 2 * output, state


def test_another_head_drafts_through_its_step() -> None:
    model = tiny_model("llama", 3, sampler_head=Doubled())
    assert isinstance(model.sampler_head, SamplerHead)
    chain = unrolled(model.sampler_head, model.base.get_input_embeddings(), 97, torch.float64)
    assert type(chain) is DraftChain
    with decode_cache(model).use(model):
        assert type(decode_cache(model).chain(model)) is DraftChain


def drafts(model: MTPModel) -> list[Any]:
    prompt = token_row([6]).input_ids
    return list(decode(model, prompt, DecodingOptions(num_masks=3, max_new_tokens=12)))


def test_nothing_is_left_behind_and_new_weights_are_noticed() -> None:
    model = tiny_model("llama", 3, sampler_head=GRUSamplerHead())
    keys = [set(vars(module)) for module in model.modules()]
    drafts(model)
    assert [set(vars(module)) for module in model.modules()] == keys
    first = decode_cache(model)._forwards
    drafts(model)
    assert decode_cache(model)._forwards is first  # made once
    paused = decode(model, token_row([6]).input_ids, DecodingOptions(max_new_tokens=12))
    next(paused)
    drafts(model)  # another text in the middle of one
    next(paused)
    paused.close()
    assert [set(vars(module)) for module in model.modules()] == keys
    layer = lora_layers(model.base)[0]
    with torch.no_grad():
        layer.lora_B["default"].weight.mul_(3.0)
    for _ in range(2):
        expected = hidden_states(model, 3, 1)
        with decode_cache(model).use(model):
            torch.testing.assert_close(hidden_states(model, 3, 1), expected, **EXACT)
        layer.lora_A["default"].weight = nn.Parameter(torch.randn_like(layer.lora_A["default"].weight))
    assert decode_cache(model)._forwards is not first


@torch.no_grad()
def change_data(model: MTPModel) -> None:
    for layer in lora_layers(model.base):
        layer.base_layer.weight.data.copy_(torch.randn_like(layer.base_layer.weight))


def change_output(model: MTPModel) -> None:
    model.base.get_output_embeddings().weight.data.mul_(-1.0)


def change_by_a_fused_optimizer(model: MTPModel) -> None:
    """It leaves no count of changes."""
    trained = [weight for layer in lora_layers(model.base) for weight in (layer.lora_B["default"].weight,)]
    for weight in trained:
        weight.grad = torch.ones_like(weight)
    torch.optim.AdamW(trained, lr=1.0, fused=True).step()


def change_scaling(model: MTPModel) -> None:
    for layer in lora_layers(model.base):
        layer.set_scale("default", 3.0)


@pytest.mark.parametrize("change", [change_data, change_output, change_by_a_fused_optimizer, change_scaling])
def test_changes_that_are_counted_nowhere_are_noticed(change: Any) -> None:
    model = tiny_model("llama", 3, dtype=torch.float32)
    drafts(model)
    change(model)
    for weights in (model.base.get_output_embeddings(), *lora_layers(model.base)):
        weights.requires_grad_(False)
    expected = hidden_states(model, 3, 1)
    with torch.inference_mode():
        logits = model.unembed(expected)
        with decode_cache(model).use(model):
            found = hidden_states(model, 3, 1)
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(model.unembed(found), logits, rtol=1e-2, atol=1e-2)


def test_a_copy_made_while_a_reader_has_paused() -> None:
    model = tiny_model("llama", 3, sampler_head=GRUSamplerHead())
    expected = drafts(model)
    paused = decode(model, token_row([6]).input_ids, DecodingOptions(max_new_tokens=12))
    next(paused)
    twin = copy.deepcopy(model)
    paused.close()
    assert drafts(twin) == expected
    change_data(twin)
    before = hidden_states(twin, 3, 1)
    with decode_cache(twin).use(twin):
        torch.testing.assert_close(hidden_states(twin, 3, 1), before, **EXACT)
    assert drafts(model) == expected


def test_memory_is_given_back() -> None:
    model = tiny_model("llama", 3, sampler_head=GRUSamplerHead())
    expected = drafts(model)
    model.clear_decode_cache()
    assert not decode_cache(model)._forwards and decode_cache(model)._chain is None
    paused = decode(model, token_row([6]).input_ids, DecodingOptions(num_masks=3, max_new_tokens=12))
    first = next(paused)
    model.clear_decode_cache()
    assert [first, *paused] == expected == drafts(model)


def test_training_while_a_reader_has_paused() -> None:
    model = tiny_model("llama", 3)
    paused = decode(model, token_row([6]).input_ids, DecodingOptions(max_new_tokens=12))
    next(paused)
    layer = lora_layers(model.base)[0]
    x = torch.randn(1, 5, 32, dtype=torch.float64)
    with model.gate.open(2), torch.enable_grad(), torch.inference_mode(False):
        layer(x.clone()).sum().backward()
    assert layer.lora_B["default"].weight.grad is not None
    paused.close()


@torch.inference_mode()
def test_a_model_made_in_inference_mode_decodes() -> None:
    expected = drafts(shared := tiny_model("llama", 3, sampler_head=GRUSamplerHead()))
    with torch.inference_mode(False):
        assert drafts(tiny_model("llama", 3, sampler_head=GRUSamplerHead())) == expected
    assert shared.mask_embeddings.is_inference()


@pytest.mark.parametrize("head", [None, MLPSamplerHead, GRUSamplerHead])
def test_decoding_under_autocast(head: Any) -> None:
    """Products are bfloat16 there and weights made ready are not; float64 would not be cast at all."""

    def model() -> MTPModel:
        return tiny_model("llama", 3, sampler_head=head and head(), dtype=torch.float32)

    one, expected = model(), drafts(model())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fast = [token for step in drafts(one) for token in step.tokens]
        slow = decode(one, token_row([6]).input_ids, DecodingOptions("autoregressive", max_new_tokens=12))
        assert fast == [token for step in slow for token in step.tokens]
    assert drafts(one) == expected  # and nothing that was made ready is rounded
    if head is not None:
        other = model()
        with decode_cache(other).use(other):
            assert torch.equal(decode_cache(one)._chain.table, decode_cache(other)._chain.table)  # type: ignore[union-attr]


def test_costs_are_those_of_the_device_and_dtype() -> None:
    model = tiny_model("llama", 3, dtype=torch.float32)
    options = DecodingOptions(max_new_tokens=4)
    list(decode(model, token_row([6]).input_ids, options))
    costs = decode_cache(model).calibrations[False, VOCAB]
    list(decode(model, token_row([6]).input_ids, options))
    assert decode_cache(model).calibrations == {(False, VOCAB): costs}
    model.double()
    list(decode(model, token_row([6]).input_ids, options))
    assert [*decode_cache(model).calibrations] == [(False, VOCAB)] and decode_cache(model).calibrations[
        False, VOCAB
    ] is not costs


def test_a_copied_or_pickled_model_makes_its_own() -> None:
    model = tiny_model("llama", 3, sampler_head=GRUSamplerHead())
    expected = drafts(model)
    assert drafts(copy.deepcopy(model)) == expected
    assert pickle.loads(pickle.dumps(decode_cache(model)))._forwards == []


def test_what_is_not_plain_keeps_pefts_path() -> None:
    def layers(**options: Any) -> tuple[MTPModel, list[Any]]:
        model = tiny_model("llama", 3, **options)
        return model, lora_layers(model.base)

    model, found = layers()
    assert all(is_plain(layer, model.gate) for layer in found)
    found[0].register_forward_hook(lambda *_: None)
    found[1].base_layer.register_forward_pre_hook(lambda *_: None)
    found[2].base_layer.__class__ = type("Linear4bit", (nn.Linear,), {})
    found[3].base_layer.forward = found[3].base_layer.forward  # as accelerate does to load weights late
    found[4].enable_adapters(False)
    assert [is_plain(layer, model.gate) for layer in found[:6]] == [False] * 5 + [True]
    assert not is_plain(found[6], tiny_model("llama", 3).gate)
    expected = hidden_states(model, 3, 2)
    with decode_cache(model).use(model):
        torch.testing.assert_close(hidden_states(model, 3, 2), expected, **EXACT)
    always, found = layers(lora=LoRA(rank=4, gated=False))
    assert all(is_plain(layer, always.gate) for layer in found)
