# SPDX-License-Identifier: Apache-2.0
"""Forward passes of gated LoRA layers while decoding: few operations, from weights that are prepared once.

Layers that read the same input are computed together and the adapters' update is added in place to the tail; nothing is
cast. ``JoinedLayers`` copies the weights of these layers, adapters included, into one packed matrix: for bases that are
small enough, on a CPU, where the number of calls matters more than their size. ``SharedAdapters`` reads the base's
weights in place and joins only the adapters. Other layers (quantised, offloaded, sharded, with hooks, with other
adapters) keep PEFT's forward pass, and under ``torch.autocast`` all do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtp_lightning.decoding.packed_linear import PackedLinear, packed_dtypes
from mtp_lightning.modeling.gated_lora import Gate, GatedVariant
from mtp_lightning.modeling.peft_private import ADAPTER, LoraLinear, get_variant
from mtp_lightning.modeling.transformers_private import offload_hook

SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Names of layers that read the same input. Each pass checks it, so a model where they do not only loses time."""
MAX_COPY_BYTES = 2 << 30
"""Bytes of weights that are copied, joined and packed on a CPU; larger bases are read in place."""
MAX_BLOCK_DIAGONAL = 1 << 17
"""Elements of a block-diagonal matrix of several adapters; beyond that they are multiplied one by one."""

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


def _needs_peft(x: Tensor) -> bool:
    """True for a wrong shape (PEFT reports it), or where gradients are needed."""
    return x.ndim != 3 or torch.is_grad_enabled()


def _joined_matrices(layers: Sequence[Any]) -> tuple[Tensor, list[Tensor]]:
    """The layers' A stacked, [sum r, D], and each one's B times its scaling, [N, r]."""
    dtype = layers[0].base_layer.weight.dtype
    down = torch.cat([lora_matrices(layer)[0].detach() for layer in layers]).to(dtype)
    return down, [(lora_matrices(layer)[1].detach() * layer.scaling[ADAPTER]).to(dtype) for layer in layers]


class JoinedLayers:
    """Layers that read one input, in one dtype, as one packed product: of their weights and the adapters' A stacked."""

    def __init__(self, layers: Sequence[Any], gate: Gate) -> None:
        self.layers, self.gate = layers, gate
        self.input: Tensor | None = None
        self.outputs: list[Tensor] = []
        weights = [layer.base_layer.weight.detach() for layer in layers]
        biases = [layer.base_layer.bias for layer in layers]
        down, ups = _joined_matrices(layers)
        bias = None
        if any(b is not None for b in biases):
            filled = [w.new_zeros(len(w)) if b is None else b.detach() for w, b in zip(weights, biases, strict=True)]
            bias = torch.cat([*filled, down.new_zeros(len(down))])
        self.linear = PackedLinear(torch.cat([*weights, down]), bias, single=False)
        self.widths = [*map(len, weights), len(down)]
        # How the product's columns split for the updates: first what they are added to, then what they are computed from.
        width = sum(self.widths[:-1])
        if width * len(down) <= MAX_BLOCK_DIAGONAL:
            self.ups, self.columns = [PackedLinear(torch.block_diag(*ups))], [width, len(down)]
        else:
            self.ups, self.columns = [PackedLinear(up) for up in ups], [*self.widths[:-1], *(up.shape[1] for up in ups)]

    def compute(self, x: Tensor) -> list[Tensor]:
        """The layers' outputs, [B, L, N] each."""
        out = self.linear(x)
        num_mtp = self.gate.num_mtp
        if num_mtp:
            parts = out[:, x.shape[1] - num_mtp :].split_with_sizes(self.columns, -1)
            for up, target, low_rank in zip(self.ups, parts, parts[len(self.ups) :], strict=False):
                up.add_to(target, low_rank)
        return list(out.split_with_sizes(self.widths, -1))

    def forwards(self) -> list[tuple[nn.Module, Forward]]:
        """The layers and their forward passes."""
        return [(layer, self._forward(i, layer)) for i, layer in enumerate(self.layers)]

    def _forward(self, i: int, layer: Any) -> Forward:
        weight, bias, is_last = layer.base_layer.weight, layer.base_layer.bias, layer is self.layers[-1]
        gate, plain_single = self.gate, self.linear.plain_single

        def forward(x: Tensor) -> Tensor:
            if _needs_peft(x):
                return type(layer).forward(layer, x)
            if plain_single and not gate.num_mtp and x.numel() == x.shape[2]:
                return F.linear(x, weight, bias)
            if self.input is not x:
                self.input, self.outputs = x, self.compute(x)
            out = self.outputs[i]
            if is_last:
                self.input, self.outputs = None, []
            return out

        return forward


