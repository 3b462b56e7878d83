# SPDX-License-Identifier: Apache-2.0
"""The one file that touches private parts of transformers, and of accelerate's hooks that transformers puts on modules.

Tried with transformers 5.17 to 5.24 and accelerate 1.15. ``tests/modeling/test_transformers_private.py`` fails
if a library changes one of them; each docstring says what happens then.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


def attention_kernel(base: PreTrainedModel) -> str:
    """Name of the base's attention implementation (``sdpa``, ``eager``, ..). Without the attribute: AttributeError."""
    return base.config._attn_implementation


def sdpa_attention() -> Callable[..., Any]:
    """Transformers' own SDPA attention function."""
    return ALL_ATTENTION_FUNCTIONS["sdpa"]


def register_attention(name: str, function: Callable[..., Any]) -> None:
    """Add an attention function that takes SDPA's masks to those that a model can be switched to."""
    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


@functools.cache
def can_switch_attention(model_class: Any) -> bool:
    """True if models of a class look up their attention function by name; False where transformers does not say."""
    can_set: Any = getattr(model_class, "_can_set_attn_implementation", None)
    return can_set is not None and bool(can_set())


class SwitchedAttention:
    """Runs the base's decoder with another attention function within the ``with`` block.

    Only for classes that ``can_switch_attention``. The public ``set_attn_implementation`` does the same, but walks all
    modules, which costs as much as a decoding step of a small model. A kernel that is set meanwhile is kept.
    """

    KEY = "_attn_implementation_internal"

    def __init__(self, base: PreTrainedModel, name: str | None) -> None:
        configs = {id(config): config for config in (base.config, base.config.get_text_config(decoder=True))}
        self._settings = [vars(config) for config in configs.values()]  # setattr of a configuration validates: slow
        self._name = name

    def __enter__(self) -> None:
        self._before = [settings[self.KEY] for settings in self._settings]
        for settings in self._settings:
            settings[self.KEY] = self._name

    def __exit__(self, *_: object) -> None:
        for settings, kernel in zip(self._settings, self._before, strict=True):
            if settings[self.KEY] == self._name:
                settings[self.KEY] = kernel


def is_stateful(base: PreTrainedModel) -> bool:
    """True if transformers marks the base as recurrent; without the mark the layer types alone decide."""
    return bool(getattr(base, "_is_stateful", False))


@functools.cache
def cache_keyword(decoder_class: Any) -> str:
    """The name of a decoder's cache argument: ``cache`` from transformers 5.24 on, ``past_key_values`` before."""
    return "cache" if "cache" in inspect.signature(decoder_class.forward).parameters else "past_key_values"


def enable_checkpointing(base: PreTrainedModel, options: Mapping[str, Any]) -> None:
    """Turn on gradient checkpointing by the name of transformers 5.24 and later, or by the earlier one."""
    model: Any = base
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=dict(options))
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=dict(options))


def checkpointing_options(base: PreTrainedModel) -> list[Mapping[str, Any]]:
    """The options of ``torch.utils.checkpoint`` for each checkpointed layer; empty ones where they cannot be read."""
    layers = (module for module in base.modules() if getattr(module, "gradient_checkpointing", False))
    return [getattr(getattr(layer, "_gradient_checkpointing_func", None), "keywords", {}) for layer in layers]


def offload_hook(module: nn.Module) -> Any:
    """Accelerate's hook that brings an offloaded module's weights to the device, or None."""
    return getattr(module, "_hf_hook", None)
