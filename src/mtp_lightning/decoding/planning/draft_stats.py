# SPDX-License-Identifier: Apache-2.0
"""Acceptance and timing statistics of drafts, of all texts of a model (``DraftStats``) and of one row (``RowStats``)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from mtp_lightning.decoding.planning.draft_plan import Plan
from mtp_lightning.decoding.planning.draft_values import DraftValues
from mtp_lightning.decoding.planning.step_costs import CurveCorrection
from mtp_lightning.decoding.planning.text_lookup import LookupDraft, LookupStats

NUM_BINS = 20
PRIOR_WEIGHT = 8.0
"""Drafts per bin that the head's own probability counts for."""
MEMORY = 800.0
"""Counts of a bin are halved beyond this number."""
OPTIMISM_STDERR = 0.5
"""Standard errors added to an observed acceptance rate: after bad luck it would never be tried again."""


class DraftStats:
    """Statistics over all texts: what drafts of this model are worth and what its steps take.

    Args:
        num_masks: k.

    Attributes:
        prior_accept_prob: acceptance probability of each draft of a block, given that those before are accepted, [k].
        lookup: how often drafts from the text itself are right.
        values: values of drafts, by rows of the batch, sizes and block positions of plans.
        correction: measured over expected seconds of steps.
        steps_since_plain: steps since the last plain one, by powers of two of the rows.
        seen_shapes: (rows, plan) of steps that have been run before.
        graph_seconds: mean seconds, and the number of steps behind it, of steps that run as graphs, by (batch, plan).
    """

    def __init__(self, num_masks: int) -> None:
        # Drafts verified and accepted, by bins of the head's probability.
        self._verified = np.full(NUM_BINS, PRIOR_WEIGHT)
        self._accepted = (np.arange(NUM_BINS) + 0.5) / NUM_BINS * PRIOR_WEIGHT
        self.prior_accept_prob = np.linspace(0.6, 0.4, num_masks)
        self.lookup = LookupStats()
        self.values: dict[tuple[int, tuple[int, ...], tuple[str, ...]], DraftValues] = {}
        self.correction = CurveCorrection()
        self.steps_since_plain: defaultdict[int, int] = defaultdict(int)
        self.seen_shapes: set[tuple[int, Plan]] = set()
        self.graph_seconds: dict[tuple[tuple[int, int], Plan], tuple[float, int]] = {}

    def accept_prob(self, head_prob: np.ndarray) -> np.ndarray:
        """Acceptance probability of drafts to which the head gives these probabilities, given that they are reached."""
        rate = self._accepted / self._verified
        stderr = np.sqrt(rate * (1 - rate) / self._verified)
        bin_position = np.clip(head_prob * NUM_BINS - 0.5, 0, NUM_BINS - 1)
        return np.interp(bin_position, np.arange(NUM_BINS), np.minimum(rate + OPTIMISM_STDERR * stderr, 1.0))

    def learn(self, head_probs: Sequence[float], num_accepted: int, num_verified: int) -> None:
        """Record one row's step: the first ``num_accepted`` drafts were accepted, the next one, if verified, rejected."""
        for j in range(min(num_accepted + 1, num_verified)):
            i = min(int(head_probs[j] * NUM_BINS), NUM_BINS - 1)
            if self._verified[i] > MEMORY:
                self._verified[i] *= 0.5
                self._accepted[i] *= 0.5
            self._verified[i] += 1
            self._accepted[i] += j < num_accepted


class RowOutcome(NamedTuple):
    """The outcome of a step for one row."""

    num_accepted: int  # drafts accepted
    num_verified: int  # drafts verified
    num_drafts: int  # drafts that the row has now from its block
    head_probs: Sequence[float]  # the head's probabilities of these, or none if it does not tell
    tokens: Sequence[int] = ()  # the tokens gained


@dataclass
class RowStats:
    """Statistics of one row."""

    # moving average of the acceptance probability of each draft of a block, given that those before are accepted,
    # [k]
    accept_prob: np.ndarray
    # the head's probabilities of the drafts that wait to be verified
    head_probs: list[float] = field(default_factory=list)
    num_blocks: int = 1  # blocks in the average; the prior counts for one
    lookup: LookupStats | None = None  # how often lookup drafts of this text are right; None: nothing is looked up
    lookup_draft: LookupDraft | None = None  # the draft that the text offers
    chosen_lookup: LookupDraft | None = None  # the same if it is to be verified, in place of the block's draft
    # moving average of the share of a block's expected tokens that lookup drafts do not already provide
    block_need: float = 1.0
