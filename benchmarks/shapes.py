# SPDX-License-Identifier: Apache-2.0
"""What benchmarks share: shapes of well-known bases, random models of these shapes, the device, a file of figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel


def _shape(kind: str, width: int, inner: int, layers: int, heads: int, kv_heads: int, vocab: int, tied: bool) -> Any:
    return kind, {
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 128,
        "vocab_size": vocab,
        "tie_word_embeddings": tied,
    }


SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "Qwen3-0.6B": _shape("qwen3", 1024, 3072, 28, 16, 8, 151936, True),
    "Qwen3-1.7B": _shape("qwen3", 2048, 6144, 28, 16, 8, 151936, True),
    "Qwen3-4B": _shape("qwen3", 2560, 9728, 36, 32, 8, 151936, True),
    "Llama-3.1-8B": _shape("llama", 4096, 14336, 32, 32, 8, 128256, False),
    "Qwen3-14B": _shape("qwen3", 5120, 17408, 40, 40, 8, 151936, False),
    "Qwen3-32B": _shape("qwen3", 5120, 25600, 64, 64, 8, 151936, False),
    "Llama-3.1-70B": _shape("llama", 8192, 28672, 80, 64, 8, 128256, False),
}
"""transformers' model type and config options, by name."""

TINY = ("qwen3", {**SHAPES["Qwen3-0.6B"][1], "vocab_size": 1000, "hidden_size": 64, "intermediate_size": 128,
                  "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16})  # fmt: skip
NAMED = {"tiny": TINY, **{name.lower(): shape for name, shape in SHAPES.items()}}
"""By their names on the command line; ``tiny`` is for trying a script out."""


def random_base(name: str, dtype: torch.dtype, device: str, attention: str | None = None, **config: Any) -> PreTrainedModel:
    """A base of a shape in ``NAMED`` with random weights, created on the device."""
    kind, sizes = NAMED[name]
    torch.manual_seed(0)
    settings = AutoConfig.for_model(kind, max_position_embeddings=8192, **{**sizes, **config})
    with torch.device(device):
        return AutoModelForCausalLM.from_config(settings, dtype=dtype, attn_implementation=attention)


def device_name(device: str) -> str:
    """The GPU's name, or the number of threads."""
    return torch.cuda.get_device_name(device) if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"


def wait(device: str) -> None:
    """Wait until the device has done its work."""
    if device == "cuda":
        torch.cuda.synchronize()


def record(file: Path | None, part: str, figures: dict[str, Any]) -> None:
    """Add figures to a part of a JSON file; None: nowhere. Called often, so that a run cut short has left some."""
    if file is None:
        return
    content = json.loads(file.read_text()) if file.is_file() else {}
    content[part] = content.get(part, {}) | figures
    new = file.with_suffix(".new")
    new.write_text(json.dumps(content, indent=1) + "\n")
    new.replace(file)
