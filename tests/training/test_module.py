# SPDX-License-Identifier: Apache-2.0
"""MTPModule: what is refused before anything is loaded, and metrics that show a broken model."""

from __future__ import annotations

import math
from unittest.mock import Mock

import pytest
import torch
from tiny import tiny_batch

from mtp_lightning.errors import UsageError
from mtp_lightning.losses import AnchorDistillation, BaseCrossEntropy, LatentConsistency
from mtp_lightning.schedules import Ramp
from mtp_lightning.training.module import MTPModule
from mtp_lightning.types import NTP, LossSum


def test_a_sampler_head_that_nothing_trains_is_refused() -> None:
    losses = {"base": BaseCrossEntropy(), "lcm": LatentConsistency()}
    with pytest.raises(UsageError, match="no loss term trains the sampler head"):
        MTPModule("nowhere", losses=losses)
    assert MTPModule("nowhere", losses=losses, sampler_head=False).sampler_head is None
    assert MTPModule("nowhere", losses={**losses, "sampler": AnchorDistillation()}).sampler_head is not None


def test_a_broken_next_token_loss_shows() -> None:
    module = MTPModule("nowhere")
    module.val_ntp.update([LossSum(torch.tensor(float("nan")), NTP)], torch.ones(3))
    assert math.isnan(module.val_ntp.compute().item())


def test_blocks_grow_in_training_alone() -> None:
    module = MTPModule("nowhere", num_masks=4, num_masks_schedule=Ramp(1, 4, steps=3))
    batch, sizes = tiny_batch(4), []
    for step, training in [(0, True), (1, True), (3, True), (9, True), (0, False)]:
        module.trainer = Mock(training=training, global_step=step)
        sizes.append(module.on_before_batch_transfer(batch, 0).mtp_labels.shape[2])
    assert sizes == [1, 2, 4, 4, 4]


def test_a_schedule_to_the_end_of_a_run_without_one_is_refused() -> None:
    module = MTPModule("nowhere", loss_schedules={"base": Ramp(1, 0)})
    module.trainer = Mock(estimated_stepping_batches=math.inf)
    with pytest.raises(UsageError, match=r"model\.loss_schedules\.base\.steps"):
        module.on_train_start()


def test_schedules_that_make_no_sense_are_refused() -> None:
    for key, options in {
        "model.loss_schedules.sample": {"loss_schedules": {"sample": Ramp(1, 0)}},
        "model.loss_schedules.base": {"loss_schedules": {"base": Ramp(1, -1)}},
        "model.num_masks_schedule.end": {"num_masks": 4, "num_masks_schedule": Ramp(2, 5)},
        "model.num_masks_schedule.start": {"num_masks": 4, "num_masks_schedule": Ramp(0, 4)},
    }.items():
        with pytest.raises(UsageError, match=key):
            MTPModule("nowhere", **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("step", ["training_step", "validation_step"])
def test_a_stop_iteration_of_a_users_part_ends_the_run(step: str) -> None:
    module = MTPModule("nowhere")
    module.trainer = Mock(accumulate_grad_batches=1, world_size=1)
    module.model = Mock(side_effect=StopIteration)
    with pytest.raises(RuntimeError, match="StopIteration"):
        getattr(module, step)(tiny_batch(4), 0)
