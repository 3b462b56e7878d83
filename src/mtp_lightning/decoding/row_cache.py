# SPDX-License-Identifier: Apache-2.0
"""RowCache: keys and values of a batch whose rows have different lengths, in buffers that are allocated ahead.

Slot s of row r holds the token at position s of that row, and only its first ``lengths[r]`` slots count. A step writes its
positions after them, each row at its own place; rejected drafts are dropped by not advancing the length, and the next step
overwrites them. So nothing is cropped, moved or copied, except when the buffers grow, and when a row has finished and
another one takes its place. All layers keep all tokens: sliding windows are left to the mask, and their layers get the slots
that the window can reach.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from mtp_lightning.decoding.packed_linear import few_rows_differ
from mtp_lightning.modeling.attention import layer_windows

CHUNK = 32
"""Slots are allocated in multiples of this, and in bfloat16 on a CPU read so."""
BLOCK, PART = 512, 192
"""Where ``few_rows_differ``, a sum over slots is one of blocks, and a block's one of parts, or of halves below two parts."""
READ_AHEAD = PART
"""The most slots that are read after those that a step fills."""


class _Place:
    """Where a step writes and what it reads, shared by all layers."""

    def __init__(self) -> None:
        self.rows = 0
        self.capacity = 0
        self.begin: int | None = 0  # the same for all rows, or None: see columns
        self.columns: Tensor | None = None  # each row's slots, [B, Q], or None: see index
        self.index: tuple[Any, ...] = ()
        self.end = 0
        self.first: dict[int | None, int] = {}
        self._begins: dict[tuple[int, int, int], Tensor] = {}
        self._lines: dict[tuple[int, int], tuple[Tensor]] = {}

    def write_at(self, columns: Tensor) -> None:
        """Make the next step write each row at its own slots, [B, Q] int64."""
        self.begin, self.columns = None, columns
        self._lines.clear()

    def lines(self, extent: tuple[int, int]) -> tuple[Tensor]:
        """Index [B, H, Q] of the step's positions in a buffer [B, H, slots, head] viewed as [B * H * slots, head].

        ``extent`` is (H, slots); layers with the same one share the index.
        """
        if extent not in self._lines:
            assert self.columns is not None
            rows, (heads, slots) = len(self.columns), extent
            key = rows, heads, slots
            if key not in self._begins:
                begins = torch.arange(0, rows * heads * slots, slots, device=self.columns.device)
                self._begins[key] = begins.view(rows, heads, 1)
            self._lines[extent] = (self.columns[:, None] + self._begins[key],)
        return self._lines[extent]


class RowLayer(CacheLayerMixin):
    """The keys and values of one layer, with its sliding window or None."""

    is_croppable = False
    is_sliding = False

    def __init__(self, place: _Place, window: int | None) -> None:
        super().__init__()
        self.place, self.window = place, window

    def hold(self, keys: Tensor, values: Tensor) -> None:
        """Take buffers, [B, H, slots, head] each, contiguous."""
        self.keys, self.values = keys, values
        self.extent = keys.shape[1], keys.shape[2]
        self.flat = keys.view(-1, keys.shape[3]), values.view(-1, values.shape[3])  # here, for views take time too

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate the buffers. Zeros: a slot that no row has written is masked, but NaN times 0 would be NaN."""
        rows, capacity = self.place.rows, self.place.capacity
        buffers = [s.new_zeros(rows, s.shape[1], capacity, s.shape[3]) for s in (key_states, value_states)]
        self.hold(*buffers)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write a step's keys and values; returns those that its queries may see, [B, H, W, head] each."""
        if self.keys is None:
            self.lazy_initialization(key_states, value_states)
        place = self.place
        keys, values = self.keys, self.values
        if place.begin is not None:
            size = key_states.shape[2]
            keys.narrow(2, place.begin, size).copy_(key_states)
            values.narrow(2, place.begin, size).copy_(value_states)
        elif place.columns is not None:
            lines = place.lines(self.extent)
            self.flat[0].index_put_(lines, key_states)
            self.flat[1].index_put_(lines, value_states)
        else:
            keys[place.index] = key_states.transpose(1, 2)
            values[place.index] = value_states.transpose(1, 2)
        first = place.first[self.window]
        size = place.end - first
        return keys.narrow(2, first, size), values.narrow(2, first, size)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys that a step sees, and the first one's slot. Unused, since ``StepMasks`` makes the masks."""
        return self.place.end - self.place.first[self.window], self.place.first[self.window]

    def get_seq_length(self) -> int:
        """The longest row."""
        return self.place.end

    def get_max_length(self) -> int:
        """No maximum: the buffers grow."""
        return -1


