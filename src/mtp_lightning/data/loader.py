# SPDX-License-Identifier: Apache-2.0
"""Loading: which rows form which batch, on which rank and when; exact resume; one denominator per optimizer step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler

from mtp_lightning.data.collator import MaskedInputCollator
from mtp_lightning.data.packing import padding_share
from mtp_lightning.data.rows import Draw, DrawnRow, TokenRows
from mtp_lightning.errors import UsageError
from mtp_lightning.types import MaskedInput

ROWS_IN_A_BATCH = "rows in a batch (data.batch_size times ranks)"
"""Name of a setting that the order of the rows depends on."""
MAX_BUCKET_BATCHES = 50
"""Maximum number of batches whose rows are sorted by length together."""


class RowSampler(Sampler[list[Draw]]):
    """Batches of draws for one rank: every row once an epoch, in an order that depends on (seed, epoch) alone.

    Rows are shuffled and cut into *global* batches of ``batch_size * world`` rows, which the ranks share, so all ranks
    have the same number of batches. No row is dropped and none is drawn twice: the last global batch may be smaller, and
    a rank for which it holds no row gets a blank copy of one (no loss, nothing counted).

    ``lengths`` are the tokens of each row, [n] int. If ``bucketed``, rows of similar length form a batch, within windows of
    at most ``MAX_BUCKET_BATCHES`` batches. An iterator begins with batch ``begin`` of epoch ``epoch``.
    """

    def __init__(
        self, lengths: np.ndarray, batch_size: int, seed: int = 0, rank: int = 0, world: int = 1, bucketed: bool = True
    ) -> None:
        self.lengths = lengths
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world = world
        self.bucketed = bucketed
        self.epoch = 0
        self.begin = 0

    def __len__(self) -> int:
        return -(-len(self.lengths) // (self.batch_size * self.world))

    def global_batches(self, epoch: int) -> list[np.ndarray]:
        """Indices of the rows of each global batch, at most ``batch_size * world`` each, the same on all ranks."""
        size = self.batch_size * self.world
        generator = np.random.default_rng([self.seed, epoch])
        order = generator.permutation(len(self.lengths))
        if not self.bucketed:
            return [order[begin : begin + size] for begin in range(0, len(order), size)]
        # At least four windows: a single one would put the same rows together in every epoch.
        window = max(1, min(MAX_BUCKET_BATCHES, len(self) // 4)) * size
        batches = []
        for first in range(0, len(order), window):
            rows = order[first : first + window]
            rows = rows[np.argsort(self.lengths[rows], kind="stable")]
            batches += [rows[begin : begin + size] for begin in range(0, len(rows), size)]
        return [batches[number] for number in generator.permutation(len(batches))]

    def __iter__(self) -> Iterator[list[Draw]]:
        # Epoch and begin are read now, not when the first batch is requested: by then they may be another iterator's.
        return self._draws(self.global_batches(self.epoch)[self.begin :], self.epoch)

    def _draws(self, batches: list[np.ndarray], epoch: int) -> Iterator[list[Draw]]:
        for batch in batches:
            share = batch[self.rank :: self.world]
            yield [Draw(int(row), epoch) for row in share] or [Draw(int(batch[0]), epoch, blank=True)]

    def order_settings(self) -> dict[str, Any]:
        """What decides which rows form which batch over all ranks."""
        return {
            "rows": len(self.lengths),
            ROWS_IN_A_BATCH: self.batch_size * self.world,
            "data.seed": self.seed,
            "bucketed": self.bucketed,
        }

    def padding_share(self, max_batches: int = 1000) -> float:
        """The share of positions that is padding in this rank's first batches of epoch 0."""
        shares = [rows[self.rank :: self.world] for rows in self.global_batches(0)[:max_batches]]
        return padding_share([self.lengths[rows] for rows in shares if len(rows)])


def batches_delivered(state: dict[str, Any], order: dict[str, Any], num_batches: int) -> int:
    """How many batches of the state's epoch were delivered, of ``num_batches`` with the settings ``order``.

    UsageError if its batches held other rows than now: some rows would come twice and others never. Once the epoch is over
    that does not matter, unless it has more batches now: Lightning would leave out as many as the state counts.
    """
    delivered, before = state["delivered"], state.get("order", order)
    if before == order or not delivered:
        return int(delivered)
    if delivered >= state["batches"] >= num_batches:
        return num_batches
    name = next(name for name in order if before.get(name) != order[name])
    raise UsageError(
        f"the checkpoint's epoch has {name} {before.get(name)}, and now it is {order[name]}: resume with the same."
    )


