# SPDX-License-Identifier: Apache-2.0
"""The parts of PEFT that peft_private.py relies on: each test fails if a release of PEFT changes it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from mtp_lightning.errors import RunError
from mtp_lightning.modeling.peft_private import LoraLinear, LoraVariant, get_variant, lora_layers, set_variant


class Doubling(LoraVariant):
    def forward(self, module: Any, *, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        return 2 * result


def one_layer() -> Any:
    model = nn.Sequential(nn.Linear(4, 4))
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["0"]), model)
    (layer,) = lora_layers(model)
    return layer


def test_a_variant_computes_the_forward_pass() -> None:
    layer, x = one_layer(), torch.randn(3, 4)
    assert type(layer) is LoraLinear and get_variant(layer) is None
    set_variant(layer, variant := Doubling())
    assert get_variant(layer) is variant
    assert torch.equal(layer(x), 2 * layer.base_layer(x)), "PEFT's LoRA layers no longer call their variant"


def test_another_place_for_variants_is_said() -> None:
    layer = one_layer()
    del layer.lora_variant
    with pytest.raises(RunError, match="keeps LoRA variants elsewhere"):
        set_variant(layer, Doubling())
