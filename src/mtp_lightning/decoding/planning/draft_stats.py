# SPDX-License-Identifier: Apache-2.0
"""What is known of drafts: how often those of a probability are kept, what their steps take, and how one row's do lately."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from mtp_lightning.decoding.planning.draft_values import DraftValues
from mtp_lightning.decoding.planning.step_costs import Pace
from mtp_lightning.decoding.planning.text_lookup import FoundDraft, LookupRecord, TextLookup

if TYPE_CHECKING:
    from mtp_lightning.decoding.planning.draft_plan import Plan

BINS = 20
MEMORY = 800.0
"""Kept and verified drafts in a bin of the correction are forgotten beyond about so many."""
HOPE = 0.5
"""Standard errors by which a chance is taken to be better than was seen: after bad luck it would never be tried again."""


class DraftStats:
    """How often drafts of a probability were kept, and how blocks of this model do in general. Shared by all texts.

    Args:
        num_masks: k.

    Attributes:
        usual: the chance of each draft of a block, given that those before are kept.
        lookups: how texts go on where they were read off themselves.
        values: what drafts are worth, by rows of the batch and what plans there are.
        pace: what steps take.
        since_plain: steps since the last plain one, of all texts, by powers of two of the rows.
        shapes: plans that were carried out before, with the rows of the batch.
        taken: for plans that are graphs, with the batch, the seconds they take and the steps that say so.
    """

    def __init__(self, num_masks: int) -> None:
        middles = (np.arange(BINS) + 0.5) / BINS
        weight = 8.0  # drafts that the head's own word counts for
        self._verified = np.full(BINS, weight)
        self._kept = middles * weight
        self.usual = np.linspace(0.6, 0.4, num_masks)
        self.lookups = LookupRecord()
        self.values: dict[tuple[int, tuple[int, ...], tuple[str, ...]], DraftValues] = {}
        self.pace = Pace()
        self.since_plain: dict[int, int] = {}
        self.shapes: set[tuple[int, Plan]] = set()
        self.taken: dict[tuple[tuple[int, int], Plan], tuple[float, int]] = {}

    def chance(self, probability: np.ndarray) -> np.ndarray:
        """The corrected chance that a draft of this probability is kept, once it is reached."""
        place = np.clip(probability * BINS - 0.5, 0, BINS - 1)
        kept = self._kept / self._verified
        doubt = np.sqrt(kept * (1 - kept) / self._verified)
        return np.interp(place, np.arange(BINS), np.minimum(kept + HOPE * doubt, 1.0))

    def learn(self, probabilities: Sequence[float], kept: int, verified: int) -> None:
        """Take note of one row's step: of the drafts that were looked at all but the last were kept."""
        for j in range(min(kept + 1, verified)):
            bin_ = min(int(probabilities[j] * BINS), BINS - 1)
            if self._verified[bin_] > MEMORY:
                self._verified[bin_] *= 0.5
                self._kept[bin_] *= 0.5
            self._verified[bin_] += 1
            self._kept[bin_] += j < kept


@dataclass
class RowStats:
    """What is known of one row.

    Attributes:
        mean: chance of each draft of a block, given that the ones before are kept; lately, in this text.
        probabilities: the head's probabilities of the drafts that wait.
        blocks: blocks that the mean is over, what other texts say counting as one.
        text: where drafts are looked for in the text; None: nowhere.
        lookups: how this text goes on where it was read off itself.
        offered: the draft that the text offers.
        found: the same where it is to be verified, in place of the block's.
        lacking: which part of a block's worth the drafts that the text offers do not bring already; lately.
    """

    mean: np.ndarray
    probabilities: list[float] = field(default_factory=list)
    blocks: int = 1
    text: TextLookup | None = None
    lookups: LookupRecord | None = None
    offered: FoundDraft | None = None
    found: FoundDraft | None = None
    lacking: float = 1.0
