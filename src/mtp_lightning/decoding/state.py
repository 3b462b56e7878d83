# SPDX-License-Identifier: Apache-2.0
"""DecodeState: the rows in flight, and what a step makes of them."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mtp_lightning.decoding.execution.step import Drafts, RowOutput, StepOutput
from mtp_lightning.decoding.planning.draft_plan import Plan
from mtp_lightning.decoding.planning.text_lookup import LookupDraft
from mtp_lightning.decoding.row_cache import RowCache
from mtp_lightning.decoding.token_choice import TokenChoice


class StepTokens(NamedTuple):
    """What a row gained in a step."""

    tokens: list[int]  # the accepted drafts and the base model's own token, so at least one; cut after an end token
    drafts: list[int]  # the draft tokens that were verified

    @property
    def num_drafts(self) -> int:
        """Draft tokens that were verified."""
        return len(self.drafts)

    @property
    def rejected(self) -> list[int]:
        """The drafts from the first rejected one on; those after a text's end were not rejected."""
        same = next((i for i, (a, b) in enumerate(zip(self.tokens, self.drafts, strict=False)) if a != b), None)
        return [] if same is None else self.drafts[same:]


class RowStep(NamedTuple):
    """What a step gained in one row of a batch."""

    row: int  # number of the row
    step: StepTokens  # what it gained
    finish_reason: str | None  # ``stop`` after an end token, ``length`` at a limit; None: the row is not finished


class StepResult(NamedTuple):
    """What an executor returns."""

    output: StepOutput  # the step's tensors
    rows: list[RowOutput]  # what the host needs of each row


@dataclass(eq=False)
class Row:
    """A row that is being decoded."""

    number: int  # its number in the batch that was given
    length: int  # verified tokens, the prompt's included
    limit: int  # verified tokens that it may have
    num_fed: int  # tokens that the next step feeds before its drafts: the prompt's, later the last verified one
    num_drafts: int = 0  # draft tokens from its block of masks
    block_drafts: list[int] = field(default_factory=list)  # the same on the host
    # a draft proposed from the text itself, verified in place of the block's; None: there is none
    text_draft: LookupDraft | None = None
    num_verified: int = 0  # draft tokens that the last step verified
    # tokens of the last step: the accepted drafts and the base model's own
    gained: list[int] = field(default_factory=list)
    finish_reason: str | None = None  # ``stop`` after an end token, ``length`` at a limit; None: not finished
    active: bool = True  # False for a finished row that stays in the batch because shapes must not change

    def offer(self, draft: LookupDraft | None) -> None:
        """Propose a draft from the text; of several the one that matches most of the text is kept."""
        if draft is not None and (self.text_draft is None or draft.matched > self.text_draft.matched):
            self.text_draft = draft

    @property
    def num_accepted(self) -> int:
        """Draft tokens that the last step accepted."""
        return len(self.gained) - 1

    @property
    def num_waiting(self) -> int:
        """Draft tokens that wait to be verified."""
        return self.num_drafts if self.text_draft is None else len(self.text_draft.tokens)

    @property
    def waiting(self) -> list[int]:
        """The draft tokens that wait to be verified."""
        return self.block_drafts if self.text_draft is None else self.text_draft.tokens

    @property
    def max_drafts(self) -> int:
        """Draft tokens that may be verified: the base model adds one more."""
        return max(0, self.limit - self.length - 1)


