# SPDX-License-Identifier: Apache-2.0
"""What the parts of a served model share during a forward pass, and what the proposer reads after it. No vLLM."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mtp_lightning.integrations.vllm.layout import Layout
from mtp_lightning.integrations.vllm.load_table import PLAIN, Blocks


class Drafting(NamedTuple):
    """The masks of the last pass."""

    blocks: Blocks  # W blocks of k masks
    seq_lens: Tensor  # [R] int64
    hidden: Tensor  # hidden states, [R, W, k, D]
    logits: Tensor | None  # the base head's logits of them, [R, W, k, V], if they are known


class PassState:
    """Layout of the running pass; hidden states of the masks of the last one, in buffers that never move.

    A CUDA graph that is replayed runs no Python, so everything that the proposer reads is copied within the pass.

    Args:
        max_masks: largest number of masks in a pass.
        max_requests: largest number of requests in a pass.
        width: hidden size D.
        dtype: dtype of hidden states.
        device: their device.

    Attributes:
        layout: the running pass's; None: it has no masks, or no pass is running.
        blocks: what the CPU's attention reads of the running pass, the same in all layers; None: not computed yet.
        logits: the base head's logits of the last pass's masks, [R * W * k, V]; None: not computed.
    """

    def __init__(self, max_masks: int, max_requests: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
        self.layout: Layout | None = None
        self.blocks: Any = None
        self.logits: Tensor | None = None
        self.device = device
        self._hidden = torch.zeros(max_masks, width, dtype=dtype, device=device)
        self._seq_lens = torch.zeros(max_requests, dtype=torch.int64, device=device)
        self._sizes = torch.zeros(3, dtype=torch.int64, device=device)  # R, W, k

    @contextlib.contextmanager
    def running(self, layout: Layout) -> Iterator[None]:
        """The layout is that of the running pass within the ``with`` block."""
        self.layout, self.blocks = layout, None
        try:
            yield
        finally:
            self.layout = self.blocks = None

    def keep(self, layout: Layout | None, hidden: Tensor | None) -> None:
        """Keep what the proposer needs: the hidden states of the pass's masks, [R * W * k, D]. None: it has no masks."""
        self.logits = None
        blocks = PLAIN if layout is None else layout.blocks
        num_requests = 0 if layout is None else layout.num_requests
        for index, value in enumerate((num_requests, *blocks)):
            self._sizes[index].fill_(value)
        if layout is not None and hidden is not None:
            self._hidden[: layout.num_masks].copy_(hidden)
            self._seq_lens[:num_requests].copy_(layout.seq_lens)

    def mask_states(self) -> Tensor:
        """Hidden states of the last pass's masks, [R * W * k, D]; empty if it had none. Waits for the device."""
        num_requests, count, masks = self._sizes.tolist()
        return self._hidden[: num_requests * count * masks]

    def last(self) -> Drafting | None:
        """The masks of the last pass; None if it had none. Waits for the device."""
        num_requests, count, masks = self._sizes.tolist()
        if not num_requests * count * masks:
            return None
        shape = (num_requests, count, masks, -1)
        return Drafting(
            Blocks(count, masks),
            self._seq_lens[:num_requests],
            self._hidden[: num_requests * count * masks].view(shape),
            None if self.logits is None else self.logits.view(shape),
        )
