# SPDX-License-Identifier: Apache-2.0
"""What a waiting draft is worth: a small decision process over the number of drafts that wait, solved as steps go by.

A step that makes a draft costs more than a plain one, and pays only later; often not in the next step alone, but because
text that keeps drafts goes on having them. So the worth of a draft is the relative value of the state "so many drafts wait"
when every following step is planned best: an average-reward semi-Markov process, whose rate is tokens a second.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

SETTLE = 40
"""Sweeps that settle values from scratch, to a per cent or so; afterwards chances and prices change slowly."""


def availability(reached: np.ndarray, whole: np.ndarray, missed: float, num_places: int) -> np.ndarray:
    """Rows with a block after the last token kept, to be expected for each number of drafts verified and each place.

    Args:
        reached: rows in which the first 0, 1, .. drafts of the sizes are all kept, [c]; at 0 all rows.
        whole: those in which so many drafts, or all that there are if those are fewer, are kept, [c].
        missed: rows in which the first draft is not kept.
        num_places: 1: blocks after the last draft; 3: also after draft c and the last verified token; after all tokens.

    Returns:
        [c, place].
    """
    found = [whole]
    if num_places > 1:
        ends = reached + missed
        ends[0] = reached[0]
        found += [ends, np.full_like(reached, reached[0])]
    return np.stack(found, axis=1)


class DraftValues:
    """Values of waiting drafts, and the rate of the best plans.

    Args:
        sizes: the numbers of drafts and masks that plans have, ascending from 0.

    Attributes:
        worth: tokens that a draft of each size is worth beside none, [m].
        rate: tokens a second when all steps are planned best; 0 before anything is known.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        self.sizes = np.array(sizes)
        self.worth = np.zeros(len(self.sizes))
        self.rate = 0.0

    def sweep(self, chances: np.ndarray, seconds: np.ndarray, sweeps: int = 1, close: float = 0.0) -> None:
        """Improve the values.

        Args:
            chances: chance of each draft of a block, given that the ones before are kept, [k].
            seconds: what each plan takes, drafting included, [c, m, place].
            sweeps: how often.
            close: stop once values change less, in tokens.
        """
        reached = np.concatenate([[1.0], chances.cumprod()])
        tokens = reached.cumsum()[self.sizes]
        there = availability(reached[self.sizes], reached[self.sizes], 1.0 - reached[1], seconds.shape[2])
        floor = 1.0 / float(seconds[0, 0, 0])
        rate, worth = max(self.rate, floor), self.worth
        for _ in range(sweeps):
            gain = tokens[:, None, None] + there[:, None, :] * worth[None, :, None] - rate * seconds
            best = np.maximum.accumulate(gain.max(axis=(1, 2)))
            surplus = float(best[0])
            # Half-way only: plans that draft in one step and verify in the next would have the values swing for ever.
            change = 0.5 * (best - surplus - worth)
            worth = worth + change
            rate = max(floor, rate + 0.25 * surplus * floor)
            if abs(surplus) < close and float(np.abs(change).max()) < close:
                break
        self.rate, self.worth = rate, worth
