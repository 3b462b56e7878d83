# SPDX-License-Identifier: Apache-2.0
"""Texts whose drafts are right as a test says, decoded by a planner without a model. Helpers of the tests, no tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

from mtp_lightning.decoding.execution.step import RowOutput
from mtp_lightning.decoding.planner import AutoPlanner
from mtp_lightning.decoding.planning.draft_plan import Plan
from mtp_lightning.decoding.planning.text_lookup import TextLookup
from mtp_lightning.decoding.state import Row

K = 8


def simulate(
    planner: AutoPlanner, num_right: Callable[[int], int], steps: int, texts: Sequence[Sequence[int]] | None = None
) -> tuple[list[Plan], int]:
    """Decode for a number of steps; returns the plans and the number of tokens.

    ``num_right`` says how many drafts of a block are right, by the number of the block. ``texts`` are the tokens of each
    row; only with them drafts are looked up.
    """
    lookups = [TextLookup() for _ in texts or ()]
    texts = texts or [list(range(20 * steps))]
    rows = [Row(number, 0, len(text), 1) for number, text in enumerate(texts)]
    state: Any = SimpleNamespace(rows=rows, active=rows, num_steps=0, max_useful_masks=lambda masks: masks)
    plans, blocks, total, num_drafts = list[Plan](), [list[int]() for _ in rows], 0, 0
    for _ in range(steps):
        plans.append(plan := planner.plan(state))
        drawn = []
        for row, text in zip(rows, texts, strict=True):
            drafts = (blocks[row.number][: row.num_drafts] if row.text_draft is None else row.text_draft.tokens)[
                : plan.num_drafts
            ]
            ahead = text[row.length :]
            accepted = next((i for i, draft in enumerate(drafts) if draft != ahead[i]), len(drafts))
            row.gained, row.length, row.text_draft = ahead[: accepted + 1], row.length + accepted + 1, None
            row.num_drafts = dict(plan.blocks(len(drafts))).get(accepted, 0)
            right = num_right(num_drafts)
            num_drafts += 1
            drawn.append([token if i < right else -1 for i, token in enumerate(text[row.length : row.length + plan.masks])])
            total += accepted + 1
            if lookups:
                lookups[row.number].extend(row.gained)
                row.offer(lookups[row.number].draft(K))
        blocks, state.num_steps = drawn, state.num_steps + 1
        result: Any = SimpleNamespace(rows=[RowOutput(row.gained, drafts) for row, drafts in zip(rows, drawn, strict=True)])
        planner.update(state, result)
    return plans, total
