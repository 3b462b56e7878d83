# SPDX-License-Identifier: Apache-2.0
"""Where the masks of a forward pass are. Tensor operations on fixed shapes only, so that a graph can capture them. No vLLM.

Rows 0..T-1 of a pass are the scheduler's tokens, padding included; the masks of request 0, block 0 come next, and so on.
Every request has ``blocks.number`` blocks, after its last ``blocks.number`` tokens. A block whose token is not part of this
pass, because the request has fewer, is computed and never read.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mtp_lightning.integrations.vllm.load_table import Blocks


class Layout(NamedTuple):
    """The masks of a forward pass with T tokens and R requests."""

    num_tokens: int  # T
    blocks: Blocks  # W blocks of k masks
    seq_lens: Tensor  # tokens of each request's text, with those of this pass, [R] int64
    anchors: Tensor  # position of the token before each block, [R, W] int64; below 0 where there is none
    recent: Tensor  # row of that token, [R, W] int64; some other row of the pass where it is not in it
    in_pass: Tensor  # whether it is, [R, W] bool

    @property
    def num_requests(self) -> int:
        """R."""
        return self.seq_lens.shape[0]

    @property
    def num_masks(self) -> int:
        """Masks of all requests."""
        return self.num_requests * self.blocks.rows

    @property
    def before(self) -> Tensor:
        """Tokens of each text before its first block's token, [R] int64; 0 at least."""
        return self.anchors[:, 0].clamp(min=0)


def make_layout(num_tokens: int, query_start_loc: Tensor, seq_lens: Tensor, blocks: Blocks) -> Layout:
    """The layout of a pass.

    Args:
        num_tokens: T.
        query_start_loc: row of each request's first token, and the end, [R + 1] or longer, integers.
        seq_lens: tokens of each text, with those of this pass, [R] integers.
        blocks: what is added for each request.

    Returns:
        The layout, on the tensors' device.
    """
    seq_lens = seq_lens.long()
    R = seq_lens.shape[0]
    begin, end = query_start_loc[:R].long(), query_start_loc[1 : R + 1].long()
    back = torch.arange(blocks.number, 0, -1, device=seq_lens.device)
    rows = end[:, None] - back
    return Layout(
        num_tokens=num_tokens,
        blocks=blocks,
        seq_lens=seq_lens,
        anchors=seq_lens[:, None] - back,
        recent=rows.clamp(0, num_tokens - 1),
        in_pass=rows >= begin[:, None],
    )


def mask_positions(layout: Layout, max_position: int) -> Tensor:
    """Positions of the masks, [R * W * k] int64: m_j has its anchor's plus j. None is larger than the base allows."""
    steps = torch.arange(1, layout.blocks.masks + 1, device=layout.anchors.device)
    return (layout.anchors[..., None] + steps).clamp(0, max_position).flatten()


def sees_own(blocks: Blocks, device: torch.device) -> Tensor:
    """Which of a request's masks sees which: itself and those before it in its block, [W * k, W * k] bool."""
    index = torch.arange(blocks.rows, device=device)
    block = index // blocks.masks
    return (block[:, None] == block[None, :]) & (index[:, None] >= index[None, :])


def sees_recent(layout: Layout) -> Tensor:
    """Which mask sees which of its request's last W tokens, [R, W * k, W] bool, of those that are part of this pass."""
    block = torch.arange(layout.blocks.rows, device=layout.recent.device) // layout.blocks.masks
    token = torch.arange(layout.blocks.number, device=layout.recent.device)
    return (token <= block[:, None]) & layout.in_pass[:, None, :]
