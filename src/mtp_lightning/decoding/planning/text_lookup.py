# SPDX-License-Identifier: Apache-2.0
"""Prompt lookup: drafts copied from the text itself, from an earlier occurrence of its last tokens.

Beyond the paper. Such a draft needs neither masks nor sampler head, and text that repeats (code, summaries, edits, loops)
accepts many. Whether it is verified is decided as for any draft, by the acceptance probability of each token, here as a
function of how many tokens matched.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from mtp_lightning.decoding.planning.rates import Rates

NGRAM_SIZES = (1, 2, 4)
"""Lengths of the n-grams that are indexed; of each n-gram the last occurrence is known, and the longest match counts."""
MAX_MATCH = 16
"""Matching tokens are counted up to this."""
PRIOR = 0.1, 0.8
"""Chance that a text continues as before after one matching token and after ``MAX_MATCH``; in between it rises evenly."""


class LookupDraft(NamedTuple):
    """A draft copied from the text."""

    tokens: list[int]  # what followed the earlier occurrence
    matched: int  # tokens before it that equal those at the end of the text, at most ``MAX_MATCH``


class LookupStats:
    """How often a text continued as it had before, by the number of matching tokens."""

    def __init__(self) -> None:
        self._rates = Rates(MAX_MATCH)

    def accept_probs(self, draft: LookupDraft) -> list[float]:
        """Acceptance probability of each token of a draft, given that those before it are accepted."""
        matches = range(draft.matched, draft.matched + len(draft.tokens))
        cases = [min(matched, MAX_MATCH) - 1 for matched in matches]
        return [self._rates.rate(case, PRIOR[0] + (PRIOR[1] - PRIOR[0]) * case / (MAX_MATCH - 1)) for case in cases]

    def learn(self, draft: LookupDraft, tokens: Sequence[int]) -> None:
        """Record how the text continued, ``tokens``; it does not matter if the draft was verified."""
        for matched, (drafted, token) in enumerate(zip(draft.tokens, tokens, strict=False), draft.matched):
            self._rates.observe(min(matched, MAX_MATCH) - 1, drafted == token)
            if drafted != token:
                return


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
