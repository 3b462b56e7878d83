# SPDX-License-Identifier: Apache-2.0
"""What the parts of a decoding step cost by the positions that it feeds, and how far real steps deviate from that."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np


class StepCosts(NamedTuple):
    """Seconds that the parts of a step take. Costs depend on the positions of all rows of a batch together."""

    positions: tuple[int, ...]  # positions fed, ascending from 1
    seconds: tuple[float, ...]  # what the decoder takes for them
    per_verified: float  # what each further verified position adds (unembedding, choice of the token)
    per_draft: float  # what each draft token of a block adds, tokens being drafted one after another
    draft_start: float = 0.0  # fixed cost of drafting a block

    def curve(self, largest: int) -> np.ndarray:
        """Decoder seconds for 0, 1, .., ``largest`` positions, [largest + 1]."""
        at = np.arange(largest + 1)
        # More positions never take less, and noise only adds: cap each point by the later ones.
        rising = np.minimum.accumulate(self.seconds[::-1])[::-1]
        curve = np.interp(at, self.positions, rising)
        if len(self.positions) > 1:  # beyond the last point: continue its slope
            slope = (rising[-1] - rising[-2]) / (self.positions[-1] - self.positions[-2])
            curve = curve + np.maximum(at - self.positions[-1], 0) * slope
        return curve


class CurveCorrection:
    """Measured over expected seconds of steps, by powers of two of the positions: the curve of a busy machine is wrong.

    Steps with masks, with which the curve was measured, and steps without, which need no adapters, count separately.

    Attributes:
        counts: steps seen, [without or with masks, power of two], at most ``MEMORY`` so that old steps are forgotten.
    """

    MEMORY = 24
    MAX_LOG_RATIO = 1.5

    def __init__(self) -> None:
        self.counts = np.zeros((2, 20))
        self._mean_log_ratio = np.zeros((2, 20))

    def observe(self, positions: int, masked: bool, expected: float, seconds: float) -> None:
        """Record a step that fed ``positions`` positions in all rows together."""
        i = int(masked), positions.bit_length() - 1
        log_ratio = min(max(math.log(seconds / expected), -self.MAX_LOG_RATIO), self.MAX_LOG_RATIO)
        self.counts[i] = min(self.counts[i] + 1, self.MEMORY)
        self._mean_log_ratio[i] += (log_ratio - self._mean_log_ratio[i]) / self.counts[i]

    def factors(self, largest: int) -> np.ndarray:
        """Factors for the seconds of 0, 1, .., ``largest`` positions, [2, largest + 1]; interpolated where unseen."""
        at = np.log2(np.maximum(np.arange(largest + 1), 1))
        factors = np.ones((2, largest + 1))
        for line, counts, log_ratios in zip(factors, self.counts, self._mean_log_ratio, strict=True):
            seen = counts.nonzero()[0]
            if len(seen):
                line[:] = np.exp(np.interp(at, seen + 0.3, log_ratios[seen]))
        return factors