class DecodeState:
    """The rows in flight: tokens, lengths, limits, seeds, drafts and KV cache."""

    def __init__(
        self,
        prompts: Sequence[Tensor],
        limits: Sequence[int],
        cache: RowCache,
        choice: TokenChoice,
        end_tokens: Set[int] = frozenset(),
        max_steps: int | None = None,
        fixed_shapes: bool = False,
    ) -> None:
        self.cache, self.choice, self.end_tokens, self.max_steps = cache, choice, end_tokens, max_steps
        self.fixed_shapes = fixed_shapes  # finished rows then keep their places, so that shapes of steps stay few
        self.num_steps = 0
        device = cache.tokens.device
        remaining = [prompt[held:].to(device) for prompt, held in zip(prompts, cache.lengths, strict=True)]
        self.rows = [
            Row(number, len(prompt), limit, len(rest))
            for number, (prompt, limit, rest) in enumerate(zip(prompts, limits, remaining, strict=True))
        ]
        # What the next step feeds before the drafts, [B, n] int64, padded at the end; then the drafts of blocks of masks.
        self.last_tokens = torch.nn.utils.rnn.pad_sequence(remaining, batch_first=True)
        self.drafts = Drafts(self.last_tokens[:, :0], None)

    @property
    def active(self) -> list[Row]:
        """The rows that are not finished."""
        return [row for row in self.rows if row.active]

    def max_useful_masks(self, num_masks: int) -> int:
        """The largest block of at most ``num_masks`` masks: those past the last token that a row may gain are useless."""
        if self.fixed_shapes:
            return num_masks
        return max(0, min(num_masks, max(row.limit - row.length for row in self.rows) - 2))

    def fed_tokens(self, num_drafts: int) -> tuple[Tensor, Tensor | None]:
        """The tokens of a step that verifies ``num_drafts`` drafts, [B, n + c], and what drafts were drawn from, [B, c, V].

        A row with fewer drafts is padded; what is added is not verified.
        """
        if not num_drafts:
            return self.last_tokens, None
        tokens, scores = self.drafts.tokens[:, :num_drafts], self.drafts.scores
        missing = num_drafts - tokens.shape[1]
        if missing > 0:
            tokens = F.pad(tokens, (0, missing))
        if scores is not None:
            scores = F.pad(scores[:, :num_drafts], (0, 0, 0, max(0, missing)))
        replaced = [
            [r, *(row.text_draft.tokens + [0] * num_drafts)[:num_drafts]]
            for r, row in enumerate(self.rows)
            if row.text_draft is not None
        ]
        if replaced:
            numbers = torch.tensor(replaced, device=tokens.device)  # one tensor: each copy to the device is waited for
            tokens = tokens.index_copy(0, numbers[:, 0], numbers[:, 1:])
        return torch.cat([self.last_tokens, tokens], dim=1), scores

    def prompts_fed(self) -> None:
        """The cache holds the prompts but for their last tokens, which the next step feeds."""
        last = torch.tensor([[row.num_fed - 1] for row in self.rows], device=self.last_tokens.device)
        self.last_tokens = self.last_tokens.gather(1, last)
        for row in self.rows:
            row.num_fed = 1

    def commit(self, plan: Plan, result: StepResult) -> list[RowStep]:
        """Advance every row by its accepted drafts and the base model's own token; returns what each row gained."""
        self.num_steps += 1
        output = result.output
        self.last_tokens = output.base_tokens.gather(1, output.num_accepted[:, None])
        gained = []
        for r, (row, row_output) in enumerate(zip(self.rows, result.rows, strict=True)):
            if not row.active:
                continue
            row.num_verified, row.gained = min(row.num_waiting, plan.num_drafts), row_output.tokens
            drafts = row.waiting[: row.num_verified]
            row.text_draft = None
            self.cache.lengths[r] += row.num_fed + row.num_accepted
            row.num_fed = 1
            row.length += len(row.gained)
            end = next((i for i, token in enumerate(row.gained, 1) if token in self.end_tokens), None)
            at_limit = row.length >= row.limit or self.num_steps == self.max_steps
            row.finish_reason = "stop" if end else "length" if at_limit else None
            gained.append(RowStep(row.number, StepTokens(row.gained[:end], drafts), row.finish_reason))
        return gained

    def compact(self, stopped: Set[int]) -> bool:
        """Drop finished rows, and those of these numbers, everywhere at once; returns True if rows are left."""
        kept = [
            r for r, row in enumerate(self.rows) if row.active and row.finish_reason is None and row.number not in stopped
        ]
        if self.fixed_shapes:
            for r in {*range(len(self.rows))}.difference(kept):
                self.rows[r].active, self.rows[r].num_drafts, self.rows[r].text_draft = False, 0, None
        elif kept and len(kept) < len(self.rows):
            self._keep(_filled(kept))
        return bool(kept)

    def _keep(self, kept: list[int]) -> None:
        self.cache.keep_rows(kept)
        self.rows = [self.rows[r] for r in kept]
        index = torch.tensor(kept, device=self.last_tokens.device)
        self.choice.select(index)
        self.last_tokens = self.last_tokens.index_select(0, index)
        scores = None if self.drafts.scores is None else self.drafts.scores.index_select(0, index)
        self.drafts = Drafts(self.drafts.tokens.index_select(0, index), scores)


def _filled(kept: list[int]) -> list[int]:
    """Rows that are kept, ordered so that as many as possible stay in their places: ``[0, 3, 4] -> [0, 4, 3]``."""
    staying = {r for r in kept if r < len(kept)}
    moving = [r for r in kept if r >= len(kept)]
    return [r if r in staying else moving.pop() for r in range(len(kept))]
