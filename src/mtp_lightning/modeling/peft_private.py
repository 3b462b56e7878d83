# SPDX-License-Identifier: Apache-2.0
"""The one file that touches parts of PEFT that PEFT calls private: LoRA layers and their variants.

Tried with PEFT 0.19 to 0.21. ``tests/modeling/test_peft_private.py`` fails if PEFT changes one of them. There is no
slower path: without its variant a LoRA would act at every position and change the base model's text.
"""

from __future__ import annotations

from typing import Any

import peft
from torch import nn

from mtp_lightning.errors import RunError

try:
    from peft.tuners.lora.layer import Linear as LoraLinear
    from peft.tuners.lora.layer import LoraLayer, LoraVariant
except ImportError as error:
    raise RunError(f"peft {peft.__version__} has no LoRA variants; this package is tested with 0.19 to 0.21.") from error

ADAPTER = "default"
"""Name of the adapter: PEFT's default, which its saved files do not spell out."""

__all__ = ["ADAPTER", "LoraLayer", "LoraLinear", "LoraVariant", "get_variant", "lora_layers", "set_variant"]


def lora_layers(base: nn.Module) -> list[Any]:
    """PEFT's LoRA layers in the model."""
    return [module for module in base.modules() if isinstance(module, LoraLayer)]


def set_variant(layer: Any, variant: LoraVariant) -> None:
    """Let a variant compute the LoRA layer's forward pass; RunError if this version of PEFT has no place for it."""
    if not isinstance(getattr(layer, "lora_variant", None), dict):
        raise RunError(f"peft {peft.__version__} keeps LoRA variants elsewhere; this package is tested with 0.19 to 0.21.")
    layer.lora_variant[ADAPTER] = variant


def get_variant(layer: Any) -> LoraVariant | None:
    """The variant of a LoRA layer, or None for a standard LoRA."""
    return layer.lora_variant.get(ADAPTER)
