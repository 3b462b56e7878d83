# SPDX-License-Identifier: Apache-2.0
"""Sizing: the estimate against what autograd really keeps, operations against a count by the profiler, and advice."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny import tiny_model, token_row
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from transformers import AutoConfig, AutoModelForCausalLM

from mtp_lightning.losses import BaseCrossEntropy, SamplerCrossEntropy
from mtp_lightning.model import MTPModel
from mtp_lightning.modeling.base_source import is_out_of_memory
from mtp_lightning.modeling.gated_lora import LoRA
from mtp_lightning.modeling.masking import BLOCK_MULTIPLE, ROW_MULTIPLE, build_masked_input
from mtp_lightning.sampler_heads import GRUSamplerHead
from mtp_lightning.training.sizing import StepSize, advice, estimate, gigabytes, model_size, step_flops

K, LENGTH, ROWS = 4, 48, 2
_NAMES = ("hidden_size", "num_hidden_layers", "num_attention_heads")
STEP = StepSize(rows=ROWS, length=LENGTH, num_masks=K)


def model_of(dtype: torch.dtype, head: bool = True, **options: Any) -> MTPModel:
    """A Llama wide enough for its tensors to outweigh what does not grow with the width."""
    torch.manual_seed(0)
    settings = {"vocab_size": 128, "hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 3}
    settings |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
    base = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **settings), dtype=dtype)
    model = MTPModel(base, K, LoRA(rank=4, **options), GRUSamplerHead() if head else None)
    return model.train()


def batch() -> Any:
    rows = [token_row([LENGTH], (), row, 0) for row in range(ROWS)]
    return build_masked_input(rows, K, row_multiple=ROW_MULTIPLE, block_multiple=BLOCK_MULTIPLE)


def kept_bytes(model: MTPModel, autocast: bool = False) -> int:
    """Bytes that autograd holds after the decoder's forward pass: each storage once, parameters not counted."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            states = model.hidden_states(batch())
    assert states.mtp.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize(
    ("dtype", "autocast", "gated"),
    [(torch.float32, False, True), (torch.bfloat16, False, False), (torch.bfloat16, True, True)],
)
def test_the_estimate_is_near_what_autograd_keeps(dtype: torch.dtype, autocast: bool, gated: bool) -> None:
    model = model_of(dtype, gated=gated, head=False)
    size = model_size(model)
    found = estimate(size, replace(STEP, autocast=autocast))
    decoder = found.activations - STEP.rows * STEP.mtp * size.hidden * (
        4 * size.element_bytes + 2 * size.trained_element_bytes
    )
    if gated:  # the cache is not part of the graph once it is concatenated
        decoder -= STEP.rows * STEP.ntp * 2 * size.key_width * size.layers * size.element_bytes
    kept = kept_bytes(model, autocast)
    # Small tensors (cosines, norms' scales) are left out; a term that is wrong by a factor of 2 is more than this.
    assert 0.9 < (decoder + found.mask) / kept < 1.1


def test_positions_and_bytes_by_hand() -> None:
    model = model_of(torch.bfloat16)
    size = model_size(model)
    found = estimate(size, StepSize(rows=3, length=10, num_masks=2, block_fraction=0.5))
    assert (found.ntp_positions, found.mtp_positions) == (3 * 32, 3 * 8 * 2)  # 10 tokens and 4 blocks, padded
    assert found.base == 2 * size.base_parameters == 2 * sum(p.numel() for p in model.parameters() if not p.requires_grad)
    assert found.trained == 16 * sum(p.numel() for _, p in model.trained_parameters())
    assert estimate(size, StepSize(3, 10, num_masks=2, max_blocks=1)).mtp_positions == 6
    # A full batch has as many positions as is said.
    real, said = batch(), estimate(size, STEP)
    assert real.input_ids.numel() == said.ntp_positions and real.mtp_labels.numel() == said.mtp_positions
    assert f"up to {said.ntp_positions + said.mtp_positions} positions" in str(said) and str(said).endswith("on each device")
    halved = estimate(size, replace(STEP, shards=2))
    assert halved.base == found.base // 2 and halved.trained == found.trained // 2 and halved.gathered > 0
    assert estimate(size, replace(STEP, shards=2, offloaded=True)).base == 0


