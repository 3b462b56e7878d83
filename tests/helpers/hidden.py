# SPDX-License-Identifier: Apache-2.0
"""Hidden states of rows with masks behind them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch
from tiny import token_row
from torch import Tensor

from mtp_lightning.decoding.execution import fused_lora
from mtp_lightning.decoding.execution.decode_cache import DecodeCache, decode_cache
from mtp_lightning.model import MTPModel


@torch.inference_mode()
def hidden_states(model: MTPModel, num_mtp: int, rows: int) -> Tensor:
    ids = torch.stack([token_row([9], seed=r).input_ids for r in range(rows)])
    inputs = torch.cat([model.embed(ids), model.mask_embeddings.expand(rows, -1, -1)], dim=1)
    with model.gate.over_last(num_mtp):
        return model.base.get_decoder()(inputs_embeds=inputs, use_cache=False).last_hidden_state


def join_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Join layers whatever their dtype and rank, also where nothing is packed."""
    monkeypatch.setattr(fused_lora, "joining_pays", lambda weight: True)
    monkeypatch.setattr(fused_lora, "MAX_RANK_SHARE", 1.0)


@contextlib.contextmanager
def fused(model: MTPModel) -> Iterator[DecodeCache]:
    """Run the model's layers as in decoding."""
    cache = decode_cache(model)
    cache.prepare(model)
    with cache.fused():
        yield cache
