# SPDX-License-Identifier: Apache-2.0
"""The training step against the naive one: one interleaved sequence, LoRA at every position, all logits at once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import tiny_batch, tiny_model

from mtp_lightning.losses import AnchorDistillation, LatentConsistency, LossTerm
from mtp_lightning.sampler_heads import GRUSamplerHead


@pytest.mark.parametrize("block_fraction", [1.0, 0.4])
def test_losses_and_gradients_are_those_of_the_naive_step(block_fraction: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    from naive_step import naive_sums, total

    model, batch = tiny_model(sampler_head=GRUSamplerHead(read_hidden=True)), tiny_batch(block_fraction=block_fraction)
    terms: dict[str, LossTerm] = {
        "base": AnchorDistillation(head="base"),
        "sampler": AnchorDistillation(head="sampler"),
        "lcm": LatentConsistency(),
    }
    ours, naive = total(model(batch, terms).sums, batch.counts), total(naive_sums(model, batch, terms), batch.counts)
    torch.testing.assert_close(ours, naive, rtol=1e-9, atol=0)  # float64, products of other shapes
    trained = [p for _, p in model.trained_parameters()]
    for mine, other in zip(*(torch.autograd.grad(loss, trained) for loss in (ours, naive)), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-8, atol=1e-10)  # as above
