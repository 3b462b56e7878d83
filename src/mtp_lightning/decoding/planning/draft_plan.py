# SPDX-License-Identifier: Apache-2.0
"""What a planned step may feed: a number of drafts to verify and of masks, from a small set of sizes."""

from __future__ import annotations

import functools
from dataclasses import dataclass

SIZES = (0, 1, 2, 4, 8)
"""Numbers of drafts and of masks, continued by 12, 16, 24, .. up to k: few shapes, because kernels are tuned for each."""
FEW_SIZES = (0, 2, 4)
"""The same where each shape is compiled."""


@dataclass(frozen=True)
class Plan:
    """What to feed."""

    num_drafts: int  # drafts to verify, c
    masks: int  # masks in a block
    # the tokens that get a block: ``last``: each row's last verified draft, or its last token if it has none;
    # ``ends``: draft c and the row's last token; ``all``
    where: str

    def blocks(self, drafted: int | None = None) -> tuple[tuple[int, int], ...]:
        """(start, size) of each block of a row that has ``drafted`` drafts to verify (default: c)."""
        if not self.masks:
            return ()
        c = self.num_drafts
        if self.where == "last":
            return ((c if drafted is None else drafted, self.masks),)
        starts = range(c + 1) if self.where == "all" else sorted({0, c})
        return tuple((start, self.masks) for start in starts)


PLAIN = Plan(0, 0, "last")
"""A plain autoregressive step."""


@functools.cache
def draft_sizes(num_masks: int) -> tuple[int, ...]:
    """Numbers of drafts and of masks that plans use, ascending, for k masks: ``draft_sizes(6) -> (0, 1, 2, 4, 6)``."""
    sizes, step = [size for size in SIZES if size < num_masks], 4
    while sizes[-1] >= SIZES[-1] and sizes[-1] + step < num_masks:
        sizes.append(sizes[-1] + step)
        if sizes[-1] == 4 * step:
            step *= 2
    return (*sizes, num_masks)


def few_sizes(num_masks: int) -> tuple[int, ...]:
    """The same when each new shape must be compiled: ``few_sizes(3) -> (0, 2, 3)``."""
    return tuple(size for size in draft_sizes(num_masks) if size in FEW_SIZES or size == min(num_masks, FEW_SIZES[-1]))


def plan_positions(num_masks: int) -> set[int]:
    """Positions per row of all steps that plans may ask for, for k masks."""
    sizes = draft_sizes(num_masks)
    return {1 + c + blocks * m for c in sizes for m in sizes for blocks in (1, 2, 1 + c)}
