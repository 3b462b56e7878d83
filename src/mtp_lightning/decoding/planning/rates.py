# SPDX-License-Identifier: Apache-2.0
"""Observed rates of success, with a prior."""

from __future__ import annotations

PRIOR_WEIGHT, MEMORY = 8.0, 40.0
"""Observations that a prior counts for, and about how many are remembered."""


class Rates:
    """Rates of success in a number of cases."""

    def __init__(self, num_cases: int) -> None:
        self._seen, self._successes = [0.0] * num_cases, [0.0] * num_cases

    def observe(self, case: int, success: bool) -> None:
        """Record one observation; older ones count less and less."""
        for counts, new in ((self._seen, 1.0), (self._successes, float(success))):
            counts[case] += new - counts[case] / MEMORY

    def rate(self, case: int, prior: float) -> float:
        """The rate of a case that is expected to be ``prior``."""
        return (PRIOR_WEIGHT * prior + self._successes[case]) / (PRIOR_WEIGHT + self._seen[case])
