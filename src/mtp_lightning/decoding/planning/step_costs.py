# SPDX-License-Identifier: Apache-2.0
"""What the parts of a decoding step cost, by the positions that it feeds, and how far real steps deviate from that."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np


class StepCosts(NamedTuple):
    """Seconds that the parts of a step take. Rows of a batch count together: costs depend on the sum of their positions.

    Attributes:
        positions: positions fed, ascending from 1.
        seconds: what the decoder takes for them.
        verified: what each further verified position adds (unembedding, choice).
        drafted: what each draft token of a chain adds.
        begun: what drafting takes beside its tokens.
    """

    positions: tuple[int, ...]
    seconds: tuple[float, ...]
    verified: float
    drafted: float
    begun: float = 0.0

    def curve(self, largest: int) -> np.ndarray:
        """Seconds of 0, 1, .., ``largest`` positions, [largest + 1]."""
        at = np.arange(largest + 1)
        # More positions never take less, and noise only adds: no point is above any later one.
        rising = np.minimum.accumulate(self.seconds[::-1])[::-1]
        inside = np.interp(at, self.positions, rising)
        if len(self.positions) > 1:
            slope = (rising[-1] - rising[-2]) / (self.positions[-1] - self.positions[-2])
            inside = inside + np.maximum(at - self.positions[-1], 0) * slope
        return inside


class Pace:
    """What steps really take over what the curve says, by powers of two of the positions; a busy machine's curve is wrong.

    Apart for steps with masks, which are what the curve was measured with, and for those without, which need no adapters.

    Attributes:
        counts: steps seen, [without masks or with, power of two]; at most ``STEPS``, so that old ones are forgotten.
    """

    STEPS = 24

    def __init__(self) -> None:
        self.counts = np.zeros((2, 20))
        self._logs = np.zeros((2, 20))

    def observe(self, positions: int, masked: bool, expected: float, seconds: float) -> None:
        """Take note of a step that fed so many positions."""
        place = int(masked), positions.bit_length() - 1
        ratio = min(max(math.log(seconds / expected), -1.5), 1.5)
        self.counts[place] = min(self.counts[place] + 1, self.STEPS)
        self._logs[place] += (ratio - self._logs[place]) / self.counts[place]

    def factors(self, largest: int) -> np.ndarray:
        """What to multiply the seconds of 0, 1, .., ``largest`` positions by, [2, largest + 1]; where unseen, as nearby."""
        at = np.log2(np.maximum(np.arange(largest + 1), 1))
        found = np.ones((2, largest + 1))
        for line, counts, logs in zip(found, self.counts, self._logs, strict=True):
            seen = counts.nonzero()[0]
            if len(seen):
                line[:] = np.exp(np.interp(at, seen + 0.3, logs[seen]))
        return found
