# SPDX-License-Identifier: Apache-2.0
"""What the plugin refuses at start."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from mtp_lightning.errors import UsageError
from mtp_lightning.integrations.vllm.settings import (
    KEY,
    PROPOSER,
    check_attention,
    check_engine,
    check_version,
    read_settings,
)


def vllm_config(**changes: Any) -> SimpleNamespace:
    """The parts of vLLM's configuration that are read; changes by dotted name, with ``__`` for a dot."""
    config = SimpleNamespace(
        additional_config={KEY: {"folder": "saved"}},
        parallel_config=SimpleNamespace(
            tensor_parallel_size=1, pipeline_parallel_size=1, decode_context_parallel_size=1, enable_expert_parallel=False
        ),
        lora_config=None,
        device_config=SimpleNamespace(device_type="cuda"),
        compilation_config=SimpleNamespace(cudagraph_mode=SimpleNamespace(name="FULL_DECODE_ONLY")),
        cache_config=SimpleNamespace(cache_dtype="auto"),
        speculative_config=SimpleNamespace(method="custom_class", model=PROPOSER, num_speculative_tokens=4),
    )
    for name, value in changes.items():
        owner, _, attribute = name.rpartition("__")
        setattr(getattr(config, owner) if owner else config, attribute, value)
    return config


def attention_layer(**changes: Any) -> SimpleNamespace:
    """An attention layer of vLLM."""
    layer = {"name": "CPU_ATTN", "sliding_window": None, "has_sink": False, "alibi_slopes": None, "logits_soft_cap": 0}
    layer |= changes
    return SimpleNamespace(
        attn_backend=SimpleNamespace(get_name=lambda: layer["name"]),
        sliding_window=layer["sliding_window"],
        has_sink=layer["has_sink"],
        impl=SimpleNamespace(alibi_slopes=layer["alibi_slopes"], logits_soft_cap=layer["logits_soft_cap"]),
    )


def test_supported_engine() -> None:
    check_engine(vllm_config(), 4)
    check_attention([attention_layer(), attention_layer(name="FLASH_ATTN")])
    check_version("0.32.0")
    assert read_settings(vllm_config()).decoding == "quadratic"


@pytest.mark.parametrize(
    ("name", "value", "word"),
    [
        ("parallel_config__tensor_parallel_size", 2, "tensor_parallel_size"),
        ("parallel_config__pipeline_parallel_size", 2, "pipeline_parallel_size"),
        ("parallel_config__decode_context_parallel_size", 2, "decode_context_parallel_size"),
        ("parallel_config__enable_expert_parallel", True, "enable_expert_parallel"),
        ("lora_config", object(), "enable_lora"),
        ("compilation_config__cudagraph_mode", SimpleNamespace(name="FULL_AND_PIECEWISE"), "cudagraph_mode"),
        ("cache_config__cache_dtype", "fp8_e4m3", "kv_cache_dtype"),
        ("speculative_config", None, "speculative_config"),
        ("speculative_config__method", "ngram", "speculative_config"),
        ("speculative_config__model", "their.Proposer", "speculative_config"),
        ("speculative_config__num_speculative_tokens", 5, "num_speculative_tokens"),
    ],
)
def test_refused_engine(name: str, value: Any, word: str) -> None:
    with pytest.raises(UsageError, match=word):
        check_engine(vllm_config(**{name: value}), 4)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"name": "TRITON_ATTN"}, "TRITON_ATTN"),
        ({"sliding_window": 128}, "sliding window"),
        ({"has_sink": True}, "sinks"),
        ({"alibi_slopes": [0.5]}, "ALiBi"),
        ({"logits_soft_cap": 50.0}, "capped"),
    ],
)
def test_refused_attention(change: dict[str, Any], word: str) -> None:
    with pytest.raises(UsageError, match=word):
        check_attention([attention_layer(), attention_layer(**change)])


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (None, KEY),
        ({}, "folder"),
        ({"folder": "saved", "mask": 3}, "mask"),
        ({"folder": "saved", "decoding": "cubic"}, "decoding"),
        ({"folder": "saved", "draft_candidates": 0}, "draft_candidates"),
    ],
)
def test_wrong_options(options: Any, word: str) -> None:
    with pytest.raises(UsageError, match=word):
        read_settings(vllm_config(additional_config={KEY: options}))


@pytest.mark.parametrize("version", ["0.31.0", "0.33.1", "0.320.0"])
def test_other_version(version: str) -> None:
    with pytest.raises(UsageError, match="vllm==0.32"):
        check_version(version)


def test_parts_without_vllm_need_neither_lightning_nor_peft() -> None:
    modules = [
        "attention_layers",
        "cpu_sampling",
        "drafting",
        "folder",
        "layout",
        "load_table",
        "mask_attention",
        "proposer",
        "settings",
    ]
    code = "import sys; sys.modules.update(vllm=None, lightning=None, peft=None, datasets=None)\n"
    code += "".join(f"import mtp_lightning.integrations.vllm.{name}\n" for name in modules)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
