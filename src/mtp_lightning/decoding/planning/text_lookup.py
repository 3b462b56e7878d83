# SPDX-License-Identifier: Apache-2.0
"""Prompt lookup: drafts read off the text itself, from where its last tokens stood before.

Beyond the paper. Such a draft costs neither masks nor head, and text that quotes (code, summaries, edits, loops) keeps many.
Whether it is verified is decided as for any draft: by the chance of each token, here given how many tokens matched.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

GRAMS = (1, 2, 4)
"""Runs of tokens by which an earlier occurrence is found; of each the last occurrence is known, and the longest counts."""
LONGEST = 16
"""Matching tokens are counted as far as this."""
GUESS = 4.0
"""Continuations that count for as much as the guess does where none were seen."""
DOUBT = 1.0
"""Standard errors by which a chance is taken to be worse than was seen: nothing needs to be tried to become known, and of
many chances those that look good are those that were overrated."""
ALL_TEXTS, ONE_TEXT = 200.0, 30.0
"""Continuations of a match of one length that are remembered, of all texts and of one."""


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
        at = 0
        for size, behind in zip(GRAMS, self._behind, strict=True):
            place = behind.get(hash(tuple(text[end - size :]))) if size <= end else None
            if place is None or text[place - size : place] != text[end - size :]:
                break  # nor has a longer run stood anywhere
            at = place
        if not at:
            return None
        matched = 1
        while matched < min(at, LONGEST) and text[at - 1 - matched] == text[end - 1 - matched]:
            matched += 1
        tokens = text[at : at + most]
        while len(tokens) < most:
            tokens.append(tokens[len(tokens) - (end - at)])
        return FoundDraft(tokens, matched)


class LookupRecord:
    """How often a text went on as it had before, by the number of tokens that matched.

    Args:
        guess: the chances where nothing was seen, by matching tokens from 1 on, [``LONGEST``]; None: some that rise.
        memory: continuations of a match of one length are forgotten beyond about so many.

    Attributes:
        mean: how often a text went on as before, by matching tokens from 1 on.
        table: the same by ``DOUBT`` lower, which is what plans go by.
    """

    def __init__(self, guess: Sequence[float] | None = None, memory: float = ALL_TEXTS) -> None:
        self._memory = memory
        self.mean = [0.2 + 0.7 * n / (LONGEST - 1) for n in range(LONGEST)] if guess is None else list(guess)
        self.table = list(self.mean)
        self._seen = [GUESS] * LONGEST
        self._same = [GUESS * chance for chance in self.mean]
        for place in range(LONGEST):
            self._tell(place)

    def _tell(self, place: int) -> None:
        seen = self._seen[place]
        self.mean[place] = mean = self._same[place] / seen
        self.table[place] = max(0.0, mean - DOUBT * math.sqrt(mean * (1 - mean) / seen))

    def chances(self, found: FoundDraft) -> list[float]:
        """The chance of each token of a draft, given that those before it are kept."""
        begin, count = found.matched - 1, len(found.tokens)
        deep = self.table[begin : begin + count]
        return deep if len(deep) == count else deep + self.table[-1:] * (count - len(deep))

    def learn(self, found: FoundDraft, tokens: Sequence[int]) -> None:
        """Take note of how the text went on, whether or not the draft was verified."""
        place = found.matched - 1
        for draft, token in zip(found.tokens, tokens, strict=False):
            self._seen[place] += 1
            self._same[place] += draft == token
            if self._seen[place] > self._memory:
                self._seen[place] *= 0.5
                self._same[place] *= 0.5
            self._tell(place)
            if draft != token:
                return
            place = min(place + 1, LONGEST - 1)
