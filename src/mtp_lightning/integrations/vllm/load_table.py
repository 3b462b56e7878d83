# SPDX-License-Identifier: Apache-2.0
"""How many masks a pass has, by the number of requests in it: the more requests, the less a mask is worth. No vLLM."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from mtp_lightning.errors import UsageError


class Blocks(NamedTuple):
    """The blocks of masks that a pass adds for each request."""

    number: int  # after each of its last ``number`` tokens: 1 in linear decoding, k + 1 in quadratic, 0 in a plain pass
    masks: int  # masks in a block, k

    @property
    def rows(self) -> int:
        """Masks of a request."""
        return self.number * self.masks


PLAIN = Blocks(0, 0)


KINDS = ("quadratic", "linear", "alternating")
"""How passes draft: in each pass, or (alternating) one pass drafts with a block a request, and the next only verifies."""


class Load(NamedTuple):
    """A row of the table."""

    max_requests: int  # the largest number of requests that it is for
    blocks: Blocks  # what is added for each
    alternating: bool = False  # only in passes in which each request has one token, so that no draft is verified


class LoadTable:
    """Blocks by number of requests; above the last row a pass is plain.

    Args:
        loads: the rows, ascending.
        max_rows: the largest number of rows, tokens and masks together, that a pass may have.
    """

    def __init__(self, loads: Sequence[Load], max_rows: int) -> None:
        self.loads, self.max_rows = loads, max_rows

    def choose(self, num_requests: int, num_tokens: int) -> Blocks:
        """The blocks of a pass: the first row of the table that is for this load or a higher one and fits."""
        for load in self.loads:
            if num_requests <= load.max_requests and num_tokens + num_requests * load.blocks.rows <= self.max_rows:
                return PLAIN if load.alternating and num_tokens > num_requests else load.blocks
        return PLAIN


MASK_ROWS = 512
"""Masks of a pass up to which a GPU's default table adds them, about where rows stop being nearly free. Not measured."""


def default_loads(decoding: str, num_masks: int) -> list[list[Any]]:
    """A GPU's table without ``load_table``: quadratic, then linear, as long as masks are nearly free."""
    quadratic = max(1, MASK_ROWS // blocks_of("quadratic", num_masks).rows)
    linear = max(1, MASK_ROWS // num_masks)
    table: list[list[Any]] = [[linear, "linear", num_masks]]
    if decoding == "quadratic":
        table = [[quadratic, "quadratic", num_masks]] + (table if linear > quadratic else [])
    return table


def blocks_of(kind: str, num_masks: int) -> Blocks:
    """The blocks of one of ``KINDS``."""
    return Blocks(num_masks + 1 if kind == "quadratic" else 1, num_masks)


def parse_loads(rows: Any, num_masks: int) -> list[Load]:
    """The rows ``[max_requests, kind, masks]`` of the option ``load_table``; UsageError if one is wrong.

    ``num_masks`` is the largest number of masks that a row may have.
    """
    if not isinstance(rows, list) or not all(isinstance(row, list | tuple) and len(row) == 3 for row in rows):
        raise UsageError(f"load_table must be a list of [requests, {' or '.join(KINDS)}, masks], got {rows!r}.")
    loads: list[Load] = []
    for max_requests, kind, masks in rows:
        if kind not in KINDS:
            raise UsageError(f"load_table: the kind must be {', '.join(KINDS)}, got {kind!r}.")
        if not _is_positive(masks) or masks > num_masks:
            raise UsageError(f"load_table: masks must be from 1 to {num_masks}, got {masks!r}.")
        if not _is_positive(max_requests) or (loads and max_requests <= loads[-1].max_requests):
            raise UsageError(f"load_table: numbers of requests must be from 1 on and ascend, got {max_requests!r}.")
        loads.append(Load(max_requests, blocks_of(kind, masks), kind == "alternating"))
    return loads


def _is_positive(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
