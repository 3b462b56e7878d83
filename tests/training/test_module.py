# SPDX-License-Identifier: Apache-2.0
"""MTPModule, schedules and checkpoint settings: what is refused, and what a resumed run keeps."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tiny import tiny_model

from mtp_lightning.errors import RunError, UsageError
from mtp_lightning.losses import AnchorDistillation, BaseCrossEntropy, LatentConsistency
from mtp_lightning.modeling.decoder import context_length
from mtp_lightning.saving.checkpoint import check_settings
from mtp_lightning.schedules import WarmupConstant, WarmupCosine
from mtp_lightning.training.module import MTPModule

SETTINGS: dict[str, Any] = {
    "base": {"model_type": "llama"},
    "num_masks": 4,
    "lora": {"rank": 4, "alpha": None, "dropout": 0.0, "target_modules": None, "gated": True},
    "sampler_head": None,
}


def test_a_sampler_head_that_nothing_trains_is_refused() -> None:
    losses = {"base": BaseCrossEntropy(), "lcm": LatentConsistency()}
    with pytest.raises(UsageError, match="no loss term trains the sampler head"):
        MTPModule("nowhere", losses=losses)
    assert MTPModule("nowhere", losses=losses, sampler_head=False).sampler_head is None
    assert MTPModule("nowhere", losses={**losses, "sampler": AnchorDistillation()}).sampler_head is not None


@pytest.mark.parametrize("key, value", [("rank", 8), ("alpha", 3.0), ("target_modules", ["q_proj"]), ("gated", False)])
def test_a_checkpoint_of_another_lora_is_refused(key: str, value: Any) -> None:
    other = {**SETTINGS, "lora": {**SETTINGS["lora"], key: value}}
    with pytest.raises(RunError, match=f"Change model.lora.{key} or --ckpt_path"):
        check_settings({"mtp_settings": SETTINGS}, other)
    check_settings({"mtp_settings": SETTINGS}, {**SETTINGS, "lora": {**SETTINGS["lora"], "dropout": 0.1}})


def test_a_broken_next_token_loss_shows() -> None:
    module = MTPModule("nowhere")
    module.val_ntp["total"].update(torch.tensor(float("nan")))
    assert math.isnan(module.val_ntp["total"].compute().item())


def schedule(kind: Any, **options: Any) -> tuple[torch.optim.Optimizer, Any]:
    """A schedule over one parameter with a learning rate of 1."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    return optimizer, kind(optimizer, **options)


def rates(optimizer: torch.optim.Optimizer, scheduler: Any, steps: int) -> list[float]:
    """The learning rate of each step."""
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def test_schedules_by_hand() -> None:
    assert rates(*schedule(WarmupConstant, warmup_steps=4), 6) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    cosine = rates(*schedule(WarmupCosine, warmup_steps=2, floor=0.5, total_steps=6), 8)
    # 2 steps of warm-up; then 0.5 + 0.25 (1 + cos) at 0, 1/4, 2/4, 3/4 of the rest, and the floor.
    wanted = [0.5, 1.0, 1.0, 0.75 + 0.25 * math.cos(math.pi / 4), 0.75, 0.75 - 0.25 * math.cos(math.pi / 4), 0.5, 0.5]
    assert cosine == pytest.approx(wanted, abs=1e-12)  # rounding of the cosine


def test_a_resumed_run_keeps_its_own_length() -> None:
    _, saved = schedule(WarmupCosine, total_steps=10)
    _, resumed = schedule(WarmupCosine, total_steps=50)
    resumed.load_state_dict(saved.state_dict())
    assert resumed.total_steps == 50


def test_the_context_ends_where_rope_changes() -> None:
    config = tiny_model("phi3").base.config
    whole = config.max_position_embeddings
    assert context_length(config) == whole
    config.rope_parameters = {"rope_type": "longrope", "original_max_position_embeddings": whole // 2}
    assert context_length(config) == whole // 2
