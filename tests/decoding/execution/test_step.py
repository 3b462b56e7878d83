# SPDX-License-Identifier: Apache-2.0
"""One decoding step: it never waits for the device, and keeps the draft up to its first error."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from injected_drafts import (
    shared_model,
)
from tiny import CONTEXT, VOCAB, tiny_model, token_row
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mtp_lightning.decoding.acceptance import acceptance_rule
from mtp_lightning.decoding.execution import step as decoding_step
from mtp_lightning.decoding.execution.step import StepInput, draft_block, num_accepted
from mtp_lightning.decoding.options import DecodingOptions
from mtp_lightning.decoding.row_cache import RowCache
from mtp_lightning.decoding.shortlist import Shortlist
from mtp_lightning.decoding.step_masks import StepLayout, StepMasks
from mtp_lightning.decoding.token_choice import TokenChoice
from mtp_lightning.model import MTPModel
from mtp_lightning.sampler_heads import GRUSamplerHead


class NoWaiting(TorchDispatchMode):
    """Refuses what makes the host wait for a device's values."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().split(".")[0]
        # Under inference mode reading a number is aten::item, else aten::_local_scalar_dense.
        if name in {
            f"aten::{op}" for op in ("item", "_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "equal")
        }:
            raise AssertionError(f"{name} waits for the device")
        return func(*args, **(kwargs or {}))


def make_step(
    model: MTPModel, tokens: Tensor, num_drafts: int, layouts: list[StepLayout], listed: bool = False, **options: Any
) -> StepInput:
    """A step over an empty cache; each row's drafts are its last tokens."""
    B = len(tokens)
    cache = RowCache(model.base, B)
    cache.reserve(20, 20)
    different = tuple(dict.fromkeys(layouts))
    layout_index = None if len(different) == 1 else torch.tensor([different.index(layout) for layout in layouts])
    position_ids, attention_mask = StepMasks(model.base, CONTEXT).get(different, layout_index, cache, None)
    cache.begin_step(different[0].size, tokens, None)
    shortlist = Shortlist(model.unembed, torch.arange(1, VOCAB, 9)) if listed else None
    choice = TokenChoice(DecodingOptions(**options), list(range(B)), torch.device("cpu"), shortlist)
    lengths = [layout.last + 1 for layout in layouts]
    scores = torch.randn(B, num_drafts, VOCAB, dtype=torch.float64) if choice.use_rejection_sampling else None
    return StepInput(
        tokens=tokens,
        num_drafts=num_drafts,
        verify_mask=None,
        num_verified=None,
        draft_scores=scores,
        layouts=different,
        layout_index=layout_index,
        position_ids=position_ids,
        attention_mask=attention_mask,
        lengths=lengths,
        first_positions=torch.tensor(lengths),
        cache=cache,
        choice=choice,
        acceptance=acceptance_rule(choice),
        sampler_head=True,
    )


SAMPLING = {"temperature": 0.8, "top_k": 50, "top_p": 0.9}


@pytest.mark.parametrize("head", ["none", "mlp", "gru"])
@pytest.mark.parametrize(
    "options",
    [{}, SAMPLING, {**SAMPLING, "verification": "rejection"}, {**SAMPLING, "verification": "rejection", "listed": True}],
    ids=["greedy", "coupled", "rejects", "listed"],
)
@pytest.mark.parametrize(
    ("num_drafts", "blocks"),
    [(0, ((5, 3),)), (3, ((2, 3), (3, 3), (4, 3), (5, 3))), (3, ((5, 3),)), (3, ((2, 1), (5, 3))), (3, ())],
)
def test_a_step_never_waits_for_the_device(
    head: str, options: dict[str, Any], num_drafts: int, blocks: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokens = shared_model("llama", head), torch.stack([token_row([6], seed=s).input_ids for s in (0, 1)])
    layout = StepLayout(6, 5 - num_drafts, blocks)
    with torch.inference_mode():
        torch.manual_seed(0)
        expected = decoding_step.decode_step(model, make_step(model, tokens, num_drafts, [layout] * 2, **options))
        torch.manual_seed(0)
        step = make_step(model, tokens, num_drafts, [layout] * 2, **options)

        def refuse(*args: Any) -> Any:
            raise AssertionError("a Python number is read from a tensor")

        for name in ("tolist", "item", "__bool__", "__int__", "__float__", "__index__", "numpy", "cpu"):
            monkeypatch.setattr(torch.Tensor, name, refuse)
        with NoWaiting():
            found = decoding_step.decode_step(model, step)
        monkeypatch.undo()
    assert torch.equal(found.base_tokens, expected.base_tokens) and torch.equal(found.num_accepted, expected.num_accepted)
    assert torch.equal(found.drafts.tokens, expected.drafts.tokens)
    assert found.drafts.tokens.shape == (2, layout.depth) and found.base_tokens.shape == (2, num_drafts + 1)


def test_number_of_accepted_tokens() -> None:
    def count(draft: list[int], own: list[int]) -> int:
        return int(num_accepted(torch.tensor([draft], dtype=torch.int64), torch.tensor([own])))

    assert count([], [4]) == 0
    assert count([5, 6, 7], [5, 6, 7, 1]) == 3
    assert count([5, 6, 7], [5, 6, 9, 2]) == 2
    assert count([5, 6, 7], [4, 6, 7, 2]) == 0  # what comes after the first error does not count


def test_drafts_end_early_below_a_path_probability() -> None:
    model = tiny_model("llama", 8, sampler_head=GRUSamplerHead())
    choice = TokenChoice(DecodingOptions(), [0, 0], torch.device("cpu"))
    choice.return_draft_probs = True
    hidden = torch.randn(2, 8, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    arguments = (model, hidden, torch.tensor([3, 4]), torch.tensor([9, 9]), choice, True)
    with torch.inference_mode():
        full = draft_block(*arguments)
        assert full.tokens.shape == (2, 8) and full.probabilities is not None
        path_prob = full.probabilities.cumprod(1).max(0).values  # of the row that continues longest
        for count in (1, 3, 7):
            choice.min_path_prob = float(path_prob[count - 1]) * 1.0001
            part = draft_block(*arguments)
            length = int((path_prob >= choice.min_path_prob).sum()) + 1
            assert 1 <= length <= count and torch.equal(part.tokens, full.tokens[:, :length])