class RowCache(Cache):
    """The cache of a batch.

    Args:
        base: the base model.
        num_rows: rows B.

    Attributes:
        fixed: True if steps read all slots, whatever the lengths of rows, so that their shapes never change.
        exact: positions of each pass if all that it holds was computed by passes of one shape (``ExactExecutor``); else 0.
        whole_chunks: True if steps read slots in multiples of ``CHUNK``, so that steps of other sizes round alike.
        whole_parts: True if they must also read whole parts of a block for that.
        graphs: graphs of steps over these buffers, by what they feed; dropped when the buffers grow.
        lengths: tokens of each row that count.
        tokens: those tokens, and behind them what the last step fed, [B, capacity] int64.
        windows: the sliding windows that layers have; None: full attention.
    """

    def __init__(self, base: PreTrainedModel, num_rows: int) -> None:
        windows = layer_windows(base)
        self.windows = set(windows)
        self._place = _Place()
        self._place.rows = num_rows
        self.fixed = False
        self.whole_chunks = reads_whole_chunks(base)
        self.whole_parts = few_rows_differ(base.dtype)
        self.exact = 0
        self.graphs: dict[Any, Any] = {}
        self.lengths = [0] * num_rows
        self.tokens = torch.zeros(num_rows, 0, dtype=torch.int64, device=base.device)
        super().__init__(layers=[RowLayer(self._place, window) for window in windows])

    @property
    def capacity(self) -> int:
        """Slots of a row."""
        return self._place.capacity

    @property
    def num_bytes(self) -> int:
        """Bytes of the buffers."""
        buffers = [each for layer in self.layers for each in (layer.keys, layer.values) if each is not None]
        return sum(each.numel() * each.element_size() for each in buffers)

    def reserve(self, capacity: int, limit: int) -> None:
        """Allocate at least ``capacity`` slots and those read ahead; ``limit`` is the most that will ever be needed."""
        old = self.capacity
        if capacity <= old:
            return
        # Grow by a quarter at least, so that all copies together cost little.
        wanted = max(capacity, min(old + old // 4, limit))
        size = self._whole(-(-wanted // CHUNK) * CHUNK)
        self.graphs.clear()
        self.tokens = _grown(self.tokens, 1, size)
        for layer in self.layers:
            if layer.keys is not None:
                layer.hold(_grown(layer.keys, 2, size), _grown(layer.values, 2, size))
        self._place.capacity = size  # last: if it is interrupted (Ctrl-C, out of memory), the next call completes it

    def reach(self, num_positions: int) -> tuple[dict[int | None, int], int]:
        """The slots that the queries of a step of Q positions can see: the first one for each window, and the end."""
        if self.fixed:
            return dict.fromkeys(self.windows, 0), self.capacity
        shortest = min(self.lengths)
        first = {window: 0 if window is None else max(0, shortest - window + 1) for window in self.windows}
        end = max(self.lengths) + num_positions
        return first, self._whole(end)

    def _whole(self, end: int) -> int:
        """The slots to read in place of the first ``end``, so that steps of other sizes round alike."""
        if not self.whole_chunks:
            return end
        rest = end % BLOCK
        if self.whole_parts and PART < rest < 2 * PART:
            return end - rest + 2 * PART
        return -(-end // CHUNK) * CHUNK

    def begin_step(self, num_positions: int, fed: Tensor, slots: Tensor | None) -> None:
        """Set where the next forward pass, of Q positions, writes, after the tokens that count; record its tokens [B, T].

        ``slots`` are the lengths of the rows, [B, 1] int64; None if all are equal. Required if ``fixed``: a graph reads
        them.
        """
        place = self._place
        place.first, place.end = self.reach(num_positions)
        if slots is None:
            begin = self.lengths[0]
            place.begin = begin
            self.tokens[:, begin : begin + fed.shape[1]].copy_(fed)
            return
        columns = slots if num_positions == 1 else slots + torch.arange(num_positions, device=fed.device)
        if self.fixed:  # a graph may read the buffers only, not views of them that are replaced later
            rows = torch.arange(len(self.lengths), device=fed.device)[:, None]
            place.begin, place.columns, place.index = None, None, (rows, slice(None), columns)
            self.tokens[rows, columns[:, : fed.shape[1]]] = fed
            return
        place.write_at(columns)
        self.tokens.scatter_(1, columns.narrow(1, 0, fed.shape[1]), fed)

    def wipe(self) -> None:
        """Zero the slots after the tokens that count: steps that read all slots would spread a NaN from there."""
        for layer in self.layers:
            if layer.keys is not None:
                layer.keys[:, :, min(self.lengths) :].zero_()
                layer.values[:, :, min(self.lengths) :].zero_()

    def rewind(self, tokens: list[int]) -> None:
        """Keep of a single row its common prefix with another text, without that text's last token, which has to be fed."""
        held = self.tokens[0, : self.lengths[0]].tolist()
        pairs = zip(held, tokens[:-1], strict=False)
        self.lengths[0] = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(held), len(tokens) - 1))

    def keep_rows(self, sources: list[int]) -> None:
        """Continue with fewer rows: row ``sources[r]`` becomes row r. One that stays in place is not copied."""
        moved = [(target, source) for target, source in enumerate(sources) if source != target]
        if moved:
            targets, origins = torch.tensor(moved, device=self.tokens.device).unbind(1)
            length = max(self.lengths[source] for _, source in moved)
            self.tokens[targets, :length] = self.tokens[origins, :length]
            for layer in self.layers:
                layer.keys[targets, :, :length] = layer.keys[origins, :, :length]
                layer.values[targets, :, :length] = layer.values[origins, :, :length]
        self.lengths = [self.lengths[source] for source in sources]
        self._place.rows = len(sources)
        self.tokens = self.tokens[: len(sources)]
        for layer in self.layers:
            layer.hold(layer.keys[: len(sources)], layer.values[: len(sources)])


def reads_whole_chunks(base: PreTrainedModel) -> bool:
    """True where attention over a multiple of ``CHUNK`` slots rounds alike for every number of them, masked ones included.

    So it is on a CPU in bfloat16, while the kernel sums an odd number of keys in another order. A row of a product has the
    same bits with others too: with matrix units (AMX) with up to 31, elsewhere see ``few_rows_differ``. Then plain and
    speculative text are the same.
    """
    return base.device.type == "cpu" and base.dtype == torch.bfloat16


def _grown(buffer: Tensor, dim: int, size: int) -> Tensor:
    if buffer.shape[dim] >= size:  # has grown in a call that was interrupted
        return buffer
    shape = list(buffer.shape)
    shape[dim] = size
    grown = buffer.new_zeros(shape)
    grown.narrow(dim, 0, buffer.shape[dim]).copy_(buffer)
    return grown