def test_checkpointing_and_flex_attention_take_less() -> None:
    size = model_size(model_of(torch.bfloat16))
    plain = estimate(size, replace(STEP, length=4096))
    assert estimate(size, replace(STEP, length=4096, checkpointing=True)).step < 0.6 * plain.step
    assert estimate(size, replace(STEP, length=4096, kernel="flex_attention")).mask == 0
    assert plain.mask > plain.activations  # what full blocks with a dense mask are about


class Operations(TorchDispatchMode):
    """Floating-point operations by torch's own formulas. Its FlopCounterMode can't follow a nested autograd.grad."""

    total = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        result = function(*arguments, **(options or {}))
        formula = flop_registry.get(function._overloadpacket)
        if formula is not None:
            self.total += formula(*arguments, **(options or {}), out_val=result)
        return result


@pytest.mark.parametrize(("gated", "head"), [(True, True), (False, False)])
def test_operations_against_a_count(gated: bool, head: bool) -> None:
    model = model_of(torch.float32, gated=gated, head=head)
    terms = {"base": BaseCrossEntropy()} | ({"sampler": SamplerCrossEntropy()} if head else {})
    with Operations() as counter:
        output = model(batch(), terms)
        sum(sums[0].total for sums in output.sums.values()).backward()
    counted = counter.total
    # The count leaves out labels that the row's end has not, and takes in the keys that a mask hides.
    assert 0.9 < step_flops(model_size(model), STEP) / counted < 1.15


def test_a_mixture_of_experts_counts_the_experts_that_a_token_visits() -> None:
    whole, part = (
        model_size(tiny_model("qwen3_moe", num_experts=4, num_experts_per_tok=n)).active_parameters for n in (4, 1)
    )
    experts = 3 * 32 * 24 * 4 * 2  # three products, width, inner width, experts, layers
    assert whole - part == pytest.approx(experts * 3 / 4, abs=2)


@pytest.mark.parametrize("architecture", ["gpt_neox", "gptj", "falcon"])
def test_configurations_without_grouped_heads(architecture: str) -> None:
    """Every ``mtp fit`` asks for the size: Pythia's configuration names no key heads, GPT-J's layers are called ``h``."""
    names = ("n_embd", "n_layer", "n_head") if architecture == "gptj" else _NAMES
    settings = dict(zip(names, (32, 2, 4), strict=True)) | ({"rotary_dim": 8} if architecture == "gptj" else {})
    base = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, vocab_size=97, **settings))
    size = model_size(model := MTPModel(base, K, LoRA(rank=2)))
    assert (size.layers, size.query_width, size.key_width) == (2, 32, 32)
    in_layers = [
        p.numel() for name, p in base.named_parameters() if (".layers." in name or ".h." in name) and "lora" not in name
    ]
    assert size.active_parameters == sum(in_layers)
    assert estimate(size, STEP).total > 0 and step_flops(size, STEP) > 0
    (total,) = model(batch(), {"base": BaseCrossEntropy()}).sums["base"]
    total.total.backward()
    assert all(p.grad is not None for _, p in model.trained_parameters())


def test_advice_makes_the_step_fit() -> None:
    size = model_size(model_of(torch.bfloat16))
    step = replace(STEP, rows=8, length=128)
    now = estimate(size, step)
    available = now.total - now.step + now.step / 2
    said = advice(size, step, available)
    assert said.startswith("Lower data.batch_size from 8 to 2, or data.block_fraction from 1 to ")
    assert "data.max_length from 128 to " in said
    length = int(said.partition("max_length from 128 to ")[2].rstrip("."))
    for changed in (replace(step, rows=2), replace(step, length=length)):
        assert estimate(size, changed).total <= available
    # An estimate that was too low is not believed: the advice is to lower something all the same.
    assert "Lower data.batch_size from 8 to " in advice(size, step, now.total * 1.5)
    assert advice(size, step, 1e5).startswith("Weights and logits alone take about ")


def test_what_counts_as_out_of_memory() -> None:
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory")) and is_out_of_memory(MemoryError())
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**55, dtype=torch.uint8)
    assert is_out_of_memory(caught.value) and not is_out_of_memory(RuntimeError("other"))
    assert [gigabytes(n) for n in (12_345_000_000, 2_000_000)] == ["12.3 GB", "2.0 MB"]
