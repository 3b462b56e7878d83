# SPDX-License-Identifier: Apache-2.0
"""How many masks a pass has by its load."""

from __future__ import annotations

from typing import Any

import pytest

from mtp_lightning.errors import UsageError
from mtp_lightning.integrations.vllm.load_table import PLAIN, Blocks, LoadTable, default_loads, parse_loads

ROWS = [[2, "quadratic", 4], [5, "linear", 4], [9, "linear", 2]]


def test_higher_loads_have_fewer_masks() -> None:
    table = LoadTable(parse_loads(ROWS, 4), max_rows=1000)
    chosen = [table.choose(num_requests, num_requests) for num_requests in (1, 2, 3, 5, 6, 9, 10)]
    assert chosen == [Blocks(5, 4)] * 2 + [Blocks(1, 4)] * 2 + [Blocks(1, 2)] * 2 + [PLAIN]


def test_masks_never_exceed_the_rows_of_a_pass() -> None:
    table = LoadTable(parse_loads(ROWS, 4), max_rows=50)
    assert [table.choose(2, num_tokens) for num_tokens in (10, 11, 42, 43, 46, 47)] == [
        Blocks(5, 4),  # 10 + 2 * 20
        Blocks(1, 4),
        Blocks(1, 4),  # 42 + 2 * 4
        Blocks(1, 2),
        Blocks(1, 2),  # 46 + 2 * 2
        PLAIN,
    ]


def test_alternating_adds_masks_only_where_nothing_is_verified() -> None:
    table = LoadTable(parse_loads([[4, "alternating", 3], [9, "linear", 2]], 4), max_rows=1000)
    assert [table.choose(4, num_tokens) for num_tokens in (4, 5, 16)] == [Blocks(1, 3), PLAIN, PLAIN]


@pytest.mark.parametrize("num_masks", [1, 4, 8, 100])
def test_default_table(num_masks: int) -> None:
    table = LoadTable(parse_loads(default_loads("quadratic", num_masks), num_masks), max_rows=10**6)
    chosen = [table.choose(num_requests, num_requests) for num_requests in range(1, 2000)]
    assert chosen[0] == Blocks(num_masks + 1, num_masks) and chosen[-1] == PLAIN
    assert [blocks.rows for blocks in chosen] == sorted((blocks.rows for blocks in chosen), reverse=True)
    linear = parse_loads(default_loads("linear", num_masks), num_masks)
    assert [load.blocks for load in linear] == [Blocks(1, num_masks)]


@pytest.mark.parametrize(
    ("rows", "word"),
    [
        ({"1": "linear"}, "load_table"),
        ([[1, "linear"]], "load_table"),
        ([[1, "cubic", 2]], "cubic"),
        ([[1, "linear", 5]], "masks"),
        ([[1, "linear", 0]], "masks"),
        ([[2, "linear", 2], [2, "linear", 1]], "requests"),
        ([[0, "linear", 2]], "requests"),
    ],
)
def test_wrong_tables(rows: Any, word: str) -> None:
    with pytest.raises(UsageError, match=word):
        parse_loads(rows, 4)
