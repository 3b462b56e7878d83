# SPDX-License-Identifier: Apache-2.0
"""Counters of a server's ``/metrics``, which are in Prometheus' text format."""

from __future__ import annotations

import re


def counter_total(metrics: str, name: str) -> float | None:
    """The sum of a counter over all its labels; None if it is not there."""
    values = re.findall(rf"^{re.escape(name)}(?:{{.*}})? (\S+)$", metrics, re.MULTILINE)
    return sum(map(float, values)) if values else None
