# SPDX-License-Identifier: Apache-2.0
"""Serving with vLLM: a plugin whose model classes run blocks of masks inside their forward pass.

vLLM calls ``register`` in each of its processes (entry point group ``vllm.general_plugins``). Importing this imports no
vLLM.
"""

from __future__ import annotations

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
"""Bases that can be served; the class of ``X`` is registered as ``MTPX``."""
TRIED_VERSION = "0.32"
"""The version of vLLM that this was written for and checked with (scripts/vllm_check.sh)."""


def register() -> None:
    """Tell vLLM the model classes, by name: they are imported when a model asks for one. May be called again."""
    from vllm import ModelRegistry

    for architecture in ARCHITECTURES:
        name = "MTP" + architecture
        if name not in ModelRegistry.models:
            ModelRegistry.register_model(name, f"{__name__}.model:{name}")
