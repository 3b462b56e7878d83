# SPDX-License-Identifier: Apache-2.0
"""The gate: base bits at NTP positions, the LoRA update at MTP positions, nothing else."""

from __future__ import annotations

import contextlib
import importlib.util
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from tiny import ARCHITECTURES, EXPERTS, FEW, in_one_pass, tiny_base, tiny_batch, tiny_model
from torch import Tensor
from transformers import AutoModelForCausalLM, OPTConfig

from mtp_lightning.errors import UsageError
from mtp_lightning.losses import BaseCrossEntropy, term_value
from mtp_lightning.model import MTPModel
from mtp_lightning.modeling.base import load_base
from mtp_lightning.modeling.gated_lora import Gate, LoRA, adapted_layers
from mtp_lightning.modeling.peft_private import lora_layers
from mtp_lightning.modeling.transformers_private import enable_checkpointing
from mtp_lightning.types import HiddenStates, MaskedInput


def closed_states(model: MTPModel, batch: MaskedInput) -> HiddenStates:
    """The same forward pass with no position in the gate."""
    model.gate.over_last = lambda num_mtp: Gate.over_last(model.gate, 0)  # type: ignore[method-assign]
    try:
        return model.hidden_states(batch)
    finally:
        del model.gate.over_last


def decoder_states(model: MTPModel, num_mtp: int, seed: int = 0) -> Tensor:
    """Hidden states of two rows of 9 random inputs, the last ``num_mtp`` of each in the gate."""
    inputs = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    with model.gate.over_last(num_mtp):
        return model.base.get_decoder()(inputs_embeds=inputs, use_cache=False).last_hidden_state


def loss(model: MTPModel) -> Tensor:
    batch = tiny_batch(model.num_masks)
    return term_value(model(batch, {"base": BaseCrossEntropy()}).sums["base"], batch.counts)


def gradients(model: MTPModel) -> dict[str, Tensor]:
    named = dict(model.trained_parameters())
    return dict(zip(named, torch.autograd.grad(loss(model), list(named.values())), strict=True))


PRECISIONS = {
    "float32": (torch.float32, contextlib.nullcontext),
    "bfloat16": (torch.bfloat16, contextlib.nullcontext),
    "autocast": (torch.float32, lambda: torch.autocast("cpu", torch.bfloat16)),
}
CASES = [(a, "float32") for a in ARCHITECTURES] + [(a, precision) for a in FEW for precision in ("bfloat16", "autocast")]


@pytest.mark.parametrize(("architecture", "precision"), CASES)
@torch.no_grad()
def test_ntp_positions_keep_the_bits_of_the_base(architecture: str, precision: str) -> None:
    dtype, context = PRECISIONS[precision]
    model, batch = in_one_pass(tiny_model(architecture, dtype=dtype)), tiny_batch()
    with context():
        adapted, plain = model.hidden_states(batch), closed_states(model, batch)
    if architecture in EXPERTS:
        # Experts multiply the rows of all positions in one product, and its kernel may depend on how many there are.
        # float32: a few units in the last place of values near 1; bfloat16 has 8 bits.
        tolerance = 1e-5 if precision == "float32" else 5e-2
        torch.testing.assert_close(adapted.ntp, plain.ntp, rtol=0, atol=tolerance)
    else:
        assert torch.equal(adapted.ntp, plain.ntp)
    assert (adapted.mtp - plain.mtp).abs().mean() > 0.1  # the adapters do act


@pytest.mark.parametrize("passes", [1, 2])
@torch.no_grad()
def test_ntp_states_do_not_depend_on_the_masks(passes: int) -> None:
    """Other mask embeddings, the same bits; through attention too."""
    model, batch = tiny_model("gemma3", dtype=torch.float32), tiny_batch()
    if passes == 1:
        in_one_pass(model)
    before = model.hidden_states(batch)
    model.mask_embeddings.mul_(-3)
    after = model.hidden_states(batch)
    assert torch.equal(before.ntp, after.ntp) and not torch.allclose(before.mtp, after.mtp)


@pytest.mark.parametrize("architecture", FEW)
def test_no_gradient_flows_through_ntp_positions(architecture: str) -> None:
    model = tiny_model(architecture)
    weights = [p for layer in lora_layers(model.base) for p in layer.parameters() if p.requires_grad]
    grads = torch.autograd.grad(decoder_states(model, 3)[:, :6].square().sum(), weights, allow_unused=True)
    assert all(g is None or not g.any() for g in grads)
    grads = torch.autograd.grad(decoder_states(model, 4)[:, :6].square().sum(), weights)  # position 5 is now in the gate
    assert all(g.any() for g in grads)


