# SPDX-License-Identifier: Apache-2.0
"""The schedules of one run besides the learning rate's: factors of loss terms, and masks in a block."""

from __future__ import annotations

import math
from collections.abc import Collection

from lightning import Trainer

from mtp_lightning.errors import UsageError
from mtp_lightning.schedules import Ramp


class RunSchedules:
    """Numbers that depend on the optimizer step alone, so that a resumed run has those of the uninterrupted one."""

    def __init__(
        self,
        loss_schedules: dict[str, Ramp],
        num_masks_schedule: Ramp | None,
        terms: Collection[str],
        num_masks: int,
    ) -> None:
        for name, ramp in loss_schedules.items():
            if name not in terms:
                raise UsageError(f"model.loss_schedules.{name} names no loss term; there are {', '.join(terms)}.")
            if min(ramp.start, ramp.end) < 0:
                raise UsageError(f"model.loss_schedules.{name} must be 0 or more, got {ramp.start} to {ramp.end}.")
        if num_masks_schedule is not None:
            for name in ("start", "end"):
                value = getattr(num_masks_schedule, name)
                if not 1 <= value <= num_masks:
                    key = f"model.num_masks_schedule.{name}"
                    raise UsageError(f"{key} must be from 1 to model.num_masks, {num_masks}, got {value}.")
        self.loss_schedules = loss_schedules
        self.num_masks_schedule = num_masks_schedule
        self._total_steps = math.inf

    def start(self, trainer: Trainer) -> None:
        """Find out how long the run is, if a schedule goes to its end."""
        named = {f"loss_schedules.{name}": ramp for name, ramp in self.loss_schedules.items()}
        if self.num_masks_schedule is not None:
            named["num_masks_schedule"] = self.num_masks_schedule
        open_ended = [name for name, ramp in named.items() if ramp.steps is None]
        if open_ended:
            self._total_steps = float(trainer.estimated_stepping_batches)
            if math.isinf(self._total_steps):
                raise UsageError(f"model.{open_ended[0]}.steps must be given: the run has no fixed number of steps.")

    def factors(self, step: int) -> dict[str, float]:
        """Factors of loss terms at an optimizer step; a term that has no schedule is left out."""
        return {name: ramp.at(step, self._total_steps) for name, ramp in self.loss_schedules.items()}

    def num_masks(self, step: int) -> int | None:
        """Masks in a block at an optimizer step; None: all."""
        return None if self.num_masks_schedule is None else round(self.num_masks_schedule.at(step, self._total_steps))
