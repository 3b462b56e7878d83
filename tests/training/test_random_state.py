# SPDX-License-Identifier: Apache-2.0
"""The state of the random generators comes back."""

from __future__ import annotations

import random

import numpy as np
import torch

from mtp_lightning.training.random_state import random_state, set_random_state


def test_random_state_comes_back() -> None:
    def draws() -> list[float]:
        return [random.random(), random.gauss(0, 1), float(np.random.standard_normal()), torch.rand(()).item()]

    draws()
    state = random_state()
    first = draws()
    draws()
    set_random_state(state)
    assert draws() == first