class WindowedLoader:
    """Batches for Lightning, each with the counts of its whole optimizer step, and exact resume within an epoch.

    Each window of ``accumulate`` consecutive batches forms one optimizer step; every batch of it gets the window's summed
    counts, so that its losses divide by one denominator however the rows fall into batches.

    An epoch begins at the start of ``__iter__``: Lightning never exhausts an iterator of known length. The state is the
    epoch and the number of batches delivered, the same on all ranks. The sampler skips batches delivered before without
    reading them; only the open window is read again, for its counts.

    ``accumulate`` may be a function that returns it at the start of each epoch. ``limit`` batches are used of an epoch
    (None: all); the length stays that of the whole epoch. With ``constant`` every epoch is epoch 0, from its beginning: for
    validation.
    """

    def __init__(
        self,
        loader: DataLoader[Any],
        accumulate: int | Callable[[], int] = 1,
        limit: int | None = None,
        constant: bool = False,
        epoch: int = 0,
    ) -> None:
        self.loader = loader
        self.accumulate = accumulate
        self.num_batches = len(loader) if limit is None else min(limit, len(loader))
        self.constant = constant
        self.epoch = epoch
        self.delivered = 0
        self._advanced = False  # True once a batch has been delivered since the position was last set

    def __len__(self) -> int:
        return len(self.loader)

    def row_sampler(self) -> RowSampler:
        """The loader's batch sampler; not named ``sampler``, or Lightning would take this for a DataLoader."""
        sampler = self.loader.batch_sampler
        assert isinstance(sampler, RowSampler)
        return sampler

    def state_dict(self) -> dict[str, Any]:
        """Epoch, number of batches delivered, and what decides which rows are in them."""
        state = {"epoch": self.epoch, "delivered": self.delivered, "batches": self.num_batches}
        return state | {"order": self.row_sampler().order_settings()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state, taken on any rank; UsageError if the epoch that had begun would have other batches."""
        self.delivered = batches_delivered(state, self.row_sampler().order_settings(), self.num_batches)
        self.epoch, self._advanced = state["epoch"], False

    @property
    def is_over(self) -> bool:
        """True if the next iterator begins another epoch."""
        return self._advanced or self.delivered >= self.num_batches

    def __iter__(self) -> Iterator[MaskedInput]:
        if self.is_over:
            self.epoch, self.delivered = self.epoch + 1, 0
        if self.constant:
            self.epoch, self.delivered = 0, 0
        self._advanced = False
        return self._deliver()

    def _deliver(self) -> Iterator[MaskedInput]:
        accumulate = self.accumulate if isinstance(self.accumulate, int) else self.accumulate()
        skip = self.delivered % accumulate  # batches of the open window delivered before
        begin = self.delivered - skip
        sampler = self.row_sampler()
        sampler.epoch, sampler.begin = self.epoch, begin
        batches = islice(self.loader, self.num_batches - begin)
        while window := list(islice(batches, accumulate)):
            counts = torch.stack([batch.counts for batch in window]).sum(0)
            for batch in window[skip:]:
                self.delivered, self._advanced = self.delivered + 1, True
                yield batch._replace(counts=counts.clone())
            skip = 0


def build_dataloader(
    rows: TokenRows,
    collator: MaskedInputCollator,
    batch_size: int,
    seed: int = 0,
    rank: int = 0,
    world: int = 1,
    bucketed: bool = True,
    num_workers: int = 0,
) -> DataLoader[DrawnRow]:
    """A loader of the rows of one rank, for ``WindowedLoader``; the other arguments are those of ``RowSampler``.

    ``num_workers`` processes prepare batches in advance; the batches are the same.
    """
    return DataLoader(
        rows,
        batch_sampler=RowSampler(rows.lengths, batch_size, seed, rank, world, bucketed),
        collate_fn=collator,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        pin_memory=torch.cuda.is_available(),
        # Its own generator: an iterator draws a seed when it is made, and must not take it from the training's stream.
        generator=torch.Generator().manual_seed(seed),
    )
