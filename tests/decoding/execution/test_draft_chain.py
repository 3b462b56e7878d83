# SPDX-License-Identifier: Apache-2.0
"""Unrolled heads compute what the heads' own steps do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hidden import fused
from tiny import VOCAB, tiny_model
from torch import Tensor

from mtp_lightning.decoding.execution import draft_chain
from mtp_lightning.decoding.execution.decode_cache import decode_cache
from mtp_lightning.decoding.execution.draft_chain import DraftChain, GRUChain, MLPChain, unrolled_chain
from mtp_lightning.sampler_heads import GRUSamplerHead, MLPSamplerHead, SamplerHead

HEADS: dict[str, Any] = {
    "mlp": MLPSamplerHead,
    "gru": GRUSamplerHead,
    "gru that reads": lambda: GRUSamplerHead(24, read_hidden=True),
    "wide gru": lambda: GRUSamplerHead(48),
}


@pytest.mark.parametrize(("architecture", "table"), [("gemma3", True), ("llama", False)])
@pytest.mark.parametrize("name", HEADS)
def test_unrolled_heads_compute_what_their_steps_do(
    name: str, architecture: str, table: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not table:
        monkeypatch.setattr(draft_chain, "MAX_TABLE", 0)
    model = tiny_model(architecture, 4, sampler_head=HEADS[name]())
    head, embedding = model.sampler_head, model.base.get_input_embeddings()
    assert head is not None
    fast = unrolled_chain(head, embedding, VOCAB, torch.float64)
    assert isinstance(fast, GRUChain if "gru" in name else MLPChain) and (fast.table is not None) == table
    slow = DraftChain(head, embedding)
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        for rows in (1, 3):
            hidden = torch.randn(rows, 5, 32, generator=generator, dtype=torch.float64)
            fast.begin(hidden)
            slow.begin(hidden)
            for j in range(5):
                tokens = torch.randint(VOCAB, (rows,), generator=generator)
                torch.testing.assert_close(fast.next(j, tokens), slow.next(j, tokens), rtol=1e-11, atol=1e-11)


class CustomHead(GRUSamplerHead):
    def step(self, hidden: Tensor, previous: Tensor, state: Any) -> tuple[Tensor, Any]:
        output, state = super().step(hidden, previous, state)
        return 2 * output, state


def test_a_custom_head_drafts_through_its_step() -> None:
    model = tiny_model("llama", 3, sampler_head=CustomHead())
    assert isinstance(model.sampler_head, SamplerHead)
    with fused(model):
        assert type(decode_cache(model).chain(model)) is DraftChain
