# SPDX-License-Identifier: Apache-2.0
"""Drafts that are true up to a known place, and what a step keeps of them. Helpers of the tests, no tests."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from tiny import VOCAB, greedy_text, naive_states, tiny_base, tiny_model, token_row
from torch import Tensor

from mtp_lightning.decoding.execution.step import Drafts, StepInput
from mtp_lightning.decoding.token_choice import TokenChoice
from mtp_lightning.model import MTPModel
from mtp_lightning.sampler_heads import GRUSamplerHead, MLPSamplerHead

N, G, K = 7, 24, 8
"""Tokens of a prompt and of a text, and trained masks. N + G is past every window."""


@functools.cache
def prompt_and_text(architecture: str, seed: int = 0) -> tuple[Tensor, tuple[int, ...]]:
    """A prompt of N tokens and the base's greedy continuation, K + 2 tokens longer than G, by transformers."""
    prompt = token_row([N], seed=seed).input_ids
    text = greedy_text(tiny_base(architecture), prompt, G + K + 2)
    assert len(set(text[:G])) > 5  # a text that repeats one token would hide errors
    return prompt, tuple(text)


class InjectedDrafts:
    """Takes the place of ``draft_block``: drafts whose first ``run(position)`` tokens are true and the next one is not.

    The tokens after the wrong one are true again: a verification that looked past it would be caught.

    Args:
        model: the model that decodes.
        sequences: prompt and true text of each row, as long as the drafts reach; of several rows each has its number as
            its seed.
        run: number of true tokens in the draft of the block whose first mask stands at a position.
        bounds: tolerances for the block's hidden states; None: they are not compared.
    """

    def __init__(
        self,
        model: MTPModel,
        sequences: Sequence[Sequence[int]],
        run: Callable[[int], int],
        bounds: dict[str, float] | None = None,
    ) -> None:
        self.sequences, self.run, self.bounds = [torch.tensor(sequence) for sequence in sequences], run, bounds
        self.steps: list[StepInput] = []
        self.compared = 0
        model.register_forward_pre_hook(lambda _, args: self.steps.append(args[0]))

    def __call__(
        self, model: MTPModel, hidden: Tensor, verified: Tensor, positions: Tensor, choice: TokenChoice, *others: Any
    ) -> Drafts:
        step, drafts = self.steps[-1], []
        for r, at in enumerate(positions.tolist()):
            layout = step.layouts[0 if step.layout_index is None else int(step.layout_index[r])]
            sequence = self.sequences[0 if len(self.sequences) == 1 else int(choice.seeds[r])]
            J = layout.block_after(at - step.lengths[r])[1]
            drafts.append(self.draft(model, hidden[r, :J], int(verified[r]), at, sequence))
        filled = torch.full(hidden.shape[:2], VOCAB - 1)  # a row without a block after its last token: must not count
        for r, draft in enumerate(drafts):
            filled[r, : len(draft)] = draft
        return Drafts(filled, None)

    def draft(self, model: MTPModel, hidden: Tensor, verified: int, at: int, sequence: Tensor) -> Tensor:
        J = len(hidden)
        if J == 0 or at >= len(sequence):  # past the end of what is known: a row that has finished
            return torch.zeros(J, dtype=torch.int64)
        assert verified == sequence[at]
        if self.bounds is not None:
            _, expected = naive_states(model, sequence[:at], J)
            torch.testing.assert_close(hidden, expected, **self.bounds)
            self.compared += 1
        out = sequence[at + 1 : at + 1 + J].clone()
        out = torch.cat([out, torch.zeros(J - len(out), dtype=torch.int64)])  # past the end of what is known
        if (r := self.run(at)) < J:
            out[r] = (out[r] + 1) % VOCAB
        return out


def expected_steps(run: Callable[[int], int], J: int, kind: str, num_tokens: int = G, prompt: int = N) -> list[int]:
    """Draft tokens kept in each step, by counting: the rule of docs/method.md §6 without any model."""
    kept, length, draft_run, draft_size = [], 0, 0, 0
    while length < num_tokens:
        a = min(draft_run, draft_size)
        kept.append(a)
        length += a + 1
        whole = a == draft_size
        draft_size = max(0, min(J, num_tokens - length - 1)) if kind == "quadratic" or whole else 0
        draft_run = run(prompt + length - 1)
    return kept


def every_count(J: int, kind: str) -> list[tuple[Callable[[int], int], int]]:
    """Runs and lengths of a few texts, at most G tokens each, in whose steps every number of drafts 0..J is kept."""
    texts: list[tuple[dict[int, int], int]] = []  # the run of each block, and where the next block will stand
    for r in range(J, -1, -1):
        size = r + 1 + (kind == "linear" and r < J)  # linear: after an error a step has no draft
        t = next((t for t, (_, end) in enumerate(texts) if end + size <= N + G - 2), len(texts))
        runs, end = texts[t] if t < len(texts) else ({}, N)
        texts[t : t + 1] = [({**runs, end: r}, end + size)]
    return [(lambda at, runs=runs: runs.get(at, 0), end - N + 2) for runs, end in texts]


RUNS: dict[str, Callable[[int], int]] = {
    "never": lambda at: 0,
    "always": lambda at: K,
    "sometimes": lambda at: (at * 5) % (K + 1),
}


@functools.cache
def shared_model(architecture: str, head: str = "none") -> MTPModel:
    """One model for many tests that only read it."""
    heads = {"none": None, "mlp": MLPSamplerHead, "gru": GRUSamplerHead}
    made = heads[head]
    return tiny_model(architecture, K, sampler_head=None if made is None else made())


def new_tokens(model: MTPModel, prompt: Tensor, **options: Any) -> list[int]:
    return model.generate(prompt[None], **options).sequences[0, len(prompt) :].tolist()
