# SPDX-License-Identifier: Apache-2.0
"""Prompt lookup: drafts read off the text itself, from where its last tokens stood before.

Beyond the paper. Such a draft costs neither masks nor head, and text that quotes (code, summaries, edits, loops) keeps many.
Whether it is verified is decided as for any draft: by the chance of each token, here given how many tokens matched.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

GRAMS = (8, 4, 2, 1)
"""Runs of tokens by which an earlier occurrence is found, the longest first; of each the last occurrence is known."""
LONGEST = 16
"""Matching tokens are counted as far as this."""
MEMORY = 200.0
"""Continuations of a match of one length are forgotten beyond about so many."""


class FoundDraft(NamedTuple):
    """A draft from the text.

    Attributes:
        tokens: what followed the earlier occurrence.
        matched: tokens before it that are those at the text's end, at most ``LONGEST``.
    """

    tokens: list[int]
    matched: int


class TextLookup:
    """Finds where a text's last tokens stood before. A token costs the same however long the text is.

    Args:
        tokens: the text so far.
    """

    def __init__(self, tokens: Iterable[int] = ()) -> None:
        self._text: list[int] = []
        # By a run's hash, what stands behind it; a wrong one is found out, for tokens are compared.
        self._behind: tuple[dict[int, int], ...] = tuple({} for _ in GRAMS)
        self.extend(tokens)

    def extend(self, tokens: Iterable[int]) -> None:
        """The text goes on with these."""
        text = self._text
        for token in tokens:
            end = len(text)
            for size, behind in zip(GRAMS, self._behind, strict=True):
                if size <= end:
                    behind[hash(tuple(text[end - size :]))] = end
            text.append(token)

    def draft(self, most: int) -> FoundDraft | None:
        """The tokens that followed where the text's end stood before; a text that repeats itself goes on doing so.

        ``1 2 3 4 1 2`` -> ``3 4 1 2 3 ..``

        Args:
            most: tokens wanted.

        Returns:
            So many tokens, and how much matched; None: the last token is new.
        """
        text, end = self._text, len(self._text)
        for size, behind in zip(GRAMS, self._behind, strict=True):
            at = behind.get(hash(tuple(text[end - size :]))) if size <= end else None
            if at is None:
                continue
            matched = 0
            while matched < LONGEST and matched < at and text[at - 1 - matched] == text[end - 1 - matched]:
                matched += 1
            if matched:
                tokens = text[at : at + most]
                while len(tokens) < most:
                    tokens.append(tokens[len(tokens) - (end - at)])
                return FoundDraft(tokens, matched)
        return None


class LookupRecord:
    """How often a text went on as it had before, by the number of tokens that matched."""

    def __init__(self) -> None:
        weight = 4.0  # continuations that the guess counts for
        self._seen = np.full(LONGEST, weight)
        self._same = weight * np.linspace(0.2, 0.9, LONGEST)

    def chances(self, found: FoundDraft) -> np.ndarray:
        """The chance of each token of a draft, given that those before it are kept, [tokens]."""
        places = np.minimum(np.arange(found.matched - 1, found.matched - 1 + len(found.tokens)), LONGEST - 1)
        return self._same[places] / self._seen[places]

    def learn(self, found: FoundDraft, tokens: Sequence[int]) -> None:
        """Take note of how the text went on, whether or not the draft was verified."""
        for j, (draft, token) in enumerate(zip(found.tokens, tokens, strict=False)):
            place = min(found.matched + j, LONGEST) - 1
            if self._seen[place] >= MEMORY:
                self._seen[place] *= 0.5
                self._same[place] *= 0.5
            self._seen[place] += 1
            if draft != token:
                return
            self._same[place] += 1