class SharedAdapters:
    """Layers that read one input, each with its own product; the product of the adapters' A is shared."""

    def __init__(self, layers: Sequence[Any], gate: Gate) -> None:
        self.layers, self.gate = layers, gate
        down, ups = _joined_matrices(layers)
        self.down, self.ups = down.t(), [up.t() for up in ups]
        self.input: Tensor | None = None
        self.product: Tensor | None = None

    def forwards(self) -> list[tuple[nn.Module, Forward]]:
        """The layers and their forward passes."""
        forwards, begin = [], 0
        for layer, up in zip(self.layers, self.ups, strict=True):
            forwards.append((layer, self._forward(layer, begin, up)))
            begin += len(up)
        return forwards

    def _forward(self, layer: Any, begin: int, up: Tensor) -> Forward:
        weight, bias, is_last = layer.base_layer.weight, layer.base_layer.bias, layer is self.layers[-1]
        end, gate = begin + len(up), self.gate

        def forward(x: Tensor) -> Tensor:
            if _needs_peft(x):
                return type(layer).forward(layer, x)
            out = F.linear(x, weight, bias)
            num_mtp = gate.num_mtp
            if not num_mtp:
                return out
            num_ntp = x.shape[1] - num_mtp
            if self.input is not x:
                self.input, self.product = x, torch.matmul(x[:, num_ntp:], self.down)
            assert self.product is not None
            low_rank = self.product[..., begin:end]
            if out.shape[0] == 1:
                out[0, num_ntp:].addmm_(low_rank[0], up)
            else:
                out[:, num_ntp:] += torch.matmul(low_rank, up)
            if is_last:
                self.input = self.product = None
            return out

        return forward


def _copied_bytes(layers: Sequence[Any]) -> int:
    weights = [weight for layer in layers for weight in (layer.base_layer.weight, lora_matrices(layer)[0])]
    return sum(weight.numel() * weight.element_size() for weight in weights)


def fused_forwards(base: nn.Module, layers: Sequence[Any], gate: Gate) -> list[tuple[nn.Module, Forward]]:
    """Layers of a base that can be fused, with their forward passes; siblings are computed together."""
    names = {id(module): name for name, module in base.named_modules()}
    groups: dict[tuple[str, str, Any], list[Any]] = {}
    for layer in layers:
        parent, _, name = names[id(layer)].rpartition(".")
        family = next((siblings[0] for siblings in SIBLINGS if name in siblings), name)
        weight = layer.base_layer.weight
        groups.setdefault((parent, family, (weight.device, weight.dtype, weight.shape[1])), []).append(layer)
    is_small = _copied_bytes(layers) <= MAX_COPY_BYTES
    forwards: list[tuple[nn.Module, Forward]] = []
    for (_, _, (device, _, _)), members in groups.items():
        group_class = JoinedLayers if is_small and device.type == "cpu" else SharedAdapters
        forwards += group_class(members, gate).forwards()
    return forwards


def packed_unembedding(output: nn.Linear, layers: Sequence[Any]) -> Forward | None:
    """The forward pass of the base's output layer with a packed weight.

    None if there is no gain, or no room for it in addition to the fused ``layers``.
    """
    weight = output.weight
    if weight.device.type != "cpu" or weight.dtype not in packed_dtypes():
        return None
    if _copied_bytes(layers) + weight.numel() * weight.element_size() > MAX_COPY_BYTES:
        return None
    linear = PackedLinear(weight, output.bias)

    def forward(x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return type(output).forward(output, x)
        return linear(x)

    return forward
