# SPDX-License-Identifier: Apache-2.0
"""The masked forward pass against the paper's separate prompts, each run alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tiny import (
    ARCHITECTURES,
    CONTEXT,
    FEW,
    in_one_pass,
    naive_states,
    tiny_base,
    tiny_batch,
    tiny_model,
    tiny_rows,
    token_row,
    tolerance,
)

from mtp_lightning.errors import UsageError
from mtp_lightning.losses import BaseCrossEntropy, LatentConsistency, SamplerCrossEntropy
from mtp_lightning.model import MTPModel
from mtp_lightning.modeling.decoder import context_length
from mtp_lightning.modeling.gated_lora import LoRA
from mtp_lightning.modeling.masking import build_masked_input
from mtp_lightning.modeling.peft_private import lora_layers
from mtp_lightning.sampler_heads import GRUSamplerHead, MLPSamplerHead, SamplerHead

# transformers refuses SDPA for Gemma 2's soft-capped attention.
CASES = [(a, "eager" if a == "gemma2" else "sdpa", 8, 2) for a in ARCHITECTURES]
CASES += [(a, kernel, 3, passes) for a in FEW for kernel, passes in (("sdpa", 1), ("eager", 1), ("eager", 2))]


@pytest.mark.parametrize(("architecture", "kernel", "num_masks", "passes"), CASES)
@torch.no_grad()
def test_masked_input_equals_separate_prompts(architecture: str, kernel: str, num_masks: int, passes: int) -> None:
    model = tiny_model(architecture, num_masks, attn_implementation=kernel)
    base_decoder = tiny_base(architecture, attn_implementation=kernel).get_decoder()  # has no adapters
    batch, bounds, num_blocks = tiny_batch(num_masks), tolerance(model.base), 0
    states = (in_one_pass(model) if passes == 1 else model).hidden_states(batch)
    for r, row in enumerate(tiny_rows()):
        for document in row.document_ids.unique():
            inside = (row.document_ids == document).nonzero().flatten().tolist()
            tokens = row.input_ids[inside]
            expected = base_decoder(tokens[None], use_cache=False).last_hidden_state[0]
            torch.testing.assert_close(states.ntp[r, inside], expected, **bounds)
            for p, start in enumerate(batch.starts[r].tolist()):
                if start in inside:
                    _, masks = naive_states(model, tokens[: inside.index(start) + 1], num_masks)
                    torch.testing.assert_close(states.mtp[r, p], masks, **bounds)
                    num_blocks += 1
    assert num_blocks == 9 + (3 + 0 + 2) + 1 + 0 + 10  # by hand: starts with a label, document by document


@pytest.mark.parametrize("architecture", FEW)
def test_one_pass_and_two_passes_give_the_same_states_and_gradients(architecture: str) -> None:
    """With a gate, NTP positions run without gradient before MTP positions, over a cache; together they must not differ."""
    batch, results = tiny_batch(), []
    for model in (tiny_model(architecture), in_one_pass(tiny_model(architecture))):
        states = model.hidden_states(batch)
        weights = [p for _, p in model.trained_parameters()]
        grads = torch.autograd.grad(states.mtp[batch.starts >= 0].square().sum(), weights)
        results.append([states.ntp, states.mtp, *grads])
    for two, one in zip(*results, strict=True):
        torch.testing.assert_close(two, one, **tolerance(model.base))


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
@pytest.mark.parametrize("passes", [1, 2])
@torch.no_grad()
def test_flex_attention_equals_sdpa(architecture: str, passes: int) -> None:
    torch._dynamo.reset()
    flex, sdpa = (
        tiny_model(architecture, dtype=torch.float32, attn_implementation=kernel, head_dim=16)
        for kernel in ("flex_attention", "sdpa")
    )
    batch = tiny_batch()
    states, expected = (in_one_pass(flex) if passes == 1 else flex).hidden_states(batch), sdpa.hidden_states(batch)
    # Float32 through the layers; the kernel sums block by block.
    for name, is_real in (("mtp", batch.starts >= 0), ("ntp", batch.document_ids >= 0)):
        torch.testing.assert_close(getattr(states, name)[is_real], getattr(expected, name)[is_real], rtol=0, atol=1e-4)


@torch.no_grad()
def test_a_document_does_not_see_its_neighbours_in_the_row() -> None:
    """Other tokens in the first document: the same bits in the second, at NTP and MTP positions."""
    model, row = tiny_model(), token_row([4, 6])
    other = row._replace(input_ids=torch.cat([row.input_ids[:4].flip(0), row.input_ids[4:]]))
    one, two = (model.hidden_states(build_masked_input([r], 3)) for r in (row, other))
    starts = build_masked_input([row], 3).starts[0]
    assert torch.equal(one.ntp[0, 4:], two.ntp[0, 4:]) and torch.equal(one.mtp[0, starts >= 4], two.mtp[0, starts >= 4])
    assert not torch.allclose(one.mtp[0, starts < 4], two.mtp[0, starts < 4])


def test_a_batch_without_any_block_runs_and_trains_to_zero() -> None:
    model = tiny_model(sampler_head=MLPSamplerHead())
    batch = build_masked_input([token_row([2])], 3)
    assert batch.starts.tolist() == [[-1]]
    sums = model(batch, {"base": BaseCrossEntropy(), "sampler": SamplerCrossEntropy(), "lcm": LatentConsistency()}).sums
    total = torch.stack([s.total for name in sums for s in sums[name]]).sum()
    assert total == 0
    for name, p in model.trained_parameters():  # every parameter takes part: no rank waits for another
        grad = torch.autograd.grad(total, p, retain_graph=True)[0]
        assert not grad.any() and grad.isfinite().all(), name


def test_the_first_masks_of_each_block_give_the_states_that_they_have_with_all() -> None:
    model, batch = tiny_model(num_masks=3), tiny_batch(3)
    few = batch.first_masks(2)
    states, expected = model.hidden_states(few), model.hidden_states(batch)
    torch.testing.assert_close(states.mtp, expected.mtp[:, :, :2], **tolerance(model.base))
    assert torch.equal(few.block_weights, batch.block_weights * 1.5)
    value = LatentConsistency()(states, few, model.unembed)[0].total
    anchors = batch.at_anchors(expected.ntp)[:, :, :2]
    distance = (anchors - expected.mtp[:, :, :2]).square().mean(-1)
    torch.testing.assert_close(value, (distance * batch.anchor_weights[:, :, :2] * few.block_weights[:, :, None]).sum())


def test_a_wrong_number_of_masks_is_refused() -> None:
    with pytest.raises(UsageError, match="3 masks in a block"):
        tiny_model(num_masks=2).hidden_states(tiny_batch(3))
    with pytest.raises(UsageError, match="num_masks"):
        MTPModel(tiny_base(), 0)


def test_a_base_with_a_state_that_masks_would_disturb_is_refused() -> None:
    base = tiny_base("qwen3")
    base.config.layer_types = ["linear_attention", "full_attention"]
    with pytest.raises(UsageError, match="linear_attention"):
        MTPModel(base)


@pytest.mark.parametrize("architecture", [*FEW, "gemma2"])
@torch.no_grad()
def test_embedding_and_unembedding_are_those_of_the_base(architecture: str) -> None:
    model, ids = tiny_model(architecture), tiny_batch().input_ids
    hidden, logits = model.base.get_decoder()(ids).last_hidden_state, model.base(ids).logits
    assert torch.equal(model.base.get_decoder()(inputs_embeds=model.embed(ids)).last_hidden_state, hidden)
    assert torch.equal(model.unembed(hidden), logits)
    assert model.unembed.vocab_size == logits.shape[-1] and model.context == CONTEXT


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])  # Gemma scales its embeddings by sqrt(D)
def test_mask_embeddings_start_at_the_scale_that_the_decoder_sees(architecture: str) -> None:
    model = MTPModel(tiny_base(architecture), 64)
    # 64 x 32 normal numbers: their standard deviation is within 1.6 % of the true one; this is three times that.
    assert abs(model.mask_embeddings.std() / model.embed(torch.arange(97)).std() - 1) < 0.05


@pytest.mark.parametrize("make_head", [MLPSamplerHead, lambda: GRUSamplerHead(hidden_size=20, read_hidden=True)])
@torch.no_grad()
def test_sampler_states_are_the_head_on_the_true_previous_tokens(make_head: Callable[[], SamplerHead]) -> None:
    model, rows, batch = tiny_model("gemma3", sampler_head=make_head()), tiny_rows(), tiny_batch()
    states, head = model.hidden_states(batch), model.sampler_head
    assert states.sampler is not None and head is not None
    num_compared = 0
    for r, row in enumerate(rows):
        for p, start in enumerate(batch.starts[r].tolist()):
            memory, last = None, len(row.input_ids) - 1  # past the end there is no previous token
            for j in range(1, 1 + min(3, last - start) if start >= 0 else 1):
                embedded = model.embed(row.input_ids[start + j])[None]
                output, memory = head.step(states.mtp[r, p, j - 1][None], embedded, memory)
                # Float64: products of other shapes.
                torch.testing.assert_close(states.sampler[r, p, j - 1], output[0], rtol=0, atol=1e-11)
                num_compared += 1
    assert num_compared > 60
    assert (states.sampler_ntp is not None) == head.at_ntp
    if states.sampler_ntp is not None:
        torch.testing.assert_close(states.sampler_ntp, head(states.ntp, model.embed(batch.input_ids)), rtol=0, atol=1e-12)


def test_what_is_trained_is_float32_on_a_half_precision_base() -> None:
    model = tiny_model(dtype=torch.bfloat16, sampler_head=GRUSamplerHead(), lora=LoRA(rank=2))
    trained = dict(model.trained_parameters())
    assert {p.dtype for p in trained.values()} == {torch.float32}
    assert sum("lora_" in name for name in trained) == 2 * len(lora_layers(model.base))
    assert {name.split(".")[0] for name in trained if "lora_" not in name} == {"mask_embeddings", "sampler_head"}
    states = model.hidden_states(tiny_batch())
    assert states.sampler is not None and states.sampler.dtype == states.mtp.dtype == torch.bfloat16


def test_the_context_ends_where_rope_changes() -> None:
    config = tiny_model("phi3").base.config
    full = config.max_position_embeddings
    assert context_length(config) == full
    config.rope_parameters = {"rope_type": "longrope", "original_max_position_embeddings": full // 2}
    assert context_length(config) == full // 2
