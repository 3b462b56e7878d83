# SPDX-License-Identifier: Apache-2.0
"""What decoding keeps for a model follows its weights, leaves no trace on its modules, and is not copied with it."""

from __future__ import annotations

import copy
import pickle
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hidden import fused, hidden_states
from tiny import tiny_model, token_row

from mtp_lightning.decoding.execution.decode_cache import DecodeCache, decode_cache
from mtp_lightning.decoding.loop import decode
from mtp_lightning.decoding.options import DecodingOptions
from mtp_lightning.model import MTPModel
from mtp_lightning.modeling.peft_private import lora_layers
from mtp_lightning.sampler_heads import GRUSamplerHead


def start(model: MTPModel) -> Any:
    return decode(model, token_row([6]).input_ids, DecodingOptions(num_masks=3, max_new_tokens=12))


def drafts(model: MTPModel) -> list[Any]:
    return list(start(model))


def test_between_steps_modules_are_as_they_were() -> None:
    model = tiny_model("llama", 3, sampler_head=GRUSamplerHead())
    keys = [set(vars(module)) for module in model.modules()]
    expected = drafts(model)
    forwards = decode_cache(model)._forwards
    suspended = start(model)
    steps = [next(suspended)]
    assert [set(vars(module)) for module in model.modules()] == keys
    assert drafts(model) == expected  # another text in the middle of one
    assert [*steps, *suspended] == expected
    assert decode_cache(model)._forwards is forwards  # prepared once


@torch.no_grad()
def change_in_place(model: MTPModel) -> None:
    lora_layers(model.base)[0].lora_B["default"].weight.mul_(3.0)


def change_data(model: MTPModel) -> None:
    for layer in lora_layers(model.base):
        layer.base_layer.weight.data.copy_(torch.randn_like(layer.base_layer.weight))


def change_by_a_fused_optimizer(model: MTPModel) -> None:
    """It changes no version."""
    trained = [layer.lora_B["default"].weight for layer in lora_layers(model.base)]
    for weight in trained:
        weight.grad = torch.ones_like(weight)
    torch.optim.AdamW(trained, lr=1.0, fused=True).step()


def change_scaling(model: MTPModel) -> None:
    for layer in lora_layers(model.base):
        layer.set_scale("default", 3.0)


@pytest.mark.parametrize("change", [change_in_place, change_data, change_by_a_fused_optimizer, change_scaling])
def test_changed_weights_are_noticed(change: Any) -> None:
    model = tiny_model("llama", 3, dtype=torch.float32)
    drafts(model)
    change(model)
    model.base.requires_grad_(False)
    expected = hidden_states(model, 3, 1)
    with torch.inference_mode():
        logits = model.unembed(expected)
        with fused(model):
            found = hidden_states(model, 3, 1)
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(model.unembed(found), logits, rtol=1e-2, atol=1e-2)


def test_a_copied_or_pickled_model_prepares_its_own() -> None:
    model = tiny_model("llama", 3, sampler_head=GRUSamplerHead())
    expected = drafts(model)
    twin = copy.deepcopy(model)
    assert drafts(twin) == expected
    change_data(twin)
    assert drafts(twin) != expected == drafts(model)
    assert pickle.loads(pickle.dumps(decode_cache(model)))._forwards == []


def test_memory_is_freed_also_between_steps() -> None:
    model = tiny_model("llama", 3, sampler_head=GRUSamplerHead())
    expected = drafts(model)
    model.clear_decode_cache()
    assert not decode_cache(model)._forwards
    suspended = start(model)
    first = next(suspended)
    model.clear_decode_cache()
    assert [first, *suspended] == expected == drafts(model)


def test_threads_share_one(monkeypatch: pytest.MonkeyPatch) -> None:
    model, start_together = tiny_model("llama", 3), threading.Barrier(2)
    created = DecodeCache.__init__

    def create_slowly(self: DecodeCache) -> None:
        time.sleep(0.1)
        created(self)

    monkeypatch.setattr(DecodeCache, "__init__", create_slowly)

    def first_use(_: int) -> DecodeCache:
        start_together.wait()
        return decode_cache(model)

    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(first_use, range(2))
    assert one is other


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])  # in bfloat16 layers with one input are joined
def test_the_base_may_be_called_while_another_thread_decodes(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama", 3, sampler_head=GRUSamplerHead(), dtype=dtype)
    ids, found = torch.arange(3, 9)[None], []
    call = torch.no_grad()(lambda: found.append(model.base(ids).logits))
    layer, by_peft = lora_layers(model.base)[-1], []
    as_peft = type(layer).forward
    monkeypatch.setattr(type(layer), "forward", lambda self, *x, **kw: (by_peft.append(self), as_peft(self, *x, **kw))[1])
    expected_drafts = drafts(model)
    call()
    block = model.base.get_decoder().layers[1]
    forward, decoding = block.forward, threading.current_thread()

    def between(*args: Any, **options: Any) -> Any:
        if threading.current_thread() is decoding:  # in the middle of a step
            other = threading.Thread(target=call)
            other.start()
            other.join()
        return forward(*args, **options)

    monkeypatch.setattr(block, "forward", between)
    by_peft.clear()
    assert drafts(model) == expected_drafts and len(found) > 5
    assert by_peft.count(layer) == len(found) - 1  # none by what joined layers share
    for logits in found[1:]:
        # Of bfloat16 the output layer may be packed, which sums in another order: one rounding of logits below 1.
        torch.testing.assert_close(logits, found[0], rtol=0, atol=0 if dtype == torch.float64 else 2**-7)


@torch.inference_mode()
def test_a_model_made_in_inference_mode_decodes() -> None:
    expected = drafts(shared := tiny_model("llama", 3, sampler_head=GRUSamplerHead()))
    with torch.inference_mode(False):
        assert drafts(tiny_model("llama", 3, sampler_head=GRUSamplerHead())) == expected
    assert shared.mask_embeddings.is_inference()


def test_decoding_under_autocast() -> None:
    """Products are bfloat16 there and prepared weights are not; float64 would not be cast at all."""
    one, other = (tiny_model("llama", 3, sampler_head=GRUSamplerHead(), dtype=torch.float32) for _ in range(2))
    expected = drafts(other)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fast = [token for step in drafts(one) for token in step.tokens]
        slow = decode(one, token_row([6]).input_ids, DecodingOptions("autoregressive", max_new_tokens=12))
        assert fast == [token for step in slow for token in step.tokens]
    assert drafts(one) == expected  # prepared weights are not rounded
