# SPDX-License-Identifier: Apache-2.0
"""Proposers: where the drafts of the next step come from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from mtp_lightning.decoding.limits import resolve_num_masks, uses_prompt_lookup
from mtp_lightning.decoding.options import DecodingOptions
from mtp_lightning.decoding.planning.draft_plan import Plan
from mtp_lightning.decoding.planning.text_lookup import TextLookup
from mtp_lightning.decoding.state import DecodeState, StepResult
from mtp_lightning.modeling.network import MTPNetwork


class Proposer(Protocol):
    """Offers drafts after each step. How many are verified, and with ``auto`` whose, is the planner's decision."""

    def propose(self, state: DecodeState, plan: Plan, result: StepResult) -> None:
        """After a step by this plan, leave ``drafts`` and rows' ``num_drafts`` in the state, or ``Row.offer`` a draft."""
        ...


class HeadProposer:
    """The drafts that the step itself made: from its block of masks after the last accepted token."""

    def propose(self, state: DecodeState, plan: Plan, result: StepResult) -> None:
        """See ``Proposer``."""
        state.drafts = result.output.drafts
        num_drawn = state.drafts.tokens.shape[1]
        for row, row_output in zip(state.rows, result.rows, strict=True):
            if row.active:
                masks = dict(plan.blocks(row.num_verified)).get(row.num_accepted, 0)
                row.num_drafts = min(masks, num_drawn, row.max_drafts)
                row.block_drafts = row_output.drafts[: row.num_drafts]


class NgramProposer:
    """Prompt lookup: what followed the text's last tokens where they occurred before; ``prompts`` by number of the row."""

    def __init__(self, prompts: Sequence[Tensor], max_drafts: int) -> None:
        self.max_drafts = max_drafts
        self._texts = [TextLookup(prompt.tolist()) for prompt in prompts]

    def propose(self, state: DecodeState, plan: Plan, result: StepResult) -> None:
        """See ``Proposer``."""
        for row in state.active:
            text, length = self._texts[row.number], min(row.max_drafts, self.max_drafts)
            text.extend(row.gained)
            if length:
                row.offer(text.draft(length))


def make_proposers(model: MTPNetwork, options: DecodingOptions, prompts: Sequence[Tensor]) -> list[Proposer]:
    """The proposers that the options ask for.

    A draft from the text has at most J tokens, and needs coupled verification: the rejection rule would have to know the
    distribution that it was drawn from.
    """
    proposers: list[Proposer] = [HeadProposer()]
    if uses_prompt_lookup(model, options):
        proposers.append(NgramProposer(prompts, resolve_num_masks(model, options)))
    return proposers
