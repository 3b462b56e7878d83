# SPDX-License-Identifier: Apache-2.0
"""Loss terms on a model: what they need of it, and what they train."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_model, tiny_rows
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
