# SPDX-License-Identifier: Apache-2.0
"""Two batches for each metric, and metrics updated with one of them or both. Helpers of the metric tests, no tests."""

from __future__ import annotations

from typing import Any

import torch
from torchmetrics import Metric

from mtp_lightning.metrics import AcceptanceLength, ForcedAcceptance, TermMean
from mtp_lightning.types import ANCHOR, MTP, NTP, LossSum

K = 3
KINDS = ("acceptance", "forced", "term", "joint", "one_sided")
"""The last metric gets a batch in the second half alone."""


def new_metric(kind: str) -> Metric:
    return {"acceptance": AcceptanceLength, "forced": lambda: ForcedAcceptance(K)}.get(kind, TermMean)()


def batches(kind: str, seed: int) -> list[tuple[Any, ...]]:
    """Arguments of two updates. No two numbers are alike, so that a forgotten one shows."""
    g = torch.Generator().manual_seed(seed)

    def numbers(*shape: int) -> torch.Tensor:
        return torch.randint(1, 50, shape, generator=g)

    if kind == "acceptance":
        return [(numbers(n), numbers(n)) for n in (4, 2)]
    if kind == "forced":
        return [tuple(torch.rand(2, n, K, generator=g) < share for share in (0.7, 0.9)) for n in (5, 3)]
    divisors = {"term": (MTP, NTP), "joint": ((NTP, MTP),), "one_sided": (ANCHOR,)}[kind]
    made = [([LossSum(torch.rand((), generator=g), d) for d in divisors], numbers(3).double()) for _ in range(2)]
    return made


def filled_metrics(seed: int, half: int | None) -> list[tuple[str, torch.Tensor]]:
    """What each metric computes after its updates: both, or those of one half."""
    values = []
    for kind in KINDS:
        metric = new_metric(kind)
        for index, batch in enumerate(batches(kind, seed)):
            if half in (None, index) and not (kind == "one_sided" and index == 0):
                metric.update(*batch)
        values.append((kind, metric.compute()))
        if isinstance(metric, ForcedAcceptance):
            values.append(("accuracy", metric.accuracy()))
    return values