def test_one_layer_is_the_formula() -> None:
    model = tiny_model(lora=LoRA(rank=4, alpha=3.0))
    layer = lora_layers(model.base)[0]
    weight, a, b = layer.base_layer.weight, layer.lora_A["default"].weight, layer.lora_B["default"].weight
    x = torch.randn(2, 7, 32, dtype=torch.float64)
    with model.gate.over_last(3):
        y = layer(x)
    assert torch.equal(y[:, :4], layer.base_layer(x)[:, :4])
    # Float64: sums of 32 products in another order.
    torch.testing.assert_close(y[:, 4:], x[:, 4:] @ (weight + 3.0 / 4 * b @ a).T, rtol=0, atol=1e-12)
    assert a.shape == (4, 32) and LoRA(rank=4).alpha is None
    assert lora_layers(tiny_model(lora=LoRA(rank=4)).base)[0].scaling["default"] == 2.0  # alpha is 2 * rank by default


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "phi3"])
@torch.no_grad()
def test_an_open_gate_is_the_standard_lora_of_peft(architecture: str) -> None:
    model, batch = tiny_model(architecture, lora=LoRA(rank=4, alpha=3.0, gated=False)), tiny_batch()
    ours = model.hidden_states(batch)

    stock_base = tiny_base(architecture)
    config = LoraConfig(r=4, lora_alpha=3, target_modules="all-linear", task_type="CAUSAL_LM")
    inject_adapter_in_model(config, stock_base)
    stock = MTPModel(tiny_base(architecture), 3, LoRA(rank=4, gated=False))
    stock.base, stock.mask_embeddings = stock_base, model.mask_embeddings
    stock_base.load_state_dict(model.base.state_dict())
    assert all(not layer.lora_variant for layer in lora_layers(stock_base))
    theirs = stock.hidden_states(batch)
    # The same operations but for the slice of all positions: only products of other shapes may round otherwise.
    for mine, other in zip(ours[:2], theirs[:2], strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-12)

    assert (ours.ntp - closed_states(model, batch).ntp).abs().mean() > 0.05


def test_outside_a_forward_pass_the_gate_is_closed() -> None:
    model, ids = tiny_model(), tiny_batch().input_ids
    model.hidden_states(tiny_batch())
    with pytest.raises(ZeroDivisionError), model.gate.over_last(2):
        raise ZeroDivisionError
    assert model.gate.num_mtp is None
    with torch.no_grad():
        assert torch.equal(model.base(ids).logits, tiny_base()(ids).logits)
    with pytest.raises(RuntimeError, match="no gate"):
        model.train().base(ids)


@pytest.mark.parametrize("architecture", ["llama", "qwen3_moe"])
def test_gradient_checkpointing_gives_the_same_gradients(architecture: str) -> None:
    model = in_one_pass(tiny_model(architecture)).train()
    expected = gradients(model)
    model.enable_gradient_checkpointing()
    runs = []
    layer = model.base.get_decoder().layers[0].self_attn
    layer.register_forward_pre_hook(lambda *_: runs.append(None))
    recomputed = gradients(model)
    assert len(runs) == 2  # forward, and once more in the backward pass
    for name, grad in expected.items():
        assert grad.any(), name
        # The same float64 operations twice; sums over positions may come in another order.
        torch.testing.assert_close(recomputed[name], grad, rtol=1e-12, atol=1e-12)


def test_gradient_checkpointing_keeps_the_gate_of_each_forward_pass() -> None:
    """Two forward passes with other numbers of masks before one backward pass."""
    model = tiny_model().train()

    def both() -> Tensor:
        return decoder_states(model, 2, 0).square().sum() + decoder_states(model, 5, 1).square().sum()

    weights = [p for _, p in model.trained_parameters() if p is not model.mask_embeddings]
    expected = torch.autograd.grad(both(), weights)
    model.enable_gradient_checkpointing()
    for recomputed, grad in zip(torch.autograd.grad(both(), weights), expected, strict=True):
        torch.testing.assert_close(recomputed, grad, rtol=1e-12, atol=1e-12)  # as above


@pytest.mark.parametrize("gated", [True, False])
def test_other_gradient_checkpointing_is_refused(gated: bool) -> None:
    model = tiny_model(lora=LoRA(rank=4, gated=gated)).train()
    enable_checkpointing(model.base, {"use_reentrant": False})
    with pytest.raises(UsageError, match="enable_gradient_checkpointing"):
        loss(model)


