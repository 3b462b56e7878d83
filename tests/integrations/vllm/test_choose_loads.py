# SPDX-License-Identifier: Apache-2.0
"""Load tables from costs of passes."""

from __future__ import annotations

import pytest

from mtp_lightning.integrations.vllm.choose_loads import ACCEPTANCE, choose_loads, gain
from mtp_lightning.integrations.vllm.load_table import PLAIN, Blocks, parse_loads


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
        assert decoding == "quadratic" or "quadratic" not in {kind for _, kind, _ in table}
        assert (table[-1][0] == 64) == (free_rows == 1000)


def test_masks_that_cost_more_than_verification_alternate() -> None:
    assert (
        choose_loads(lambda _, drafts, blocks: 1.0 + 0.02 * drafts + 0.1 * blocks.rows, "linear", 4, 1)[0][1]
        == "alternating"
    )


@pytest.mark.parametrize("kind", ["linear", "alternating"])
def test_gain_is_that_of_simulated_decoding(kind: str) -> None:
    """One mask: a pass has a draft after one without, and in linear decoding after an accepted one too."""
    drafted, tokens, seconds = 0.0, 0.0, 0.0
    one = cost(2)
    for _ in range(200):  # the share of passes with a draft converges
        tokens += 1 + drafted * ACCEPTANCE
        verifying = Blocks(1, 1) if kind == "linear" else PLAIN
        seconds += drafted * one(1, 1, verifying) + (1 - drafted) * one(1, 0, Blocks(1, 1))
        drafted = 1 - drafted + (drafted * ACCEPTANCE if kind == "linear" else 0.0)
    assert gain(one, 1, kind, 1) == pytest.approx(tokens / seconds, rel=0.01)
