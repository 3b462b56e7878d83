# SPDX-License-Identifier: Apache-2.0
"""The parts that transformers_private.py relies on: each test fails if transformers or accelerate changes it."""

from __future__ import annotations

import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from tiny import tiny_base
from torch import nn
from transformers import DynamicCache, RwkvConfig, RwkvForCausalLM

from mtp_lightning.modeling import transformers_private as private


def test_the_attention_kernel_is_read_and_switched() -> None:
    base, calls = tiny_base(), []

    def counting(*args: object, **kwargs: object) -> object:
        calls.append(args)
        return private.sdpa_attention()(*args, **kwargs)

    private.register_attention("counting_sdpa", counting)
    assert private.attention_kernel(base) == "sdpa", "config._attn_implementation has moved"
    assert private.can_switch_attention(type(base)), "_can_set_attn_implementation has moved"
    ids = torch.arange(5)[None]
    expected = base(ids).logits
    with private.SwitchedAttention(base, "counting_sdpa"):
        assert private.attention_kernel(base) == "counting_sdpa", "config._attn_implementation_internal has moved"
        assert torch.equal(base(ids).logits, expected)
    assert len(calls) == 2, "the decoder does not look up its attention function by name"  # one per layer
    assert private.attention_kernel(base) == "sdpa"


def test_a_kernel_that_is_set_meanwhile_is_kept() -> None:
    base = tiny_base()
    with private.SwitchedAttention(base, "sdpa"):
        base.set_attn_implementation("eager")
    assert private.attention_kernel(base) == "eager"


def test_recurrent_models_are_marked() -> None:
    assert not private.is_stateful(tiny_base())
    recurrent = RwkvForCausalLM(RwkvConfig(vocab_size=7, hidden_size=8, num_hidden_layers=2, attention_hidden_size=8))
    assert private.is_stateful(recurrent), "_is_stateful has moved: recurrent bases are no longer refused"


def test_the_cache_argument() -> None:
    decoder, cache = tiny_base().get_decoder(), DynamicCache()
    decoder(torch.arange(3)[None], **{private.cache_keyword(type(decoder)): cache})
    assert cache.get_seq_length() == 3, "the decoder's cache argument has another name"


def test_the_options_of_gradient_checkpointing_are_read() -> None:
    base = tiny_base()
    assert private.checkpointing_options(base) == []
    options = {"use_reentrant": False, "determinism_check": "none"}
    private.enable_checkpointing(base, options)
    found = private.checkpointing_options(base)
    assert found and all(options.items() <= each.items() for each in found), "_gradient_checkpointing_func has moved"


def test_offload_hooks_are_found() -> None:
    module = nn.Linear(2, 2)
    assert private.offload_hook(module) is None
    add_hook_to_module(module, AlignDevicesHook(execution_device="cpu"))
    assert private.offload_hook(module).execution_device == "cpu", "accelerate keeps its hooks elsewhere"
