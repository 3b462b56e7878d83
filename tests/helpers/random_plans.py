# SPDX-License-Identifier: Apache-2.0
"""Plans and lookup drafts drawn at random, in place of the planner's. Helpers of the tests, no tests."""

from __future__ import annotations

import random

import pytest
from step_cost_examples import GENTLE
from tiny import VOCAB

from mtp_lightning.decoding import planner
from mtp_lightning.decoding.planning.budget import Budget
from mtp_lightning.decoding.planning.draft_plan import Plan
from mtp_lightning.decoding.planning.text_lookup import LookupDraft


def use_random_plans(monkeypatch: pytest.MonkeyPatch, seed: int) -> list[Plan]:
    """Draw plans at random; returns the list that they are appended to."""
    generator, plans = random.Random(seed), []

    def choose(self: Budget, max_masks: int, num_waiting: list[int], offers: list[LookupDraft | None]) -> Plan:
        sizes = [size for size in self.sizes if size <= max_masks]
        for row, offer in zip(self.rows, offers, strict=True):
            # Drafts of the text, and some that are nonsense, in place of the block's.
            row.lookup_draft = offer
            if offer and generator.random() < 0.2:
                row.lookup_draft = LookupDraft([generator.randrange(VOCAB) for _ in offer.tokens], 3)
            row.chosen_lookup = row.lookup_draft if generator.random() < 0.5 else None
        # Also more drafts than there are: those beyond are not verified.
        most = max([*num_waiting, *(len(row.chosen_lookup.tokens) for row in self.rows if row.chosen_lookup)], default=0)
        c, m = generator.choice([size for size in self.sizes if size <= most + 2]), generator.choice(sizes)
        plans.append(Plan(c, m, generator.choice(self.placements)))
        return plans[-1]

    monkeypatch.setattr(Budget, "choose", choose)
    monkeypatch.setattr(planner, "measure_step_costs", lambda *args: GENTLE)
    return plans
