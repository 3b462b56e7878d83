# SPDX-License-Identifier: Apache-2.0
"""A model whose text and drafts are known."""

from __future__ import annotations

import pytest
from bigram import bigram_base, planted_drafts

from mtp_lightning.decoding.execution import step as decoding_step
from mtp_lightning.model import MTPModel
from mtp_lightning.modeling.gated_lora import LoRA

VOCAB = 96


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> MTPModel:
    """It counts up, token by token, and its drafts have planted mistakes: of J tokens 0, 1, .. or J are accepted."""
    monkeypatch.setattr(decoding_step, "draft_block", planted_drafts(VOCAB, VOCAB))
    return MTPModel(bigram_base(VOCAB, VOCAB), 3, LoRA(rank=2)).eval()
