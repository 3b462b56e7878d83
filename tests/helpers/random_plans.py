# SPDX-License-Identifier: Apache-2.0
"""Plans and lookup drafts drawn at random, in place of the planner's. Helpers of the tests, no tests."""

from __future__ import annotations

import random

import pytest
from step_cost_examples import GENTLE
from tiny import VOCAB

from mtp_lightning.decoding import planner
from mtp_lightning.decoding.planner import AutoPlanner
from mtp_lightning.decoding.planning.draft_plan import Plan
from mtp_lightning.decoding.planning.text_lookup import LookupDraft
from mtp_lightning.decoding.state import DecodeState


def use_random_plans(monkeypatch: pytest.MonkeyPatch, seed: int) -> list[Plan]:
    """Draw plans at random; returns the list that they are appended to."""
    generator, plans = random.Random(seed), []

    def plan(self: AutoPlanner, state: DecodeState) -> Plan:
        sizes = [size for size in self.sizes if size <= state.max_useful_masks(self.num_masks)]
        for row in state.active:
            # Drafts of the text, and some that are nonsense, in place of the block's.
            if row.text_draft and generator.random() < 0.2:
                row.text_draft = LookupDraft([generator.randrange(VOCAB) for _ in row.text_draft.tokens], 3)
            if generator.random() < 0.5:
                row.text_draft = None
        # Also more drafts than there are: those beyond are not verified.
        most = max(row.num_waiting for row in state.active)
        c = generator.choice([size for size in self.sizes if size <= most + 2]) if state.num_steps else 0
        plans.append(Plan(c, generator.choice(sizes), generator.choice(["last", self.where])))
        return plans[-1]

    monkeypatch.setattr(AutoPlanner, "plan", plan)
    monkeypatch.setattr(AutoPlanner, "update", lambda *args: None)
    monkeypatch.setattr(planner, "step_seconds", lambda *args: GENTLE)
    return plans
