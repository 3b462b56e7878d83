# SPDX-License-Identifier: Apache-2.0
"""How a token is chosen from logits: the base model's own token and the draft token.

Greedy: the largest logit. Sampling: the largest of log-probability plus keyed Gumbel noise, which is a draw from the
distribution and at the same time a function of prompt and seed alone. A draft token is drawn with the same noise, so that it
tends to be the token that will be drawn (drafter-invariant coupling, Daliri et al. 2025).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from mtp_lightning.decoding.noise import TOKEN_STREAM, gumbel_noise, noise_keys
from mtp_lightning.decoding.options import DecodingOptions


class Prefixes(NamedTuple):
    """The tokens before each verified position, for processors that read them."""

    tokens: Tensor  # each row's text so far, at its front, [B, *] int64
    lengths: list[int]  # tokens of each row before its first verified position
    # drafts of each row that are verified, if some rows have fewer than are fed; None: all
    num_verified: list[int] | None = None


class TokenChoice:
    """Chooses tokens for the rows of a batch, with one seed per row, which is not read when decoding is greedy.

    The sampler head chooses each draft token from ``num_candidates``; None: from the whole vocabulary.
    """

    def __init__(
        self, options: DecodingOptions, seeds: list[int], device: torch.device, num_candidates: int | None = None
    ) -> None:
        self._settings = (options.temperature, options.top_k, options.top_p)
        self.greedy = options.temperature == 0
        self.use_rejection_sampling = not self.greedy and options.verification == "rejection"  # needs the drafts' scores
        self.seeds = torch.tensor(seeds, device=device)
        self.num_candidates = num_candidates
        # The order of transformers' generate: penalty, the user's own, then what shapes the distribution.
        self.processors: list[Any] = []
        if options.repetition_penalty != 1.0:
            self.processors.append(RepetitionPenaltyLogitsProcessor(float(options.repetition_penalty)))
        self.processors += options.logits_processor or []
        self.warpers = LogitsProcessorList()
        if not self.greedy:
            if options.temperature != 1.0:
                self.warpers.append(TemperatureLogitsWarper(float(options.temperature)))
            if options.top_k is not None:
                self.warpers.append(TopKLogitsWarper(options.top_k))
            if options.top_p is not None and options.top_p < 1.0:
                self.warpers.append(TopPLogitsWarper(float(options.top_p)))
        self._no_ids = torch.empty(0, 0, dtype=torch.int64, device=device)

    @property
    def key(self) -> tuple[Any, ...]:
        """Two choices without processors and with one key choose alike, apart from the seeds."""
        return (*self._settings, self.use_rejection_sampling, self.num_candidates)

    def select(self, rows: Tensor) -> None:
        """Keep the seeds of these rows."""
        self.seeds = self.seeds.index_select(0, rows)

    def target(self, logits: Tensor, prefixes: Prefixes) -> Tensor:
        """The scores that the base model's own tokens are chosen from, after all processors, [B, C, V].

        Position c of row r comes after ``prefixes.lengths[r] + c`` tokens.
        """
        if self.processors:
            # A row alone and without padding, as it would be in a batch of one.
            rows = []
            for row, length in enumerate(prefixes.lengths):
                count = logits.shape[1] if prefixes.num_verified is None else prefixes.num_verified[row] + 1
                for c in range(count):
                    scores = logits[row, c : c + 1].clone()
                    for processor in self.processors:
                        scores = processor(prefixes.tokens[row : row + 1, : length + c], scores)
                    rows.append(scores)
                rows.append(logits[row, count:])  # unused, and the tokens before them are padding
            logits = torch.cat(rows).view(logits.shape)
        return self.warped(logits)

    def warped(self, logits: Tensor) -> Tensor:
        """Logits [B, C, V] after temperature, top-k and top-p; greedy: unchanged."""
        if self.greedy:
            return logits
        if logits.dtype != torch.float64:
            logits = logits.float()
        if not self.warpers:
            return logits
        return self.warpers(self._no_ids, logits.reshape(-1, logits.shape[-1])).view(logits.shape)

    def draw(self, scores: Tensor, positions: Tensor, stream: int = TOKEN_STREAM) -> Tensor:
        """The token at each position, [B, C] int64, from scores [B, C, V] and absolute positions [B, C]."""
        # The first of equal scores, as argmax, which takes four times as long for bfloat16 on a CPU.
        return self.noisy(scores, positions, stream).max(-1).indices

    def noisy(self, scores: Tensor, positions: Tensor, stream: int = TOKEN_STREAM, tokens: Tensor | None = None) -> Tensor:
        """The scores plus the noise of positions and tokens, whose largest is drawn; greedy: unchanged.

        Scores are [B, C, V], or [B, C, N] of the token ids ``tokens``; positions [B, C] are absolute.
        """
        if self.greedy:
            return scores
        keys = noise_keys(self.seeds, positions, stream)
        return gumbel_noise(keys, scores.shape[-1] if tokens is None else tokens).add_(scores)

    def draft(self, logits: Tensor, positions: Tensor, tokens: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Draft tokens, drawn as the base's own would be, but from the drafting head's logits.

        Logits are [B, C, V], or [B, C, N] of the token ids ``tokens``. Returns the index of each draft token among the
        logits, [B, C], and the scores that it was chosen from.
        """
        scores = self.warped(logits)
        return self.noisy(scores, positions, tokens=tokens).argmax(-1), scores
