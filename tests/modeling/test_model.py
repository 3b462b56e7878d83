# SPDX-License-Identifier: Apache-2.0
"""The masked forward pass against the paper's separate prompts, and the sampler heads against their step-wise form."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from tiny import (
    ARCHITECTURES,
    CONTEXT,
    in_one_pass,
    naive_states,
    tiny_base,
    tiny_batch,
    tiny_model,
    tiny_rows,
    token_row,
    tolerance,
)
from torch import Tensor

from mtp_lightning.errors import UsageError
from mtp_lightning.losses import BaseCrossEntropy, LatentConsistency, SamplerCrossEntropy
from mtp_lightning.model import MTPModel
from mtp_lightning.modeling.decoder import check_layer_types
from mtp_lightning.modeling.gated_lora import LoRA
from mtp_lightning.modeling.masking import build_masked_input
from mtp_lightning.sampler_heads import GRUSamplerHead, MLPSamplerHead, SamplerHead
from mtp_lightning.types import MaskedInput, TokenRow

HEADS: dict[str, Callable[[], SamplerHead]] = {
    "mlp": MLPSamplerHead,
    "gru": GRUSamplerHead,
    "gru-wide": lambda: GRUSamplerHead(hidden_size=40),
    "gru-hidden": lambda: GRUSamplerHead(hidden_size=20, read_hidden=True),
}
# Transformers refuses SDPA for Gemma 2's soft-capped attention.
KERNELS = [(a, k) for a in ARCHITECTURES for k in ("sdpa", "eager") if (a, k) != ("gemma2", "sdpa")]


@torch.no_grad()
def assert_equals_separate_prompts(
    model: MTPModel, rows: list[TokenRow], batch: MaskedInput, plain: torch.nn.Module, bounds: dict[str, float]
) -> int:
    """Every state of the batch equals that of its own prompt, run alone; ``plain`` is a decoder without adapters.

    Gives the number of blocks compared.
    """
    states, blocks = model.hidden_states(batch), 0
    for r, row in enumerate(rows):
        for document in row.document_ids.unique():
            inside = (row.document_ids == document).nonzero().flatten().tolist()
            tokens = row.input_ids[inside]
            alone = plain(tokens[None], use_cache=False).last_hidden_state[0]
            torch.testing.assert_close(states.ntp[r, inside], alone, **bounds)
            for p, start in enumerate(batch.starts[r].tolist()):
                if start in inside:
                    _, masks = naive_states(model, tokens[: inside.index(start) + 1], model.num_masks)
                    torch.testing.assert_close(states.mtp[r, p], masks, **bounds)
                    blocks += 1
    return blocks


@pytest.mark.parametrize(("num_masks", "passes"), [(3, 1), (3, 2), (8, 2)])
@pytest.mark.parametrize(("architecture", "kernel"), KERNELS)
def test_masked_input_equals_separate_prompts(architecture: str, kernel: str, num_masks: int, passes: int) -> None:
    model = tiny_model(architecture, num_masks, attn_implementation=kernel)
    if passes == 1:
        in_one_pass(model)
    plain = tiny_base(architecture, attn_implementation=kernel).get_decoder()
    blocks = assert_equals_separate_prompts(model, tiny_rows(), tiny_batch(num_masks), plain, tolerance(model.base))
    assert blocks == 9 + (3 + 0 + 2) + 1 + 0 + 10  # by hand: starts with a label, document by document


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
@pytest.mark.parametrize("passes", [1, 2])
def test_flex_attention_equals_separate_prompts(architecture: str, passes: int) -> None:
    torch._dynamo.reset()
    model = tiny_model(architecture, dtype=torch.float32, attn_implementation="flex_attention", head_dim=16)
    if passes == 1:
        in_one_pass(model)
    oracle = tiny_model(architecture, dtype=torch.float32, attn_implementation="sdpa", head_dim=16)
    with torch.no_grad():
        found, expected = model.hidden_states(tiny_batch()), oracle.hidden_states(tiny_batch())
    real = tiny_batch().starts >= 0
    # Float32 through the layers; the kernel sums block by block.
    torch.testing.assert_close(found.mtp[real], expected.mtp[real], rtol=0, atol=1e-4)
    real = tiny_batch().document_ids >= 0
    torch.testing.assert_close(found.ntp[real], expected.ntp[real], rtol=0, atol=1e-4)


def test_a_document_does_not_see_its_neighbours_in_the_row() -> None:
    """Other tokens in the first document: the same bits in the second, at NTP and MTP positions."""
    model = tiny_model()
    row = token_row([4, 6])
    other = row._replace(input_ids=torch.cat([row.input_ids[:4].flip(0), row.input_ids[4:]]))
    with torch.no_grad():
        one, two = (model.hidden_states(build_masked_input([r], 3)) for r in (row, other))
    starts = build_masked_input([row], 3).starts[0]
    assert torch.equal(one.ntp[0, 4:], two.ntp[0, 4:]) and torch.equal(one.mtp[0, starts >= 4], two.mtp[0, starts >= 4])
    assert not torch.allclose(one.mtp[0, starts < 4], two.mtp[0, starts < 4])


def test_padding_changes_nothing() -> None:
    model, row = tiny_model("gemma3"), token_row([9])
    with torch.no_grad():
        alone, padded = (model.hidden_states(build_masked_input([row], 3, pad_to_multiple_of=m)) for m in (1, 16))
    torch.testing.assert_close(padded.ntp[:, :9], alone.ntp, rtol=0, atol=1e-9)  # products of other shapes round otherwise
    torch.testing.assert_close(padded.mtp, alone.mtp, rtol=0, atol=1e-9)


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


def test_a_batch_with_another_number_of_masks_is_refused() -> None:
    with pytest.raises(UsageError, match="the batch has 2 masks in a block, and the model has 3"):
        tiny_model(num_masks=3).hidden_states(tiny_batch(2))
    with pytest.raises(UsageError, match="num_masks must be 1 or more, got 0"):
        MTPModel(tiny_base(), 0)


def test_a_base_with_a_state_that_masks_would_disturb_is_refused() -> None:
    base = tiny_base("qwen3")
    check_layer_types(base.config)
    base.config.layer_types = ["linear_attention", "full_attention"]
    with pytest.raises(UsageError, match="has linear_attention"):
        check_layer_types(base.config)
    with pytest.raises(UsageError, match="has linear_attention"):
        MTPModel(base)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_unembedding_and_embedding_are_the_bases(architecture: str) -> None:
    model, ids = tiny_model(architecture), tiny_batch().input_ids
    hidden = model.base.get_decoder()(ids).last_hidden_state
    assert torch.equal(model.unembed(hidden), model.base(ids).logits)
    by_embedding = model.base.get_decoder()(inputs_embeds=model.embed(ids)).last_hidden_state
    assert torch.equal(by_embedding, hidden)
    assert model.unembed.vocab_size == model.base(ids).logits.shape[-1] and model.context == CONTEXT


def test_mask_embeddings_start_at_the_scale_that_the_decoder_sees() -> None:
    for architecture in ("llama", "gemma3"):  # Gemma scales its embeddings by sqrt(D)
        model = MTPModel(tiny_base(architecture), 64)
        seen = model.embed(torch.arange(97))
        # 64 x 32 normal numbers: their standard deviation is within 1.6 % of the true one; this is three times that.
        assert abs(model.mask_embeddings.std() / seen.std() - 1) < 0.05


@pytest.mark.parametrize("head", HEADS)
@torch.no_grad()
def test_sampler_head_step_by_step_equals_forward(head: str) -> None:
    torch.manual_seed(0)
    module = HEADS[head]()
    module.build(32)
    module.double()
    for p in module.parameters():
        p.add_(0.2 * torch.randn_like(p))
    hidden, previous = torch.randn(2, 5, 7, 32, dtype=torch.float64)
    together = module(hidden, previous)
    state = None
    for j in range(7):
        output, state = module.step(hidden[:, j], previous[:, j], state)
        # Float64: one product of 7 rows against seven of 1.
        torch.testing.assert_close(output, together[:, j], rtol=0, atol=1e-12)
    # Position j reads what stands at 1..j, and nothing after it.
    changed = module(torch.cat([hidden[:, :4], -hidden[:, 4:]], 1), torch.cat([previous[:, :4], -previous[:, 4:]], 1))
    assert torch.equal(changed[:, :4], together[:, :4]) and not torch.allclose(changed[:, 4:], together[:, 4:])


@pytest.mark.parametrize("head", HEADS)
@torch.no_grad()
def test_only_a_gru_head_remembers(head: str) -> None:
    torch.manual_seed(0)
    module = HEADS[head]()
    module.build(32)
    for p in module.parameters():
        p.add_(0.2 * torch.randn_like(p))
    hidden, previous = torch.randn(2, 1, 3, 32)
    changed = previous.clone()
    changed[:, 0] *= -1
    assert torch.allclose(module(hidden, changed)[:, 2], module(hidden, previous)[:, 2]) == (head == "mlp")


@torch.no_grad()
def test_mlp_head_is_the_papers_formula() -> None:
    head = MLPSamplerHead()
    head.build(16)
    head.double()
    z, e = torch.randn(2, 4, 16, dtype=torch.float64)
    first, norm1, second, norm2 = (head.layers[i] for i in (0, 2, 3, 5))
    assert (first.in_features, first.out_features, second.in_features, second.out_features) == (32, 16, 16, 16)

    def norm(x: Tensor, layer: torch.nn.LayerNorm) -> Tensor:
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
        return x * layer.weight + layer.bias

    u = torch.cat([e, z], -1) @ first.weight.T + first.bias
    u = norm(u * u.sigmoid(), norm1) @ second.weight.T + second.bias
    torch.testing.assert_close(head(z, e), norm(u * u.sigmoid(), norm2), rtol=0, atol=1e-12)  # float64 rounding


@torch.no_grad()
def test_gru_head_is_its_formula_and_starts_as_the_base_head() -> None:
    head = GRUSamplerHead(hidden_size=20)
    head.build(16)
    z, e = torch.randn(2, 1, 3, 16)
    assert torch.equal(head(z, e), z)
    torch.nn.init.normal_(head.output.weight)
    s = torch.zeros(20)
    for j in range(3):
        r, u, n = (e[0, j] @ head.gru.weight_ih_l0.T + head.gru.bias_ih_l0).chunk(3)
        hr, hu, hn = (s @ head.gru.weight_hh_l0.T + head.gru.bias_hh_l0).chunk(3)
        r, u = (r + hr).sigmoid(), (u + hu).sigmoid()
        s = (1 - u) * (n + r * hn).tanh() + u * s
        v = F.layer_norm(F.silu(torch.cat([s, z[0, j]]) @ head.first.weight.T + head.first.bias), (20,))
        v = v + F.layer_norm(F.silu(v @ head.second.weight.T + head.second.bias), (20,))
        # Float32, a dozen operations on values near 1.
        torch.testing.assert_close(head(z, e)[0, j], z[0, j] + v @ head.output.weight.T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("head", HEADS)
@torch.no_grad()
def test_sampler_output_is_the_head_on_the_true_previous_tokens(head: str) -> None:
    model, rows = tiny_model("gemma3", sampler_head=HEADS[head]()), tiny_rows()
    batch = tiny_batch()
    states = model.hidden_states(batch)
    assert states.sampler is not None and model.sampler_head is not None
    compared = 0
    for r, row in enumerate(rows):
        for p, start in enumerate(batch.starts[r].tolist()):
            memory = None
            for j in range(1, 4):
                if batch.mtp_labels[r, p, j - 1] == -100 and start + j >= len(row.input_ids):
                    break  # past the end there is no previous token
                e = model.embed(row.input_ids[start + j])[None]
                output, memory = model.sampler_head.step(states.mtp[r, p, j - 1][None], e, memory)
                # Float64: products of other shapes.
                torch.testing.assert_close(states.sampler[r, p, j - 1], output[0], rtol=0, atol=1e-11)
                compared += 1
    assert compared > 60
    if head == "mlp":
        assert states.sampler_ntp is not None
        expected = model.sampler_head(states.ntp, model.embed(batch.input_ids))
        torch.testing.assert_close(states.sampler_ntp, expected, rtol=0, atol=1e-12)  # the same call
    else:
        assert states.sampler_ntp is None


def test_a_wrong_size_of_the_gru_is_refused() -> None:
    with pytest.raises(UsageError, match="hidden_size must be 1 or more, got 0"):
        GRUSamplerHead(hidden_size=0)


def test_a_half_precision_base_keeps_its_trained_parameters_in_float32() -> None:
    model = tiny_model(dtype=torch.bfloat16, sampler_head=GRUSamplerHead(), lora=LoRA(rank=2))
    states = model.hidden_states(tiny_batch())
    assert {p.dtype for _, p in model.trained_parameters()} == {torch.float32}
    assert states.sampler is not None and states.sampler.dtype == states.mtp.dtype == torch.bfloat16
