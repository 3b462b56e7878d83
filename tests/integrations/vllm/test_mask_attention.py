# SPDX-License-Identifier: Apache-2.0
"""Attention of masks: the fused call, and the parts of the GPU path, against a softmax over the keys that a mask sees."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mtp_lightning.integrations.vllm.layout import make_layout, sees_own, sees_recent, sees_text
from mtp_lightning.integrations.vllm.load_table import Blocks
from mtp_lightning.integrations.vllm.mask_attention import (
    attend,
    attention_bias,
    dense_part,
    gather_pages,
    merge,
    paged_part,
)

R, H, G, D, SIZE, PAGES = 3, 2, 3, 32, 32, 7
QUERY_LENS, SEQ_LENS = [3, 1, 3], [40, 1, 3]
TABLE = torch.tensor([[5, 2], [1, 0], [3, 0]])
SCALE = 0.2


@pytest.fixture(params=[Blocks(3, 2), Blocks(1, 4)], ids=["quadratic", "linear"])
def blocks(request: pytest.FixtureRequest) -> Blocks:
    return request.param


def random_tensors(blocks: Blocks, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Queries, keys and values of masks, and key and value pages [pages, size, H, D]."""
    generator = torch.Generator().manual_seed(0)
    sizes = [(R, blocks.rows, H, G, D), *[(R, blocks.rows, H, D)] * 2, *[(PAGES, SIZE, H, D)] * 2]
    return tuple(torch.randn(size, generator=generator, dtype=torch.float64).to(dtype) for size in sizes)


def obvious(blocks: Blocks, q: Tensor, k: Tensor, v: Tensor, key_pages: Tensor, value_pages: Tensor) -> Tensor:
    """Mask by mask and head by head."""
    out = torch.zeros_like(q)
    for r in range(R):
        text_k, text_v = (pages[TABLE[r]].flatten(0, 1) for pages in (key_pages, value_pages))
        for m in range(blocks.rows):
            w, j = divmod(m, blocks.masks)
            length = max(SEQ_LENS[r] - blocks.number + w + 1, 0)
            own = slice(w * blocks.masks, w * blocks.masks + j + 1)
            keys, values = torch.cat([text_k[:length], k[r, own]]), torch.cat([text_v[:length], v[r, own]])
            for h in range(H):
                for g in range(G):
                    out[r, m, h, g] = (keys[:, h] @ q[r, m, h, g] * SCALE).softmax(0) @ values[:, h]
    return out


def pages_in_layout(key_pages: Tensor, value_pages: Tensor, layout: str) -> Tensor:
    """vLLM's CPU cache [pages, H, size, 2 D], written value by value."""
    cache = torch.zeros(PAGES, H, 2, SIZE * D, dtype=key_pages.dtype)
    for s in range(SIZE):
        for d in range(D):
            if layout == "vec":
                at_key, at_value = d * SIZE + s, s * D + d
            else:
                at_key = ((s // 16 * (D // 2) + d // 2) * 16 + s % 16) * 2 + d % 2
                at_value = ((d // 16 * (SIZE // 2) + s // 2) * 16 + d % 16) * 2 + s % 2
            cache[:, :, 0, at_key], cache[:, :, 1, at_value] = key_pages[:, s, :, d], value_pages[:, s, :, d]
    return cache.view(PAGES, H, SIZE, 2 * D)


@pytest.mark.parametrize("cache_layout", ["vec", "amx"])
def test_one_call_over_gathered_pages(blocks: Blocks, cache_layout: str) -> None:
    q, k, v, key_pages, value_pages = random_tensors(blocks, torch.float64)
    layout = make_layout(7, torch.tensor([0, 3, 4, 7]), torch.tensor(SEQ_LENS), blocks)
    M, cache = blocks.rows, pages_in_layout(key_pages, value_pages, cache_layout)
    keys, values = gather_pages(cache, TABLE, cache_layout, room=M)
    keys[:, :, -M:], values[:, :, -M:] = k.transpose(1, 2), v.transpose(1, 2)
    bias = attention_bias(sees_text(layout, 2 * SIZE), sees_own(blocks, q.device), G, q.dtype)
    out = attend(q, keys, values, bias, SCALE)
    torch.testing.assert_close(out, obvious(blocks, q, k, v, key_pages, value_pages), rtol=0, atol=1e-12)


def test_parts_of_the_gpu_path(blocks: Blocks) -> None:
    q, k, v, key_pages, value_pages = random_tensors(blocks, torch.float32)
    layout = make_layout(7, torch.tensor([0, 3, 4, 7]), torch.tensor(SEQ_LENS), blocks)
    # This pass's tokens are in the pages too; requests with fewer tokens than blocks have blocks that nobody reads.
    tokens = [(r, SEQ_LENS[r] - QUERY_LENS[r] + i) for r in range(R) for i in range(QUERY_LENS[r])]
    new_keys, new_values = (
        torch.stack([pages[TABLE[r, at // SIZE], at % SIZE] for r, at in tokens]) for pages in (key_pages, value_pages)
    )
    text, text_lse = paged_part(q, key_pages, value_pages, TABLE, layout.before, SCALE)
    keys, values = torch.cat([new_keys[layout.recent], k], 1), torch.cat([new_values[layout.recent], v], 1)
    seen = torch.cat([sees_recent(layout), sees_own(blocks, q.device).expand(R, -1, -1)], 2)
    out = merge(text, text_lse, *dense_part(q, keys, values, seen, SCALE))
    assert text_lse.shape == q.shape[:-1] and bool((text_lse[1] == float("-inf")).all())  # its one token is recent
    read = layout.in_pass.repeat_interleave(blocks.masks, 1)
    torch.testing.assert_close(out[read], obvious(blocks, q, k, v, key_pages, value_pages)[read], rtol=0, atol=2e-6)
