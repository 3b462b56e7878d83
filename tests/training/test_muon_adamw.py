# SPDX-License-Identifier: Apache-2.0
"""MuonAdamW does what torch's two optimizers do on their own parameters, and resumes exactly."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.optim import AdamW, Muon

from mtp_lightning.schedules import WarmupConstant
from mtp_lightning.training import MuonAdamW


def _network() -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict({"lora": nn.Linear(6, 4), "sampler_head": nn.GRU(6, 6)})


def _run(network: nn.Module, optimizers: list[torch.optim.Optimizer], steps: range) -> None:
    """Steps on gradients that depend on the step alone."""
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for parameter in network.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        for optimizer in optimizers:
            optimizer.step()


def _weights(network: nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in network.parameters()])


def test_equals_both_optimizers_of_torch_on_their_own_parameters() -> None:
    ours, theirs = _network(), _network()
    _run(ours, [MuonAdamW(ours.named_parameters(), lr=0.1, muon_lr=0.2, betas=(0.9, 0.98), weight_decay=0.3)], range(4))
    matrices = [
        p for name, p in theirs.named_parameters() if name in ("sampler_head.weight_ih_l0", "sampler_head.weight_hh_l0")
    ]
    others = [p for p in theirs.parameters() if all(p is not matrix for matrix in matrices)]
    muon = Muon(matrices, lr=0.2, weight_decay=0.3, adjust_lr_fn="match_rms_adamw")
    _run(theirs, [AdamW(others, lr=0.1, betas=(0.9, 0.98), weight_decay=0.3, fused=True), muon], range(4))
    assert torch.equal(_weights(ours), _weights(theirs))


def test_resumes_exactly_and_is_scheduled_as_one() -> None:
    whole, halved = _network(), _network()
    optimizer = MuonAdamW(whole.named_parameters())
    schedule = WarmupConstant(optimizer, warmup_steps=4)
    assert [group["lr"] for group in optimizer.param_groups] == [1e-3 / 4, 5e-3 / 4]
    _run(whole, [optimizer], range(2))
    halved.load_state_dict(whole.state_dict())
    states = copy.deepcopy((optimizer.state_dict(), schedule.state_dict()))
    _run(whole, [optimizer], range(2, 4))
    resumed = MuonAdamW(halved.named_parameters())
    resumed.load_state_dict(states[0])
    _run(halved, [resumed], range(2, 4))
    assert torch.equal(_weights(whole), _weights(halved))


def test_is_adamw_without_a_sampler_head() -> None:
    optimizer = MuonAdamW([("lora.weight", nn.Parameter(torch.zeros(2, 2)))])
    assert [group["lr"] for group in optimizer.param_groups] == [1e-3]
