# SPDX-License-Identifier: Apache-2.0
"""Lets vLLM's attention layers take masks: their kernel runs for the scheduler's tokens as always, ours for the masks.

Masks get no slot in the KV cache: vLLM's ``slot_mapping`` names slots for the scheduler's tokens, and only these are stored.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from mtp_lightning.integrations.vllm import layout as masks
from mtp_lightning.integrations.vllm.layout import Layout
from mtp_lightning.integrations.vllm.mask_attention import BlockRequests, block_requests, dense_part, merge
from mtp_lightning.integrations.vllm.pass_state import PassState


def add_masks_to(layer: Any, state: PassState) -> None:
    """Give a layer's attention implementation, of whatever backend, the masks of ``state.layout``."""
    plain = type(layer.impl)

    def do_kv_cache_update(
        self: Any, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        num_tokens = slot_mapping.shape[0]
        plain.do_kv_cache_update(self, layer, key[:num_tokens], value[:num_tokens], kv_cache, slot_mapping)

    def forward(
        self: Any,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Any,
        output: Tensor,
        *others: Any,
        **options: Any,
    ) -> Tensor:
        lay = state.layout
        if lay is None or attn_metadata is None:
            return plain.forward(self, layer, query, key, value, kv_cache, attn_metadata, output, *others, **options)
        T = lay.num_tokens
        plain.forward(self, layer, query[:T], key[:T], value[:T], kv_cache, attn_metadata, output[:T], *others, **options)
        attention = _cpu_attention if query.device.type == "cpu" else _flash_attention
        result = attention(plain, self, layer, (query, key, value), kv_cache, attn_metadata, state)
        output[T:].view(result.shape).copy_(result)
        return output

    # A subclass of that class alone, so that isinstance holds and __class__ can be set (same object layout).
    members = {"do_kv_cache_update": do_kv_cache_update, "forward": forward}
    layer.impl.__class__ = type("MTP" + plain.__name__, (plain,), members)


def _queries(query: Tensor, key: Tensor, lay: Layout) -> Tensor:
    """Queries of masks, [R, M, H, G, D]."""
    return query[lay.num_tokens :].view(lay.num_requests, lay.blocks.rows, key.shape[1], -1, key.shape[2])


def _cpu_attention(
    plain: Any, impl: Any, layer: Any, tensors: tuple[Tensor, Tensor, Tensor], cache: Tensor, metadata: Any, state: PassState
) -> Tensor:
    """Output of masks by vLLM's kernel: each block is a request over a copy of the pages, in which the text is already."""
    assert state.layout is not None
    query, key, value = (x[state.layout.num_tokens :] for x in tensors)
    if state.blocks is None:
        blocks = block_requests(state.layout, metadata.block_table, cache.shape[2])
        state.blocks = blocks, _cpu_metadata(impl, layer, blocks, metadata, query.dtype)
    blocks, block_metadata = state.blocks
    copied = cache.index_select(0, blocks.pages)
    plain.do_kv_cache_update(impl, layer, key, value, copied, blocks.slots)
    output = torch.empty_like(query, memory_format=torch.contiguous_format)
    plain.forward(impl, layer, query, key, value, copied, block_metadata, output)
    return output


def _cpu_metadata(impl: Any, layer: Any, blocks: BlockRequests, metadata: Any, dtype: torch.dtype) -> Any:
    """What vLLM's kernel reads about the blocks; ``metadata`` is the pass's."""
    from vllm import _custom_ops as ops

    schedule = ops.cpu_attn_get_scheduler_metadata(
        num_reqs=len(blocks.seq_lens),
        num_heads=impl.num_heads,
        num_kv_heads=impl.num_kv_heads,
        head_dim=impl.head_size,
        seq_lens=blocks.seq_lens,
        dtype=dtype,
        query_start_loc=blocks.starts,
        causal=True,
        sliding_window_size=-1,
        isa=layer.isa,
        enable_kv_split=False,
    )
    return dataclasses.replace(
        metadata,
        num_actual_tokens=len(blocks.slots),
        max_query_len=int(blocks.starts[1]),
        query_start_loc=blocks.starts,
        max_seq_len=int(blocks.seq_lens.max()),
        seq_lens=blocks.seq_lens,
        block_table=blocks.block_table,
        slot_mapping=blocks.slots,
        scheduler_metadata=schedule,
        causal=True,
    )


def _by_request(x: Tensor, lay: Layout) -> Tensor:
    """Keys or values of masks, [R, M, H, D]."""
    return x[lay.num_tokens :].view(lay.num_requests, lay.blocks.rows, *x.shape[1:])


def _flash_attention(
    plain: Any, impl: Any, layer: Any, tensors: tuple[Tensor, Tensor, Tensor], cache: Tensor, metadata: Any, state: PassState
) -> Tensor:
    """Output of masks, [R, M, H, G, D], on a GPU: pages in place. NOT RUN YET; its parts are tested on a CPU."""
    (query, key, value), table = tensors, metadata.block_table
    lay = state.layout
    assert lay is not None
    q = _queries(query, key, lay)
    keys = torch.cat([key[lay.recent], _by_request(key, lay)], dim=1)
    values = torch.cat([value[lay.recent], _by_request(value, lay)], dim=1)
    own = masks.sees_own(lay.blocks, query.device).expand(lay.num_requests, -1, -1)
    seen = torch.cat([masks.sees_recent(lay), own], dim=2)
    text, text_lse = _flash_part(impl, q, cache, table[: lay.num_requests], lay.before)
    dense, dense_lse = dense_part(q, keys, values, seen, impl.scale)
    return merge(text, text_lse, dense, dense_lse)


def _flash_part(impl: Any, q: Tensor, kv_cache: Tensor, table: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Attention of masks over the first ``lengths`` tokens, [R], in the pages of ``table``, [R, P], and its log-sum-exp.

    NOT RUN YET; names and shapes are those of vLLM 0.32. ``paged_part`` in tests/integrations/vllm is its twin on a CPU.
    """
    from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func

    R, M, H, G, D = q.shape
    key_pages, value_pages = kv_cache.transpose(1, 2).split(D, dim=-1)
    out, lse = flash_attn_varlen_func(
        q=q.reshape(R * M, H * G, D),
        k=key_pages,
        v=value_pages,
        cu_seqlens_q=torch.arange(0, (R + 1) * M, M, dtype=torch.int32, device=q.device),
        seqused_k=lengths.to(torch.int32),
        max_seqlen_q=M,
        max_seqlen_k=table.shape[1] * key_pages.shape[1],
        softmax_scale=impl.scale,
        causal=False,
        block_table=table,
        return_softmax_lse=True,
        fa_version=impl.vllm_flash_attn_version,
    )
    return out.view(R, M, H, G, D).float(), lse.t().reshape(R, M, H, G)  # lse is [heads, rows]
