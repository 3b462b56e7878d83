# SPDX-License-Identifier: Apache-2.0
"""Where masks are and what they see, against loops over requests, blocks and masks."""

from __future__ import annotations

import pytest
import torch

from mtp_lightning.integrations.vllm.layout import make_layout, mask_positions, sees_own, sees_recent
from mtp_lightning.integrations.vllm.load_table import Blocks

QUERY_LENS, SEQ_LENS = [3, 1, 5], [9, 1, 5]
"""In the middle of a text; its first token alone; a whole prompt."""


@pytest.mark.parametrize("blocks", [Blocks(3, 2), Blocks(1, 4)], ids=["quadratic", "linear"])
def test_layout(blocks: Blocks) -> None:
    begins = [0, 3, 4, 9]
    layout = make_layout(
        10, torch.tensor([*begins, 9]), torch.tensor(SEQ_LENS, dtype=torch.int32), blocks
    )  # one row of padding
    positions = mask_positions(layout, 10).view(3, blocks.number, blocks.masks)
    recent = sees_recent(layout)
    assert (layout.num_requests, layout.num_masks) == (3, 3 * blocks.rows)
    for r, (query_len, seq_len) in enumerate(zip(QUERY_LENS, SEQ_LENS, strict=True)):
        first = seq_len - blocks.number  # position of the first block's token
        assert int(layout.before[r]) == max(first, 0)
        for w in range(blocks.number):
            in_pass = first + w >= seq_len - query_len
            assert bool(layout.in_pass[r, w]) == in_pass
            if in_pass:
                assert int(layout.recent[r, w]) == begins[r] + first + w - (seq_len - query_len)
            for j in range(blocks.masks):
                mask = w * blocks.masks + j
                assert int(positions[r, w, j]) == min(max(first + w + j + 1, 0), 10)
                seen = [u <= w and first + u >= seq_len - query_len for u in range(blocks.number)]
                assert recent[r, mask].tolist() == seen


def test_masks_see_their_own_block() -> None:
    own = sees_own(Blocks(2, 3), torch.device("cpu"))
    block = [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    assert own.int().tolist() == [row + [0] * 3 for row in block] + [[0] * 3 + row for row in block]
