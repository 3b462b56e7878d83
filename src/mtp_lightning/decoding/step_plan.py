# SPDX-License-Identifier: Apache-2.0
"""From what rows have to verify to the layouts that a step feeds."""

from __future__ import annotations

from typing import NamedTuple

from mtp_lightning.decoding.options import Decoding
from mtp_lightning.decoding.planning.draft_plan import Plan
from mtp_lightning.decoding.step_masks import StepLayout


class StepPlan(NamedTuple):
    """What a step feeds for every row.

    Attributes:
        num_drafts: draft tokens fed for each row, c.
        drafted: how many of them are to be verified, one a row.
        layouts: the different layouts, of one size.
        choice: which one each row has.
    """

    num_drafts: int
    drafted: list[int]
    layouts: tuple[StepLayout, ...]
    choice: list[int]


def _plan(num_drafts: int, drafted: list[int], each: list[StepLayout]) -> StepPlan:
    layouts = tuple(dict.fromkeys(each))
    return StepPlan(num_drafts, drafted, layouts, [layouts.index(layout) for layout in each])


def prompt_plan(decoding: Decoding, lengths: list[int], num_masks: int) -> StepPlan:
    """The first step: prompts, padded at their ends, and one block after each prompt's last token.

    Args:
        decoding: the kind of decoding.
        lengths: tokens of each prompt.
        num_masks: masks in a block.

    Returns:
        The plan.
    """
    blocks = num_masks > 0 and decoding != "autoregressive"
    each = [StepLayout(max(lengths), n - 1, ((n - 1, num_masks),) if blocks else ()) for n in lengths]
    return _plan(0, [0] * len(lengths), each)


def step_plan(decoding: Decoding, drafts: list[int], num_masks: int, padded: bool = False) -> StepPlan:
    """A later step: the last verified token, the drafts, and blocks.

    Args:
        decoding: quadratic: a block after each of these tokens; linear: one after the row's last draft.
        drafts: draft tokens of each row.
        num_masks: masks in a block.
        padded: whether shapes are to be few: where there are drafts there is room for ``num_masks`` of them.

    Returns:
        The plan.
    """
    c = max(drafts)
    if padded and c:
        c = max(c, num_masks)
    if decoding == "autoregressive" or num_masks == 0:
        return _plan(c, drafts, [StepLayout(1 + c, 0, ())] * len(drafts))
    if decoding == "quadratic":
        return _plan(c, drafts, [StepLayout(1 + c, 0, tuple((start, num_masks) for start in range(c + 1)))] * len(drafts))
    return _plan_of({count: StepLayout(1 + c, 0, ((count, num_masks),)) for count in range(c + 1)}, c, drafts, padded)


def budgeted_plan(drafts: list[int], spent: Plan, padded: bool = False) -> StepPlan:
    """A later step as a budget wants it.

    Args:
        drafts: draft tokens that each row has.
        spent: what to feed.
        padded: whether shapes are to be few, as in ``step_plan``.

    Returns:
        The plan.
    """
    c = spent.num_drafts
    drafted = [min(count, c) for count in drafts]
    return _plan_of({count: StepLayout(1 + c, 0, spent.blocks(count)) for count in range(c + 1)}, c, drafted, padded)


def _plan_of(layout_of: dict[int, StepLayout], num_drafts: int, drafted: list[int], padded: bool) -> StepPlan:
    """A plan whose rows have the layouts of their numbers of drafts; padded: always with all layouts that there might be."""
    if not padded:
        return _plan(num_drafts, drafted, [layout_of[count] for count in drafted])
    layouts = tuple(dict.fromkeys(layout_of.values()))
    return StepPlan(num_drafts, drafted, layouts, [layouts.index(layout_of[count]) for count in drafted])
