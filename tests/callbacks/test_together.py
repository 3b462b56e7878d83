# SPDX-License-Identifier: Apache-2.0
"""What callbacks ask Lightning for in one place."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from lightning import Trainer

from mtp_lightning.training.distributed import figures_are_logged


def trainer(every: int) -> Trainer:
    made = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, log_every_n_steps=every)
    made.training = True
    return made


def test_whether_figures_are_logged() -> None:
    """Before the first step, whose number is 1 then."""
    assert figures_are_logged(trainer(1)) and not figures_are_logged(trainer(2))
    stopped = trainer(2)
    stopped.should_stop = True
    assert figures_are_logged(stopped)


@pytest.mark.parametrize("found", [SimpleNamespace(), SimpleNamespace(_logger_connector=SimpleNamespace())])
def test_figures_are_logged_where_lightning_does_not_say(found: Any) -> None:
    assert figures_are_logged(found)
