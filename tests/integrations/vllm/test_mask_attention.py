# SPDX-License-Identifier: Apache-2.0
"""Attention of masks, as requests and by the parts of the GPU path, against a softmax over the keys that a mask sees."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mtp_lightning.integrations.vllm.layout import make_layout, sees_own, sees_recent
from mtp_lightning.integrations.vllm.load_table import Blocks
from mtp_lightning.integrations.vllm.mask_attention import block_requests, dense_part, merge

R, H, G, D, SIZE, PAGES = 3, 2, 3, 32, 32, 7
QUERY_LENS, SEQ_LENS = [3, 1, 3], [34, 1, 3]
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


def paged_part(
    q: Tensor, key_pages: Tensor, value_pages: Tensor, table: Tensor, lengths: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """What FlashAttention gives: attention over the first ``lengths`` tokens, and -inf and 0 where there are none."""
    keys, values = (pages[table.long()].flatten(1, 2).float() for pages in (key_pages, value_pages))
    scores = torch.einsum("rmhgd,rnhd->rmhgn", q.float(), keys) * scale
    unread = torch.arange(keys.shape[1], device=q.device) >= lengths[:, None]
    scores = scores.masked_fill(unread[:, None, None, None], float("-inf"))
    lse = scores.logsumexp(-1)
    weights = (scores - lse[..., None]).exp().nan_to_num(0.0)
    return torch.einsum("rmhgn,rnhd->rmhgd", weights, values), lse


@pytest.mark.parametrize("query_lens", [QUERY_LENS, [3, 1, 2]], ids=["blocks at the text's beginning", "chunk"])
def test_blocks_as_requests(blocks: Blocks, query_lens: list[int]) -> None:
    """Causal attention of each block over its pages of the copy."""
    q, k, v, key_pages, value_pages = random_tensors(blocks, torch.float64)
    starts = torch.tensor([0, *query_lens]).cumsum(0)
    layout = make_layout(sum(query_lens), starts, torch.tensor(SEQ_LENS), blocks)
    requests = block_requests(layout, TABLE, SIZE)
    keys, values = key_pages[requests.pages], value_pages[requests.pages]
    keys.view(-1, H, D)[requests.slots], values.view(-1, H, D)[requests.slots] = k.flatten(0, 1), v.flatten(0, 1)
    queries, out = q.flatten(0, 1), torch.zeros_like(q.flatten(0, 1))
    for b, length in enumerate(requests.seq_lens.tolist()):
        own_keys, own_values = (pages[requests.block_table[b].long()].flatten(0, 1) for pages in (keys, values))
        for j, row in enumerate(range(int(requests.starts[b]), int(requests.starts[b + 1]))):
            seen = length - blocks.masks + j + 1
            weights = (torch.einsum("hgd,nhd->hgn", queries[row], own_keys[:seen]) * SCALE).softmax(-1)
            out[row] = torch.einsum("hgn,nhd->hgd", weights, own_values[:seen])
    torch.testing.assert_close(out.view(q.shape), obvious(blocks, q, k, v, key_pages, value_pages), rtol=0, atol=1e-12)
    assert len(set(requests.slots.tolist())) == R * blocks.rows


def test_masks_behind_the_last_page_of_the_table() -> None:
    """At the end of the context the table has no page for them, but the copy has."""
    layout = make_layout(1, torch.tensor([0, 1]), torch.tensor([2 * SIZE]), Blocks(1, 4))
    requests = block_requests(layout, TABLE[:1], SIZE)
    assert requests.slots.tolist() == [(len(requests.pages) - 2) * SIZE + j for j in range(4)]


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
