# SPDX-License-Identifier: Apache-2.0
"""MTPModule: what is refused before anything is loaded, and metrics that show a broken model."""

from __future__ import annotations

import math

import pytest
import torch

from mtp_lightning.errors import UsageError
from mtp_lightning.losses import AnchorDistillation, BaseCrossEntropy, LatentConsistency
from mtp_lightning.training.module import MTPModule


def test_a_sampler_head_that_nothing_trains_is_refused() -> None:
    losses = {"base": BaseCrossEntropy(), "lcm": LatentConsistency()}
    with pytest.raises(UsageError, match="no loss term trains the sampler head"):
        MTPModule("nowhere", losses=losses)
    assert MTPModule("nowhere", losses=losses, sampler_head=False).sampler_head is None
    assert MTPModule("nowhere", losses={**losses, "sampler": AnchorDistillation()}).sampler_head is not None


def test_a_broken_next_token_loss_shows() -> None:
    module = MTPModule("nowhere")
    module.val_ntp["total"].update(torch.tensor(float("nan")))
    assert math.isnan(module.val_ntp["total"].compute().item())
