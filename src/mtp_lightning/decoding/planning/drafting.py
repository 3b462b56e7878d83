# SPDX-License-Identifier: Apache-2.0
"""How a text is drafted best: acceptance by depth, seen in the text's own tokens, and the rates of strategies by it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from mtp_lightning.decoding.planning.draft_plan import PLAIN, Plan
from mtp_lightning.decoding.planning.rates import Rates
from mtp_lightning.decoding.planning.text_lookup import LookupDraft, LookupStats

PRIOR = 0.5
"""Probability that a draft is accepted, before anything is known of a text."""


class RowStats:
    """What is known of one text."""

    def __init__(self, num_masks: int) -> None:
        self._num_masks, self._accepted = num_masks, Rates(num_masks)
        self.lookup = LookupStats()  # how often drafts that are looked up in the text are right
        self.last_lookup: LookupDraft | None = None  # the draft that was looked up last, None if nothing was found
        self._expected: list[int] = []  # tokens of the newest block that the text has not reached yet
        self._depth = 0

    def learn(self, tokens: Sequence[int], drafts: Sequence[int]) -> None:
        """Record the tokens that the text gained, and the drafts that it has now, which need not be verified to learn."""
        if self.last_lookup is not None:
            self.lookup.learn(self.last_lookup, tokens)
        for token in tokens:
            if not self._expected:
                break
            right = token == self._expected.pop(0)
            self._accepted.observe(self._depth, right)
            self._depth += 1
            if not right:
                self._expected.clear()
        if drafts:
            self._expected, self._depth = list(drafts), 0

    def accept_probs(self) -> list[float]:
        """The probability that each draft of a block is accepted, given that those before it are, [k].

        A draft is expected to be as good as the one before it until it has been seen.
        """
        probs = itertools.accumulate(
            range(self._num_masks), lambda prob, case: self._accepted.rate(case, prob), initial=PRIOR
        )
        return list(probs)[1:]


def path_probs(accept: Iterable[float]) -> list[float]:
    """The probability that a draft and all before it are accepted, for each draft."""
    return list(itertools.accumulate(accept, lambda path, prob: path * prob))


class Strategy(NamedTuple):
    """Blocks of m masks, whose drafts the next step verifies."""

    masks: int  # m; 0: plain decoding
    blocks_in_every_step: bool  # True if steps that verify place blocks too; False: every other step verifies, without masks


PLAIN_DECODING = Strategy(0, False)


def strategy_rates(
    accept: Sequence[float], num_rows: int, sizes: Sequence[int], where: str, seconds: Callable[[Plan], float]
) -> dict[Strategy, float]:
    """Expected tokens per second of all rows for each strategy with blocks placed at ``where`` (see ``Plan``).

    A row has drafts, or (where its last token got no block) it has none and the next step gives it a block: two states, so
    that the share of steps with drafts is 1 / (2 - probability of a block).
    """
    rates, path = {PLAIN_DECODING: num_rows / seconds(PLAIN)}, path_probs(accept)
    for m, in_every in itertools.product(sizes[1:], (False, True)):
        share = 1 / (2 - in_every * (path[m - 1] if where == "last" else 1.0))
        no_drafts = (1 - share) ** (num_rows if in_every else 1)  # share of the steps in which no row has drafts
        verifying = seconds(Plan(m, m, where) if in_every else Plan(m, 0, "last"))
        mean = no_drafts * seconds(Plan(0, m, "last")) + (1 - no_drafts) * verifying
        rates[Strategy(m, in_every)] = num_rows * (1 + share * sum(path[:m])) / mean
    return rates
