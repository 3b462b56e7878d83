# SPDX-License-Identifier: Apache-2.0
"""Drafts of a model that has partly learnt its base's texts: what the sampler head sees, and how many are accepted."""

from __future__ import annotations

import itertools

import pytest
import torch
from injected_drafts import G, prompt_and_text
from tiny import learn, naive_states, tiny_model
from torch import Tensor

from mtp_lightning.decoding.execution import step as decoding_step
from mtp_lightning.decoding.options import DecodingOptions
from mtp_lightning.decoding.token_choice import TokenChoice
from mtp_lightning.model import MTPModel
from mtp_lightning.sampler_heads import GRUSamplerHead, MarkovSamplerHead, MLPSamplerHead

GREEDY = TokenChoice(DecodingOptions(), [0], torch.device("cpu"))


@pytest.fixture(scope="module", params=["mlp", "gru", "markov"])
def fitted(request: pytest.FixtureRequest) -> tuple[MTPModel, list[Tensor]]:
    """A model trained for seconds on four texts of its base, and the texts: its drafts are often right and often not."""
    head = {"mlp": MLPSamplerHead, "gru": GRUSamplerHead, "markov": MarkovSamplerHead}[request.param]()
    model = tiny_model("qwen3-window", 4, sampler_head=head)
    texts = [torch.tensor([*p.tolist(), *t[:G]]) for p, t in (prompt_and_text("qwen3-window", seed) for seed in range(4))]
    return learn(model, texts, 40), texts


def test_the_sampler_head_is_conditioned_on_what_it_drew(fitted: tuple[MTPModel, list[Tensor]]) -> None:
    """The draft of a step is the head's greedy sequence from the naive states, token after token."""
    model, texts = fitted
    for text, i in itertools.product(texts, range(3, 20, 4)):
        _, hidden = naive_states(model, text[: i + 1], 4)
        drafts = {}
        for with_head in (True, False):
            places = torch.tensor([i + 1])
            made = decoding_step.draft_block(model, hidden[None], text[i + 1 : i + 2], places, GREEDY, with_head)
            drafts[with_head] = made.tokens[0].tolist()
        assert drafts[False] == model.unembed(hidden).argmax(-1).tolist()
        tokens = [int(text[i + 1])]
        for j in range(4):  # teacher forcing on the draft so far
            previous = model.embed(torch.tensor([*tokens, *[0] * (3 - j)]))[None]
            assert model.sampler_head is not None
            tokens.append(int(model.unembed(model.sampler_head(hidden[None], previous))[0, j].argmax()))
        assert drafts[True] == tokens[1:]


def test_more_masks_keep_what_fewer_keep_step_by_step(fitted: tuple[MTPModel, list[Tensor]]) -> None:
    """docs/method.md §6: at every start the run with j masks is min(run with j + 1 masks, j), in separate forward passes."""
    model, texts = fitted
    seen = []
    for text, i in itertools.product(texts[:2], range(0, len(texts[0]) - 6, 2)):
        runs = []
        for j in range(1, 5):  # the prompt's step drafts, the second step verifies
            out = model.generate(text[None, : i + 1], num_masks=j, max_steps=2, max_new_tokens=12)
            runs.append(out.accepted_per_step[0][1])
        assert all(runs[j - 1] == min(runs[j], j) for j in range(1, 4)), (i, runs)
        seen += runs
    assert {0, 1, 2, 3, 4} == set(seen)
