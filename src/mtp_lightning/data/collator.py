# SPDX-License-Identifier: Apache-2.0
"""The collator: drawn rows -> masked input, through the pure functions of ``masking``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mtp_lightning.data.rows import DrawnRow
from mtp_lightning.modeling.masking import ROW_MULTIPLE, block_multiple, build_masked_input
from mtp_lightning.types import MaskedInput


@dataclass(frozen=True)
class MaskedInputCollator:
    """Makes a batch of rows drawn in one epoch. It holds plain values only, so that worker processes can receive it.

    The block starts depend on the seed, the rows and their epoch, so the same draws give the same batch in any process.
    """

    num_masks: int  # K
    block_fraction: float = 1.0  # share of the eligible starts that get a block
    max_blocks_per_row: int | None = None  # upper bound of blocks in a row, or None
    seed: int = 0  # seed of the starts
    context: int | None = None  # the base's context, or None

    def __call__(self, drawn: Sequence[DrawnRow]) -> MaskedInput:
        """The batch."""
        (epoch,) = {item.epoch for item in drawn}
        return build_masked_input(
            [item.row for item in drawn],
            self.num_masks,
            block_fraction=self.block_fraction,
            max_blocks_per_row=self.max_blocks_per_row,
            seed=self.seed,
            epoch=epoch,
            context=self.context,
            row_multiple=ROW_MULTIPLE,
            block_multiple=block_multiple(self.max_blocks_per_row),
        )
