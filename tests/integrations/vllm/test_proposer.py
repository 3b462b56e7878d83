# SPDX-License-Identifier: Apache-2.0
"""From which block the next draft comes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from mtp_lightning.integrations.vllm.layout import make_layout
from mtp_lightning.integrations.vllm.load_table import Blocks
from mtp_lightning.integrations.vllm.pass_state import PassState
from mtp_lightning.integrations.vllm.proposer import Proposer


class FakeModel:
    """Drafts the index of the chosen request and block, and the verified token."""

    def __init__(self, state: PassState) -> None:
        self.mtp = SimpleNamespace(state=state)

    def measure_loads(self, vllm_config: object) -> None:
        """Nothing to measure."""

    def draft(self, hidden: torch.Tensor, logits: torch.Tensor | None, verified: torch.Tensor) -> torch.Tensor:
        assert logits is None
        return torch.cat([hidden[:, 0].long(), verified[:, None]], 1)


def proposer_after(query_lens: list[int], seq_lens: list[int], blocks: Blocks) -> Proposer:
    """A proposer after a pass; each mask's hidden state is the index of its request and block."""
    R = len(seq_lens)
    starts = torch.tensor([0, *query_lens]).cumsum(0)
    layout = make_layout(sum(query_lens), starts, torch.tensor(seq_lens), blocks)
    state = PassState(200, 8, 2, torch.float32, torch.device("cpu"))
    index = [[r, w] for r in range(R) for w in range(blocks.number) for _ in range(blocks.masks)]
    state.keep(layout, torch.tensor(index, dtype=torch.float32))
    proposer = Proposer(None)
    proposer.load_model(FakeModel(state))
    return proposer


def test_block_after_the_last_accepted_token() -> None:
    # Request 0 was at 10 tokens and fed its last one and 3 drafts: one, two or all three are accepted, or none.
    for accepted in range(4):
        proposer = proposer_after([4, 6, 5], [13, 6, 5], Blocks(4, 3))
        # Request 1 is a whole prompt, request 2 is in the middle of one.
        gained = [list(range(50, 51 + accepted)), [70], []]
        drafts = proposer.propose(gained, [10 + accepted + 1, 7, 9], None)
        assert drafts == [[0, accepted, 50 + accepted], [1, 3, 70], []]
        assert proposer.num_steps == 2


@pytest.mark.parametrize(("accepted", "expected"), [(2, []), (3, [0, 0, 53])])
def test_linear_needs_the_whole_draft_accepted(accepted: int, expected: list[int]) -> None:
    proposer = proposer_after([4], [13], Blocks(1, 3))
    assert proposer.propose([list(range(50, 51 + accepted))], [10 + accepted + 1], None) == [expected]


def test_no_draft_after_a_pass_without_masks() -> None:
    proposer = proposer_after([1], [13], Blocks(1, 3))
    proposer._model.mtp.state.keep(None, None)
    assert proposer.propose([[5]], [14], None) == [[]]
    assert proposer.num_steps == 1
