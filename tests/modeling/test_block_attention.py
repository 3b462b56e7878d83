# SPDX-License-Identifier: Apache-2.0
"""Attention over cached keys and the own block, against the dense mask. All architectures: ``test_network.py``."""

from __future__ import annotations

import pytest
import torch
from tiny import in_one_pass, tiny_base, tiny_batch, tiny_model, tolerance

from mtp_lightning.modeling import block_attention
from mtp_lightning.modeling.block_attention import supports_block_attention
from mtp_lightning.modeling.masking import attention_pattern, block_mask, dense_mask


@pytest.mark.parametrize("max_scores", [1 << 24, 1, 3000])
def test_recomputation_in_parts_changes_neither_states_nor_gradients(
    max_scores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(block_attention, "MAX_SCORES", max_scores)
    attend, runs = block_attention._attend, []
    monkeypatch.setattr(block_attention, "_attend", lambda *inputs: runs.append(inputs[0].shape[2]) or attend(*inputs))
    batch, results = tiny_batch(), []
    for model in (tiny_model("qwen3-window"), in_one_pass(tiny_model("qwen3-window"))):
        states = model.hidden_states(batch)
        grads = torch.autograd.grad(states.mtp[batch.starts >= 0].square().sum(), [p for _, p in model.trained_parameters()])
        results.append([states.mtp[batch.starts >= 0], *grads])
    for ours, dense in zip(*results, strict=True):
        torch.testing.assert_close(ours, dense, **tolerance(model.base))
    layers, positions = 3, batch.mtp_labels[0].numel()
    assert sum(runs) == layers * positions * (2 if max_scores < 1 << 24 else 1)  # recomputed in the backward pass
    assert (len(runs) == layers) == (max_scores == 1 << 24)


@pytest.mark.parametrize("window", [None, 4])
def test_the_compact_mask_is_the_dense_one(window: int | None) -> None:
    batch, K = tiny_batch(), 3
    pattern, L = attention_pattern(batch, K), batch.input_ids.shape[1]
    compact, dense = block_mask(pattern, L, K, window), dense_mask(pattern, L, window, begin=L)
    assert torch.equal(compact[..., :L], dense[..., :L])
    for p in range(batch.starts.shape[1]):
        queries, keys = slice(p * K, (p + 1) * K), slice(L + p * K, L + (p + 1) * K)
        assert torch.equal(compact[:, :, queries, L:], dense[:, :, queries, keys])
        assert dense[:, :, queries, L:].sum() == dense[:, :, queries, keys].sum()  # and nothing else is seen


def test_other_kernels_keep_their_own_attention() -> None:
    assert supports_block_attention(tiny_base())
    assert not supports_block_attention(tiny_base(attn_implementation="eager"))
    dropout = tiny_base(attention_dropout=0.1)
    assert supports_block_attention(dropout) and not supports_block_attention(dropout.train())
