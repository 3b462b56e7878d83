# SPDX-License-Identifier: Apache-2.0
"""What a planned step may feed: a number of drafts to verify and of masks, from a small set of sizes."""

from __future__ import annotations

from typing import NamedTuple

SIZES = (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
"""Numbers of drafts and of masks, up to k: few shapes, because kernels are tuned for each."""
FEW_SIZES = (0, 2, 4)
"""The same where each shape is compiled."""


class Plan(NamedTuple):
    """What to feed."""

    num_drafts: int  # drafts to verify, c
    masks: int  # masks in a block
    # the tokens that get a block: ``last``: each row's last verified draft, or its last token if it has none; ``all``
    where: str

    def blocks(self, drafted: int | None = None) -> tuple[tuple[int, int], ...]:
        """(start, size) of each block of a row that has ``drafted`` drafts to verify (default: c)."""
        c = self.num_drafts
        last = c if drafted is None else drafted
        return tuple((start, self.masks) for start in ((last,) if self.where == "last" else range(c + 1)) if self.masks)


PLAIN = Plan(0, 0, "last")
"""A plain autoregressive step."""


def block_placement(decoding: str) -> str:
    """Where steps of quadratic and linear decoding place blocks (``Plan.where``)."""
    return "all" if decoding == "quadratic" else "last"


def draft_sizes(num_masks: int, few: bool = False) -> tuple[int, ...]:
    """Numbers of drafts and of masks that plans use, for k masks: ``draft_sizes(7) -> (0, 1, 2, 3, 4, 6, 7)``."""
    sizes = FEW_SIZES if few else (*SIZES, num_masks)
    return tuple(sorted({min(size, num_masks) for size in sizes}))
