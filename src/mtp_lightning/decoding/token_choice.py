# SPDX-License-Identifier: Apache-2.0
"""How a token is chosen from logits: the base model's own token, the draft token, and whether a draft is kept.

Greedy: the largest logit. Sampling: the largest of log-probability plus keyed Gumbel noise, which is a draw from the
distribution and at the same time a function of prompt and seed alone. A draft token is drawn with the same noise, so that it
tends to be the token that will be drawn (drafter-invariant coupling, Daliri et al. 2025). The other rule is rejection
(Leviathan et al. 2023): keeps more drafts, but the text then depends on the drafts too; only its distribution is the base's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from mtp_lightning.decoding.noise import KEEP_STREAM, OWN_STREAM, TOKEN_STREAM, gumbel_noise, noise_keys, uniform_noise

if TYPE_CHECKING:
    from mtp_lightning.decoding.options import DecodingOptions
    from mtp_lightning.decoding.shortlist import Shortlist


class Prefixes(NamedTuple):
    """The tokens before each verified position, for processors that read them.

    Attributes:
        tokens: each row's text so far, at its front, [B, *] int64.
        lengths: tokens of each row before its first verified position.
        drafted: drafts of each row that are to be verified, where some have fewer than are fed; None: all.
    """

    tokens: Tensor
    lengths: list[int]
    drafted: list[int] | None = None


class TokenChoice:
    """Chooses tokens for the rows of a batch.

    Args:
        options: how to decode.
        seeds: one a row; not read when decoding is greedy.
        device: the logits' device.

    Attributes:
        greedy: whether the temperature is 0.
        rejects: whether drafts are verified by the rejection rule.
        processors: processors that read the text before a position.
        confident: whether drafts come with the probability that the drafting head gave them.
        shortlist: the tokens that drafts are chosen from; None: the whole vocabulary.
        least: a draft ends early once the chance that it is kept so far is below this in every row. 0: never; reading it
            makes the host wait, so it is for devices where the host computes.
    """

    def __init__(self, options: DecodingOptions, seeds: list[int], device: torch.device) -> None:
        self._settings = (options.temperature, options.top_k, options.top_p)
        self.greedy = options.temperature == 0
        self.rejects = not self.greedy and options.verification == "rejection"
        self.seeds = torch.tensor(seeds, device=device)
        self.confident = False
        self.shortlist: Shortlist | None = None
        self.least = 0.0
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
        self._nothing = torch.empty(0, 0, dtype=torch.int64, device=device)

    @property
    def key(self) -> tuple[Any, ...]:
        """Two choices without processors and with one key choose alike, but for the seeds."""
        return (*self._settings, self.rejects, self.confident, self.shortlist)

    def select(self, rows: Tensor) -> None:
        """Go on with these rows alone."""
        self.seeds = self.seeds.index_select(0, rows)

    def target(self, logits: Tensor, prefixes: Prefixes) -> Tensor:
        """The scores that the base model's own tokens are chosen from, after all processors.

        Args:
            logits: [B, C, V]; position c of row r comes after ``prefixes.lengths[r] + c`` tokens.
            prefixes: the texts.

        Returns:
            [B, C, V].
        """
        if self.processors:
            # A row alone and without padding, as it would be in a batch of one.
            rows = []
            for row, length in enumerate(prefixes.lengths):
                count = logits.shape[1] if prefixes.drafted is None else prefixes.drafted[row] + 1
                for c in range(count):
                    scores = logits[row, c : c + 1].clone()
                    for processor in self.processors:
                        scores = processor(prefixes.tokens[row : row + 1, : length + c], scores)
                    rows.append(scores)
                rows.append(logits[row, count:])  # nobody asks for these, and what stands before them is no text
            logits = torch.cat(rows).view(logits.shape)
        return self.warped(logits)

    def warped(self, logits: Tensor) -> Tensor:
        """Logits [B, C, V] after temperature, top-k and top-p; greedy: as they are."""
        if self.greedy:
            return logits
        if logits.dtype != torch.float64:
            logits = logits.float()
        if not self.warpers:
            return logits
        return self.warpers(self._nothing, logits.reshape(-1, logits.shape[-1])).view(logits.shape)

    def draw(self, scores: Tensor, positions: Tensor, stream: int = TOKEN_STREAM) -> Tensor:
        """The token at each position.

        Args:
            scores: [B, C, V].
            positions: absolute positions of the tokens, [B, C] int64.
            stream: which noise.

        Returns:
            [B, C] int64.
        """
        return self.noisy(scores, positions, stream).argmax(-1)

    def noisy(self, scores: Tensor, positions: Tensor, stream: int = TOKEN_STREAM, tokens: Tensor | None = None) -> Tensor:
        """What the largest is taken of.

        Args:
            scores: [B, C, V], or of some tokens alone, [B, C, N].
            positions: absolute positions of the tokens, [B, C] int64.
            stream: which noise.
            tokens: ids of these tokens, [N] int64; None: all.

        Returns:
            The scores with the noise of positions and tokens; greedy: as they are.
        """
        if self.greedy:
            return scores
        keys = noise_keys(self.seeds, positions, stream)
        return gumbel_noise(keys, scores.shape[-1] if tokens is None else tokens).add_(scores)

    def draft(self, logits: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Draft tokens, drawn as the base's own would be, but from the drafting head's logits.

        Args:
            logits: [B, C, V], or of the listed tokens, [B, C, N].
            positions: absolute positions of the tokens, [B, C] int64.

        Returns:
            Where each stands among the logits, [B, C], and the scores that they were chosen from.
        """
        scores = self.warped(logits)
        listed = None if self.shortlist is None else self.shortlist.tokens
        return self.noisy(scores, positions, tokens=listed).argmax(-1), scores

    def drafted(self, places: Tensor) -> Tensor:
        """The tokens that stand at places among a draft's logits."""
        return places if self.shortlist is None else self.shortlist.tokens[places]

    def reject(
        self, scores: Tensor, draft: Tensor, drafted: Tensor, draft_scores: Tensor | None, positions: Tensor
    ) -> Tensor:
        """The rejection rule at every position, each as if all before it were kept.

        A draft token d is kept with probability min(1, p(d) / q(d)); else the token is drawn from the normalised
        max(p - q, 0), and where there is no draft from p. Whether there is one must not depend on d.

        Args:
            scores: target scores, [B, c + 1, V].
            draft: draft tokens, [B, c].
            drafted: whether each is a draft to verify, [B, c] bool.
            draft_scores: what they were drawn from, [B, c, V]; None without drafts.
            positions: absolute positions, [B, c + 1] int64.

        Returns:
            The token at each position, equal to the draft's where that is kept, [B, c + 1].
        """
        c = draft.shape[1]
        p = scores.double().softmax(-1)
        weights = p
        keep = torch.zeros_like(drafted)
        if draft_scores is not None:
            q = draft_scores.double().softmax(-1)
            at = draft[..., None]
            u = uniform_noise(noise_keys(self.seeds, positions[:, :c], KEEP_STREAM))
            keep = drafted & (u * q.gather(-1, at)[..., 0] < p[:, :c].gather(-1, at)[..., 0])
            rest = (p[:, :c] - q).clamp_(min=0)
            # Where p and q are equal nothing is ever rejected, but rounding may leave nothing to draw from.
            rest = torch.where(drafted[..., None] & (rest.sum(-1, keepdim=True) > 0), rest, p[:, :c])
            weights = torch.cat([rest, p[:, c:]], dim=1)
        own = self.draw(weights.log(), positions, OWN_STREAM)
        return torch.cat([torch.where(keep, draft, own[:, :c]), own[:, c:]], dim=1)
