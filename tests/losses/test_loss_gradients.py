# SPDX-License-Identifier: Apache-2.0
"""Loss terms on a model: what they need of it, what they train, and an estimate from sampled blocks that is not biased."""

from __future__ import annotations

import pytest
import torch
from tiny import in_one_pass, tiny_model, tiny_rows
from torch import Tensor
from toy_losses import Focal, K

from mtp_lightning.errors import UsageError
from mtp_lightning.losses import (
    AnchorDistillation,
    BaseCrossEntropy,
    LatentConsistency,
    SamplerCrossEntropy,
    term_value,
)
from mtp_lightning.modeling import masking
from mtp_lightning.modeling.gated_lora import LoRA
from mtp_lightning.sampler_heads import GRUSamplerHead
from mtp_lightning.types import MaskedInput


def test_a_sampler_term_without_a_sampler_head_is_refused() -> None:
    batch = masking.build_masked_input(tiny_rows(), K)
    model = tiny_model(num_masks=K)
    for term in (SamplerCrossEntropy(), AnchorDistillation(), Focal("sampler")):
        with pytest.raises(UsageError, match=f"{type(term).__name__} needs a sampler head, and model.sampler_head is false"):
            model(batch, {"x": term})


@pytest.mark.parametrize("gated", [True, False])
def test_loss_gradients_reach_what_is_trained_and_nothing_else(gated: bool) -> None:
    model = tiny_model(num_masks=K, sampler_head=GRUSamplerHead(), lora=LoRA(rank=2, gated=gated))
    batch = masking.build_masked_input(tiny_rows(), K)
    terms = {"base": BaseCrossEntropy(), "sampler": SamplerCrossEntropy(), "lcm": LatentConsistency()}
    sums = model(batch, terms).sums
    torch.stack([term_value(s, batch.counts) for s in sums.values()]).sum().backward()
    for name, p in model.named_parameters():
        assert (p.grad is not None and bool(p.grad.any())) == p.requires_grad, name
    ntp = term_value(model(batch, {"ntp": BaseCrossEntropy(positions="ntp")}).sums["ntp"], batch.counts)
    assert ntp.requires_grad == (not gated)  # of a gated model it is a constant


def test_block_sampling_is_unbiased_in_value_and_gradient() -> None:
    """The mean over draws of starts is the full-coverage loss and gradient, within its own standard error."""
    model = in_one_pass(
        tiny_model(num_masks=K, sampler_head=GRUSamplerHead(hidden_size=8), lora=LoRA(rank=1), num_hidden_layers=1)
    )
    terms = {
        "base": BaseCrossEntropy(positions="all"),
        "sampler": SamplerCrossEntropy(),
        "lcm": LatentConsistency(),
        "distillation": AnchorDistillation(),
    }
    rows = tiny_rows()[:2]
    weights = [model.mask_embeddings, *model.sampler_head.output.parameters()]  # type: ignore[union-attr]

    def measured(batch: MaskedInput) -> Tensor:
        sums = model(batch, terms).sums
        values = torch.stack([term_value(s, batch.counts) for s in sums.values()])
        grads = torch.autograd.grad(values.sum(), weights)
        return torch.cat([values.detach(), *[g.flatten() for g in grads]])

    full = measured(masking.build_masked_input(rows, K))
    draws = torch.stack([measured(masking.build_masked_input(rows, K, block_fraction=0.3, epoch=e)) for e in range(200)])
    error = draws.std(0) / 200**0.5
    z = (draws.mean(0) - full) / error
    # 200 draws: the mean is close to normal. About four hundred correlated numbers, so the largest z of a right estimate
    # is near 3, and 5 is out of reach.
    assert z.abs().max() < 5
    assert 0.6 < z.square().mean().sqrt() < 1.6
    along = draws[:, 4:] @ full[4:] / full[4:].square().sum()
    along_error = along.std() / 200**0.5
    assert abs(along.mean() - 1) < 4 * along_error
    # The test is sharp: it sees a bias of 10 % in a value and of a third in the gradient. Without block weights both would
    # be 0.3 of what they should be.
    assert (error < 0.02 * full)[:4].all() and along_error < 0.08