def test_dropout_acts_in_training_only_and_only_on_the_adapter() -> None:
    torch.manual_seed(0)
    model, batch = tiny_model(lora=LoRA(rank=4, dropout=0.5)), tiny_batch()
    calm = model.hidden_states(batch)
    assert torch.equal(model.hidden_states(batch).mtp, calm.mtp)
    model.train()
    noisy = model.hidden_states(batch)
    assert torch.equal(noisy.ntp, calm.ntp) and not torch.allclose(noisy.mtp, calm.mtp)


def test_a_layer_with_flattened_input_is_named() -> None:
    config = OPTConfig(hidden_size=32, num_hidden_layers=1, ffn_dim=16, num_attention_heads=1, word_embed_proj_dim=32)
    model = MTPModel(AutoModelForCausalLM.from_config(config), 1, LoRA(rank=1))
    with pytest.raises(UsageError, match=r"target_modules: model\.decoder\.layers\.0\.fc1 "):
        model(tiny_batch(num_masks=1))


def test_merging_is_refused() -> None:
    with pytest.raises(UsageError, match="cannot be merged"):
        lora_layers(tiny_model().base)[0].merge()


def test_targets() -> None:
    def adapted(architecture: str, lora: LoRA) -> list[str]:
        return adapted_layers(tiny_base(architecture).config, lora)

    with pytest.raises(UsageError, match="model.lora.target_modules"):
        adapted("llama", LoRA(target_modules=["nothing"]))
    names = adapted("llama", LoRA())
    assert len(names) == 2 * 7 and not any("lm_head" in name for name in names)  # q, k, v, o, gate, up, down of 2 layers
    assert len(adapted("qwen3_moe", LoRA())) == 2 * 4  # only the attention: no router, no expert
    assert len(adapted("llama", LoRA(target_modules=["q_proj"]))) == 2


@pytest.mark.parametrize("options", [{"rank": 0}, {"dropout": 1.0}, {"alpha": 0.0}])
def test_wrong_settings_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=f"lora.{next(iter(options))}"):
        LoRA(**options)  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "passes"), [("eager", 1), ("eager", 2), ("inductor", 2)])
@torch.no_grad()
def test_the_decoder_compiles_without_a_graph_break(backend: str, passes: int) -> None:
    torch._dynamo.reset()
    model, batch = tiny_model(dtype=torch.float32, num_hidden_layers=1), tiny_batch()
    if passes == 1:
        in_one_pass(model)
    expected = model.hidden_states(batch)
    compiled = torch.compile(model.base.get_decoder(), fullgraph=True, backend=backend)
    model.base.get_decoder = lambda: compiled
    states = model.hidden_states(batch)
    # Float32: a compiled kernel sums in another order.
    torch.testing.assert_close(states.mtp, expected.mtp, rtol=0, atol=1e-4)
    torch.testing.assert_close(states.ntp, expected.ntp, rtol=0, atol=1e-4)
    with torch._dynamo.config.patch(error_on_recompile=True):
        model.hidden_states(tiny_batch(seed=1))
    if backend == "eager":
        assert torch.equal(closed_states(model, batch).ntp, states.ntp)
    torch._dynamo.reset()


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
def test_a_quantized_base(quantization: str, tmp_path: Path) -> None:
    # 64: the quantization's block size.
    plain = tiny_base(dtype=torch.bfloat16, hidden_size=64, intermediate_size=128, head_dim=16)
    plain.save_pretrained(tmp_path)
    base = load_base(str(tmp_path), dtype="bfloat16", quantization=quantization)
    model, batch = tiny_model(base=base), tiny_batch()
    assert type(lora_layers(base)[0].base_layer).__name__ == {"4bit": "Linear4bit", "8bit": "Linear8bitLt"}[quantization]
    model.train()
    # Before any evaluation: on the CPU a forward pass without gradient makes later gradients None.
    term_value(model(batch, {"base": BaseCrossEntropy()}).sums["base"], batch.counts).backward()
    for name, p in model.trained_parameters():
        assert p.grad is not None and p.grad.any() and p.grad.isfinite().all(), name
    model.eval()
    with torch.no_grad():
        adapted, closed = model.hidden_states(batch), closed_states(model, batch)
    assert torch.equal(adapted.ntp, closed.ntp)
    assert (adapted.mtp - closed.mtp).abs().mean() > 0.1
