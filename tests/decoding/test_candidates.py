# SPDX-License-Identifier: Apache-2.0
"""Drafts from candidates: those of the whole vocabulary with all but the base head's best tokens ruled out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hidden import fused
from tiny import VOCAB, greedy_text, tiny_model, token_row
from torch import Tensor, nn

from mtp_lightning.decoding.execution import step as decoding_step
from mtp_lightning.decoding.execution.step import Drafts, draft_block
from mtp_lightning.decoding.executor import token_choice
from mtp_lightning.decoding.loop import decode
from mtp_lightning.decoding.options import DecodingOptions
from mtp_lightning.decoding.token_choice import TokenChoice
from mtp_lightning.model import MTPModel
from mtp_lightning.sampler_heads import GRUSamplerHead, MarkovSamplerHead, MLPSamplerHead

M = 5
CPU = torch.device("cpu")
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "coupled": {"temperature": 1.3},
    "top": {"temperature": 0.8, "top_k": 4, "top_p": 0.8},
    "rejection": {"temperature": 1.3, "top_p": 0.9, "verification": "rejection"},
}


class CustomHead(GRUSamplerHead):
    def step(self, hidden: Tensor, previous: Tensor, state: Any) -> tuple[Tensor, Any]:
        output, state = super().step(hidden, previous, state)
        return 2 * output, state


def long_way(model: MTPModel, hidden: Tensor, verified: Tensor, positions: Tensor, choice: TokenChoice) -> Drafts:
    """The whole vocabulary's logits at every draft token, with every token ruled out that is no candidate."""
    head: Any = model.sampler_head
    tokens, scores, previous, state = [], [], verified, None
    for j in range(hidden.shape[1]):
        output, state = head.step(hidden[:, j], model.embed(previous), state)
        best = model.unembed(hidden[:, j]).topk(M).indices
        logits = model.unembed(output)
        logits = torch.full_like(logits, float("-inf")).scatter(-1, best, logits.gather(-1, best))
        score = choice.warped(logits[:, None])
        previous = choice.draw(score, positions[:, None] + j + 1)[:, 0]
        tokens.append(previous)
        scores.append(score)
    return Drafts(torch.stack(tokens, 1), torch.cat(scores, 1))


@pytest.mark.parametrize(
    ("architecture", "way", "head"),
    [
        ("llama", "greedy", GRUSamplerHead),
        ("llama", "rejection", MLPSamplerHead),
        ("llama", "coupled", CustomHead),
        ("llama", "greedy", MarkovSamplerHead),
        ("gemma3", "top", GRUSamplerHead),  # gemma3 caps its logits
    ],
)
def test_drafts_are_those_of_the_whole_vocabulary_with_the_rest_ruled_out(architecture: str, way: str, head: Any) -> None:
    model = tiny_model(architecture, 4, sampler_head=head())
    model.unembed.scale = 0.7  # as Cohere and Granite have it
    assert (model.unembed.softcap is not None) == (architecture == "gemma3")
    output: Any = model.base.get_output_embeddings()
    output.bias = nn.Parameter(torch.randn(VOCAB, dtype=torch.float64))
    arguments = (
        torch.randn(3, 4, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0)),
        torch.tensor([3, 50, 9]),
        torch.tensor([9, 9, 12]),
    )
    with torch.inference_mode(), fused(model):
        choice = TokenChoice(DecodingOptions(**WAYS[way]), [5, 6, 7], CPU, M)
        found, expected = draft_block(model, *arguments, choice, True), long_way(model, *arguments, choice)
        choice.num_candidates = None
        free = draft_block(model, *arguments, choice, True)
    assert torch.equal(found.tokens, expected.tokens) and len(found.tokens.unique()) > 1
    assert not torch.equal(free.tokens, found.tokens)
    assert (found.scores is not None) == (way == "rejection")
    if found.scores is not None:
        assert found.scores.shape == (3, 4, VOCAB)  # and nothing but candidates is ever proposed:
        assert bool(((found.scores > float("-inf")).sum(-1) <= M).all())
        # float64 sums of the same numbers, in products of other shapes.
        torch.testing.assert_close(found.scores, expected.scores, rtol=1e-9, atol=1e-9)


def steps(model: MTPModel, prompt: Tensor, **options: Any) -> list[Any]:
    """The tokens and number of drafts of each step of a text."""
    options = {"num_masks": 3, "max_new_tokens": 12, "seed": 2, **options}
    return [(step.tokens, step.num_drafts) for step in decode(model, prompt, DecodingOptions(**options))]


@pytest.mark.parametrize("way", ["greedy", "coupled", "rejection"])
def test_as_many_candidates_as_tokens_are_the_whole_vocabulary(way: str) -> None:
    model, prompt = tiny_model("llama", 3, sampler_head=GRUSamplerHead()), token_row([6]).input_ids
    expected = steps(model, prompt, draft_candidates="all", **WAYS[way])
    for count in (VOCAB, VOCAB + 1):
        assert steps(model, prompt, draft_candidates=count, **WAYS[way]) == expected


@pytest.mark.parametrize("options", [{}, {"sampler_head": False}, {"temperature": 1.0, "decoding": "linear"}])
def test_logits_of_masks_in_the_product_of_verification(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The steps are the same whether all masks' logits come with those of verification or the block's come after it."""
    model, prompt = tiny_model("gemma3", 3, sampler_head=GRUSamplerHead()), token_row([6]).input_ids
    found = []
    for most in (0, 1000):
        monkeypatch.setitem(decoding_step.MAX_JOINT_MASKS, "cpu", most)
        found.append(steps(model, prompt, draft_candidates=M, **options))
    assert found[0] == found[1]


def test_without_a_plain_output_layer_drafts_are_of_the_whole_vocabulary() -> None:
    model, prompt = tiny_model("llama", 3, sampler_head=GRUSamplerHead()), token_row([6]).input_ids

    def candidates(**options: Any) -> int | None:
        with fused(model):
            return token_choice(model, DecodingOptions(**options), [0]).num_candidates

    assert (candidates(draft_candidates=M), candidates(draft_candidates="all")) == (M, None)
    expected = greedy_text(model.base, prompt, 12)
    head: Any = model.base.get_output_embeddings()
    hook = head.register_forward_hook(lambda *_: None)  # as accelerate's: the weight may be elsewhere
    assert candidates(draft_candidates=M) is None
    assert sum((tokens for tokens, _ in steps(model, prompt, draft_candidates=M)), []) == expected
    hook.remove()
    head.__class__ = type("Linear8bitLt", (nn.Linear,), {})
    assert candidates(draft_candidates=M) is None
