# SPDX-License-Identifier: Apache-2.0
"""Prompt lookup: drafts copied from the text itself, from an earlier occurrence of its last tokens.

Beyond the paper. Such a draft needs neither masks nor sampler head, and text that repeats (code, summaries, edits, loops)
accepts many. Whether it is verified is decided as for any draft, by the acceptance probability of each token, here as a
function of how many tokens matched.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

NGRAM_SIZES = (1, 2, 4)
"""Lengths of the n-grams that are indexed; of each n-gram the last occurrence is known, and the longest match counts."""
MAX_MATCH = 16
"""Matching tokens are counted up to this."""
PRIOR_WEIGHT = 4.0
"""Observations that the prior counts for."""
PESSIMISM_STDERR = 1.0
"""Standard errors subtracted from an observed rate. Lookup drafts are observed even when they are not verified, so there is
nothing to explore, and of many noisy rates those that look best are overestimated."""
SHARED_MEMORY, TEXT_MEMORY = 200.0, 30.0
"""Observations per match length that are remembered, over all texts and within one text."""


class LookupDraft(NamedTuple):
    """A draft copied from the text."""

    tokens: list[int]  # what followed the earlier occurrence
    matched: int  # tokens before it that equal those at the end of the text, at most ``MAX_MATCH``


class LookupStats:
    """How often a text continued as it had before, by the number of matching tokens, from 1 to ``MAX_MATCH``.

    Args:
        prior: continuation rates before anything is observed, [``MAX_MATCH``]; None: rising from 0.2 to 0.9.
        memory: counts of a match length are halved beyond this number.

    Attributes:
        mean: observed continuation rates, prior included, [``MAX_MATCH``].
        lower: the same, lower by ``PESSIMISM_STDERR`` standard errors; plans use these.
    """

    def __init__(self, prior: Sequence[float] | None = None, memory: float = SHARED_MEMORY) -> None:
        self._memory = memory
        self.mean = [0.2 + 0.7 * n / (MAX_MATCH - 1) for n in range(MAX_MATCH)] if prior is None else list(prior)
        self.lower = list(self.mean)
        self._seen = [PRIOR_WEIGHT] * MAX_MATCH
        self._continued = [PRIOR_WEIGHT * rate for rate in self.mean]
        for i in range(MAX_MATCH):
            self._update(i)

    def _update(self, i: int) -> None:
        seen = self._seen[i]
        self.mean[i] = mean = self._continued[i] / seen
        self.lower[i] = max(0.0, mean - PESSIMISM_STDERR * math.sqrt(mean * (1 - mean) / seen))

    def accept_probs(self, draft: LookupDraft) -> list[float]:
        """Acceptance probability of each token of a draft, given that those before it are accepted."""
        first, count = draft.matched - 1, len(draft.tokens)
        probs = self.lower[first : first + count]
        return probs if len(probs) == count else probs + self.lower[-1:] * (count - len(probs))

    def learn(self, draft: LookupDraft, tokens: Sequence[int]) -> None:
        """Record how the text continued, ``tokens``; it does not matter if the draft was verified."""
        i = draft.matched - 1
        for drafted, token in zip(draft.tokens, tokens, strict=False):
            self._seen[i] += 1
            self._continued[i] += drafted == token
            if self._seen[i] > self._memory:
                self._seen[i] *= 0.5
                self._continued[i] *= 0.5
            self._update(i)
            if drafted != token:
                return
            i = min(i + 1, MAX_MATCH - 1)


class TextLookup:
    """Index of a text's n-grams. The cost per token does not depend on the length of the text."""

    def __init__(self, tokens: Iterable[int] = ()) -> None:
        self._text: list[int] = []
        # For each n-gram size: hash of the n-gram -> position after its last occurrence. Collisions are detected by draft().
        self._next: tuple[dict[int, int], ...] = tuple({} for _ in NGRAM_SIZES)
        self.extend(tokens)

    def extend(self, tokens: Iterable[int]) -> None:
        """Append tokens to the text."""
        text = self._text
        for token in tokens:
            end = len(text)
            for size, index in zip(NGRAM_SIZES, self._next, strict=True):
                if size <= end:
                    index[hash(tuple(text[end - size :]))] = end
            text.append(token)

    def draft(self, num_tokens: int) -> LookupDraft | None:
        """The ``num_tokens`` tokens that followed the last occurrence of the text's end, repeated periodically if needed.

        ``1 2 3 4 1 2`` -> ``3 4 1 2 3 ..``; None if the last token has not occurred before.
        """
        text, end = self._text, len(self._text)
        start = 0
        for size, index in zip(NGRAM_SIZES, self._next, strict=True):
            position = index.get(hash(tuple(text[end - size :]))) if size <= end else None
            if position is None or text[position - size : position] != text[end - size :]:
                break  # then longer n-grams do not match either
            start = position
        if not start:
            return None
        matched = 1
        while matched < min(start, MAX_MATCH) and text[start - 1 - matched] == text[end - 1 - matched]:
            matched += 1
        tokens = text[start : start + num_tokens]
        while len(tokens) < num_tokens:
            tokens.append(tokens[len(tokens) - (end - start)])
        return LookupDraft(tokens, matched)
