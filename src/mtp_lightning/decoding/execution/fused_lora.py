# SPDX-License-Identifier: Apache-2.0
"""Forward passes of gated LoRA layers while decoding: three products, the update added in place, nothing cast.

On a CPU the weights are packed beforehand (``PackedLinear``), which needs a copy of them: for bases that are small enough.
Larger ones, and those on a GPU, are read in place. Other layers (quantised, offloaded, sharded, with hooks, with other
adapters) keep PEFT's forward pass, and under ``torch.autocast`` all do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mtp_lightning.decoding.packed_linear import PackedLinear
from mtp_lightning.modeling.gated_lora import Gate, GatedVariant
from mtp_lightning.modeling.peft_private import ADAPTER, LoraLinear, get_variant
from mtp_lightning.modeling.transformers_private import offload_hook

MAX_COPY_BYTES = 2 << 30
"""Bytes of weights that are copied to be packed on a CPU; larger bases are read in place."""

Forward = Callable[[Tensor], Tensor]


def lora_matrices(layer: Any) -> tuple[Tensor, Tensor]:
    """A layer's LoRA matrices, A [r, D] and B [N, r]."""
    return layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight


def has_hooks(module: nn.Module) -> bool:
    """True if a module's forward pass has hooks, of PyTorch or of accelerate."""
    return bool(module._forward_hooks or module._forward_pre_hooks or offload_hook(module) is not None)


def _is_patched(module: nn.Module) -> bool:
    """True if a module's forward pass has hooks or is overridden."""
    return has_hooks(module) or "forward" in vars(module)


def is_plain_linear(layer: Any) -> bool:
    """True for an unpatched ``nn.Linear`` whose weights are in memory, not quantised or sharded."""
    if type(layer) is not nn.Linear or _is_patched(layer):
        return False
    return all(type(p.data) is Tensor and p.device.type != "meta" for p in layer.parameters())


def can_fuse(layer: Any, gate: Gate) -> bool:
    """True for a LoRA layer that is just a gated adapter on a plain linear layer, without hooks or overrides."""
    modules = (layer, *layer.children(), *layer.lora_A.children(), *layer.lora_B.children())
    if any(map(_is_patched, modules)) or type(layer) is not LoraLinear or type(layer.base_layer) is not nn.Linear:
        return False
    if layer.disable_adapters or layer.merged or layer.active_adapters != [ADAPTER] or layer.fan_in_fan_out:
        return False
    variant = get_variant(layer)
    if not isinstance(variant, GatedVariant) or variant.gate is not gate or layer.lora_B[ADAPTER].bias is not None:
        return False
    weights = (*lora_matrices(layer), layer.base_layer.weight)
    return all(type(w.data) is Tensor and w.device == weights[0].device and w.device.type != "meta" for w in weights)


def _fused_forward(layer: Any, gate: Gate, pack: bool) -> Forward:
    """The forward pass of a LoRA layer."""
    weight, (down, up) = layer.base_layer.weight, lora_matrices(layer)
    base_product = PackedLinear(weight, layer.base_layer.bias, pack)
    down_product = PackedLinear(down.detach().to(weight.dtype), None, pack)
    up_product = PackedLinear((up.detach() * layer.scaling[ADAPTER]).to(weight.dtype), None, pack)

    def forward(x: Tensor) -> Tensor:
        if x.ndim != 3 or torch.is_grad_enabled():  # PEFT reports a wrong shape, and computes gradients
            return type(layer).forward(layer, x)
        out = base_product(x)
        if gate.num_mtp:
            num_ntp = x.shape[1] - gate.num_mtp
            out[:, num_ntp:].add_(up_product(down_product(x[:, num_ntp:])))  # += would copy the tail onto itself
        return out

    return forward


def fused_forwards(layers: Sequence[Any], output: nn.Linear | None, gate: Gate) -> list[tuple[nn.Module, Forward]]:
    """The forward passes of LoRA layers that can be fused, and of the base's ``output`` layer if it is packed."""
    modules = [*layers, *([] if output is None else [output])]
    weights = [weight for module in modules for weight in module.parameters()]
    pack = sum(weight.numel() * weight.element_size() for weight in weights) <= MAX_COPY_BYTES
    forwards: list[tuple[nn.Module, Forward]] = [(layer, _fused_forward(layer, gate, pack)) for layer in layers]
    if output is not None and pack:
        product = PackedLinear(output.weight, output.bias)
        if product.packed is not None:
            forwards.append((output, _unembedding_forward(output, product)))
    return forwards


def _unembedding_forward(output: nn.Linear, product: PackedLinear) -> Forward:
    """The forward pass of the base's output layer."""

    def forward(x: Tensor) -> Tensor:
        return type(output).forward(output, x) if torch.is_grad_enabled() else product(x)

    return forward
