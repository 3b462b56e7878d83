# SPDX-License-Identifier: Apache-2.0
"""Two batches for each metric, and what the metrics compute from one of them or both."""

from __future__ import annotations

from typing import Any

import torch
from torchmetrics import Metric

from mtp_lightning.metrics import AcceptanceLength, ForcedAcceptance, TermMean
from mtp_lightning.types import ANCHOR, MTP, NTP, LossSum

K = 3
CASES = ("acceptance", "forced", "term", "joint", "three", "one_sided")
"""The last one has no first batch, so that one of two processes has none."""
DENOMINATORS = {"term": (MTP, NTP), "joint": ((NTP, MTP),), "three": (MTP, NTP, ANCHOR), "one_sided": (ANCHOR,)}


def new_metric(case: str) -> Metric:
    return {"acceptance": AcceptanceLength, "forced": lambda: ForcedAcceptance(K)}.get(case, TermMean)()


def batches(case: str) -> list[tuple[Any, ...] | None]:
    """Arguments of two updates. No two numbers are alike, so that a forgotten one shows."""
    g = torch.Generator().manual_seed(3)

    def numbers(*shape: int) -> torch.Tensor:
        return torch.randint(1, 50, shape, generator=g)

    if case == "acceptance":
        return [(numbers(n), numbers(n)) for n in (4, 2)]
    if case == "forced":
        return [tuple(torch.rand(2, n, K, generator=g) < share for share in (0.7, 0.9)) for n in (5, 3)]
    found = [([LossSum(torch.rand((), generator=g), d) for d in DENOMINATORS[case]], numbers(3).double()) for _ in range(2)]
    return [None if case == "one_sided" else found[0], found[1]]


def computed(half: int | None) -> dict[str, torch.Tensor]:
    """What each metric computes after its updates: both, or that of one half."""
    values = {}
    for case in CASES:
        metric = new_metric(case)
        for index, batch in enumerate(batches(case)):
            if batch is not None and half in (None, index):
                metric.update(*batch)
        values[case] = metric.compute()
        if isinstance(metric, ForcedAcceptance):
            values["accuracy"] = metric.accuracy()
    return values
