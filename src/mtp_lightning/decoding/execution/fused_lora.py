# SPDX-License-Identifier: Apache-2.0
"""Forward passes of gated LoRA layers while decoding: three products, the update added in place, nothing cast.

On a CPU the weights are packed beforehand (``PackedLinear``), which needs a copy of them: for bases that are small enough.
In bfloat16 packed layers that read the same input are joined, which saves 5 to 10 percent of a step on SmolLM2-135M.
Larger bases, and those on a GPU, are read in place. Other layers (quantised, offloaded, sharded, with hooks, with other
adapters) keep PEFT's forward pass, and under ``torch.autocast`` all do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mtp_lightning.decoding.packed_linear import PackedLinear, can_pack
from mtp_lightning.modeling.gated_lora import Gate, GatedVariant
from mtp_lightning.modeling.peft_private import ADAPTER, LoraLinear, get_variant
from mtp_lightning.modeling.transformers_private import offload_hook

MAX_COPY_BYTES = 2 << 30
"""Bytes of weights that are copied to be packed on a CPU; larger bases are read in place."""

SAME_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Names of layers that read the same input in the decoders of most models."""
JOINED_DTYPE = torch.bfloat16
"""The dtype in which these are one layer: in float32 larger products are no faster, and another copy would be needed."""

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


class _Product:
    """The product of a LoRA layer, or of several that read the same input: the first one called computes for all of them."""

    def __init__(self, layers: Sequence[Any], gate: Gate, pack: bool) -> None:
        self.gate = gate
        self.widths = [layer.base_layer.out_features for layer in layers]
        pairs = [lora_matrices(layer) for layer in layers]
        weights = [layer.base_layer.weight.detach() for layer in layers]
        biases = [layer.base_layer.bias for layer in layers if layer.base_layer.bias is not None]
        ups = [up.detach() * layer.scaling[ADAPTER] for layer, (_, up) in zip(layers, pairs, strict=True)]
        dtype = weights[0].dtype
        pack_lora = pack and dtype == torch.bfloat16  # float32's small products take longer packed
        self.base = PackedLinear(_joined(weights), torch.cat(biases) if biases else None, pack)
        self.down = PackedLinear(_joined([down.detach() for down, _ in pairs]).to(dtype), None, pack_lora)
        self.up = PackedLinear((ups[0] if len(ups) == 1 else torch.block_diag(*ups)).to(dtype), None, pack_lora)
        self._input: Tensor | None = None
        self._outputs: dict[int, Tensor] = {}

    def __call__(self, index: int, x: Tensor) -> Tensor:
        """The output [B, S, N] of the layer number ``index`` for its input [B, S, D]."""
        if x is not self._input or index not in self._outputs:
            out = self.base(x)
            if self.gate.num_mtp:
                num_ntp = x.shape[1] - self.gate.num_mtp
                out[:, num_ntp:] += self.up(self.down(x[:, num_ntp:]))
            if len(self.widths) == 1:
                return out
            self._input, self._outputs = x, dict(enumerate(out.split(self.widths, dim=-1)))
        out = self._outputs.pop(index)
        if not self._outputs:
            self._input = None
        return out


def _joined(weights: Sequence[Tensor]) -> Tensor:
    """The rows of all; a single weight as it is, without a copy."""
    return weights[0] if len(weights) == 1 else torch.cat(list(weights))


def _fused_forward(layer: Any, product: _Product, index: int) -> Forward:
    """The forward pass of a LoRA layer."""

    def forward(x: Tensor) -> Tensor:
        if x.ndim != 3 or torch.is_grad_enabled():  # PEFT reports a wrong shape, and computes gradients
            return type(layer).forward(layer, x)
        return product(index, x)

    return forward


def _groups(base: nn.Module, layers: Sequence[Any], pack: bool) -> list[list[Any]]:
    """The layers whose products are joined, in groups, and the others one by one."""
    single, groups = dict.fromkeys(layers), []
    for module in base.modules() if pack else ():
        for names in SAME_INPUT:
            group: list[Any] = [getattr(module, name, None) for name in names]
            if not single.keys() >= set(group) or len({each.base_layer.bias is None for each in group}) > 1:
                continue
            weights = [each.base_layer.weight for each in group]
            if all(can_pack(weight) and weight.dtype == JOINED_DTYPE for weight in weights):
                groups.append(group)
                for each in group:
                    del single[each]
    return [*groups, *([layer] for layer in single)]


def fused_forwards(
    base: nn.Module, layers: Sequence[Any], output: nn.Linear | None, gate: Gate
) -> list[tuple[nn.Module, Forward]]:
    """The forward passes of LoRA layers that can be fused, and of the base's ``output`` layer if it is packed."""
    modules = [*layers, *([] if output is None else [output])]
    weights = [weight for module in modules for weight in module.parameters()]
    pack = sum(weight.numel() * weight.element_size() for weight in weights) <= MAX_COPY_BYTES
    forwards: list[tuple[nn.Module, Forward]] = []
    for group in _groups(base, layers, pack):
        product = _Product(group, gate, pack)
        forwards += [(layer, _fused_forward(layer, product, index)) for index, layer in enumerate(group)]
    if output is not None and pack:
        unembedding = PackedLinear(output.weight, output.bias)
        if unembedding.packed is not None:
            forwards.append((output, _unembedding_forward(output, unembedding)))
    return forwards


def _unembedding_forward(output: nn.Linear, product: PackedLinear) -> Forward:
    """The forward pass of the base's output layer."""

    def forward(x: Tensor) -> Tensor:
        return type(output).forward(output, x) if torch.is_grad_enabled() else product(x)

    return forward
