# SPDX-License-Identifier: Apache-2.0
"""Writes a small random base of another architecture, and a saved folder on it, for check.py.

    python benchmarks/vllm/random_folder.py qwen3 FOLDER     # llama, mistral, qwen2 or qwen3

Its drafts are seldom accepted, but a base that repeats itself, as random ones do, accepts some.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from mtp_lightning import MTPModel
from mtp_lightning.modeling.base import load_base
from mtp_lightning.modeling.gated_lora import LoRA
from mtp_lightning.paths import resolve
from mtp_lightning.sampler_heads import MLPSamplerHead


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("architecture")
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(resolve("package://demo/base"))
    config = AutoConfig.for_model(
        args.architecture,
        vocab_size=2048,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        initializer_range=0.15,
        tie_word_embeddings=False,
        sliding_window=None,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(args.folder / "base")
    tokenizer.save_pretrained(args.folder / "base")
    model = MTPModel(load_base(str(args.folder / "base")), 4, LoRA(rank=8), MLPSamplerHead(), tokenizer)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B" in name:
                parameter.normal_(0, 0.02)
    model.save_pretrained(args.folder / "saved")


if __name__ == "__main__":
    main()
