# SPDX-License-Identifier: Apache-2.0
"""Load tables from costs of passes."""

from __future__ import annotations

import pytest

from mtp_lightning.integrations.vllm.choose_loads import ACCEPTANCE, choose_loads, gain
from mtp_lightning.integrations.vllm.load_table import Blocks, parse_loads


def cost(free_rows: int):
    """Rows are free up to a number, then each costs the same."""
    return lambda requests, drafts, blocks: max(free_rows, requests * (1 + drafts + blocks.rows)) / free_rows


@pytest.mark.parametrize("decoding", ["quadratic", "linear"])
@pytest.mark.parametrize("free_rows", [1, 12, 100, 1000])
def test_more_free_rows_allow_more_masks(decoding: str, free_rows: int) -> None:
    table = choose_loads(cost(free_rows), decoding, 4, 64)
    parse_loads(table, 4)
    if free_rows == 1:
        assert table == []
    else:
        assert table[0][1:] == ([decoding, 4] if free_rows >= 100 or decoding == "linear" else ["quadratic", 2])
        assert decoding == "quadratic" or {kind for _, kind, _ in table} == {"linear"}
        assert (table[-1][0] == 64) == (free_rows == 1000)


def test_gain_is_that_of_simulated_decoding() -> None:
    """Linear with one mask: a pass has a draft after one without, and after an accepted one."""
    drafted, tokens, seconds = 0.0, 0.0, 0.0
    one = cost(2)
    for _ in range(200):  # the share of passes with a draft converges
        tokens += 1 + drafted * ACCEPTANCE
        seconds += drafted * one(1, 1, Blocks(1, 1)) + (1 - drafted) * one(1, 0, Blocks(1, 1))
        drafted = drafted * ACCEPTANCE + 1 - drafted
    assert gain(one, 1, Blocks(1, 1)) == pytest.approx(tokens / seconds, rel=0.01)
