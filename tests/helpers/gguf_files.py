# SPDX-License-Identifier: Apache-2.0
"""GGUF files of tiny Llamas. Helpers of the tests, no tests."""

from __future__ import annotations

from pathlib import Path

import torch
from tiny import tiny_base
from toy_tokenizers import CHATML, byte_tokenizer
from transformers import PreTrainedModel

SPECIAL = ["<eos>", "<|im_start|>", "<|im_end|>"]
_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers": "blk",
}


def write_gguf(path: Path, context: int = 64) -> PreTrainedModel:
    """Write a tiny Llama in float32 with a tokenizer of bytes and a chat template; returns the same model."""
    from gguf import GGUFWriter

    tokens = byte_tokenizer(SPECIAL, "<|im_end|>").get_vocab()
    base = tiny_base("llama", torch.float32, vocab_size=len(tokens), max_position_embeddings=context)
    config = base.config
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(context)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(sorted(tokens, key=tokens.__getitem__))
    writer.add_token_merges(["a b"])
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(tokens) - len(SPECIAL)))  # control, normal
    writer.add_bos_token_id(tokens["<|im_start|>"])
    writer.add_eos_token_id(tokens["<|im_end|>"])
    writer.add_pad_token_id(tokens["<eos>"])
    writer.add_chat_template(CHATML)
    for name, value in base.state_dict().items():
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        if heads is not None:  # llama.cpp's order of rotary dimensions
            value = value.view(heads, 2, config.head_dim // 2, -1).transpose(1, 2).reshape(value.shape)
        for ours, theirs in _NAMES.items():
            name = name.replace(ours, theirs)
        writer.add_tensor(name, value.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return base
