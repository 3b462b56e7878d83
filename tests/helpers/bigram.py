# SPDX-License-Identifier: Apache-2.0
"""A base model whose text is known beforehand, and drafts for it with planted mistakes. Helpers of the tests, no tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from mtp_lightning.decoding.execution.step import Drafts

CONTEXT = 64


def following(token: int, vocab_size: int, cycle: int) -> int:
    """The token after ``token``: the next in its cycle of ``cycle`` tokens."""
    first = token - token % cycle
    return first + (token - first + 1) % min(cycle, vocab_size - first)


def bigram_base(vocab_size: int, cycle: int) -> LlamaForCausalLM:
    """A float64 Llama whose greedy text goes round in cycles of so many tokens."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        bos_token_id=None,
        eos_token_id=None,
        tie_word_embeddings=False,
    )
    base = LlamaForCausalLM(config).double().eval()
    with torch.no_grad():
        # The layer adds nothing, so that a hidden state is its token's embedding; of unit vectors each is nearest to itself.
        for layer in base.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        base.model.embed_tokens.weight.copy_(F.normalize(base.model.embed_tokens.weight))
        for token in range(vocab_size):
            base.lm_head.weight[following(token, vocab_size, cycle)] = base.model.embed_tokens.weight[token]
    return base


def bigram_text(token: int, num_tokens: int, vocab_size: int, cycle: int) -> list[int]:
    """What the base writes after ``token``."""
    text = []
    for _ in range(num_tokens):
        token = following(token, vocab_size, cycle)
        text.append(token)
    return text


def planted_drafts(vocab_size: int, cycle: int) -> Callable[..., Drafts]:
    """A ``draft_block`` whose draft of J tokens is right for as many as the verified token modulo J + 1."""

    def draft_block(model: Any, hidden: Tensor, verified: Tensor, *others: Any) -> Drafts:
        J, drafts = hidden.shape[1], []
        for token in verified.tolist():
            draft = bigram_text(token, J, vocab_size, cycle)
            right = token % (J + 1)
            if right < J:
                draft[right] = (draft[right] + 7) % vocab_size
            drafts.append(draft)
        return Drafts(torch.tensor(drafts, dtype=torch.int64).view(-1, J), None)

    return draft_block
