# SPDX-License-Identifier: Apache-2.0
"""Forward passes of gated LoRA layers while decoding: few products, the update added in place, nothing cast.

On a CPU the weights are packed beforehand (``PackedLinear``), which needs a copy of them: for bases that are small enough.
In bfloat16 the layers that read one input are joined, and their matrices A with them: with masks 10 products a decoder layer
instead of 21, without 4 instead of 7. A step of SmolLM2-135M (rank 32) is 1.13 times as fast with 4 masks, and 1.05 times
without. Larger bases, and those on a GPU, are read in place. Other layers (quantised, offloaded, sharded, with hooks, with
other adapters) keep PEFT's forward pass, and under ``torch.autocast`` all do.
"""

from __future__ import annotations

import functools
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
"""Names of layers that read one input, in most decoders. Where they do not, each computes the product: right, but slow."""
MAX_RANK_SHARE = 1 / 8
"""Rows of the matrices A, as a share of those of the weights above them, up to which layers are joined: every step reads
them, and the matrix of the B_i is mostly zeros."""

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


def _separate_forward(layer: Any, gate: Gate, pack: bool) -> Forward:
    """The forward pass of a LoRA layer by itself: three products."""
    weight, (down, up) = layer.base_layer.weight, lora_matrices(layer)
    base_product = PackedLinear(weight, layer.base_layer.bias, pack)
    down_product = PackedLinear(down.detach().to(weight.dtype), None, pack)
    up_product = PackedLinear((up.detach() * layer.scaling[ADAPTER]).to(weight.dtype), None, pack)

    def forward(x: Tensor) -> Tensor:
        if not _in_step(x, gate):
            return type(layer).forward(layer, x)
        out = base_product(x)
        if gate.num_mtp:
            num_ntp = x.shape[1] - gate.num_mtp
            out[:, num_ntp:].add_(up_product(down_product(x[:, num_ntp:])))  # += would copy the tail onto itself
        return out

    return forward


def _in_step(x: Tensor, gate: Gate) -> bool:
    """True within a decoding step of this thread.

    Any other call takes PEFT's forward pass, which computes gradients, names a wrong shape, and leaves alone what joined
    layers share within a step of another thread.
    """
    return gate.num_mtp is not None and x.ndim == 3 and not torch.is_grad_enabled()


class _JoinedLayers:
    """LoRA layers that read one input [B, S, D], as two products; the first that is called computes for all.

    1. [W_1; W_2; ..; A_1; A_2; ..] x: all base outputs, and all low-rank states, which count at the masks only.
    2. At the masks, all updates by the block-diagonal matrix of the B_i.
    """

    def __init__(self, layers: Sequence[Any], gate: Gate) -> None:
        bases = [layer.base_layer for layer in layers]
        downs, ups = zip(*map(lora_matrices, layers), strict=True)
        dtype = bases[0].weight.dtype
        weights = [weight.detach().to(dtype) for weight in (*(base.weight for base in bases), *downs)]
        bias = bases[0].bias
        if bias is not None:
            bias = torch.cat([*(base.bias.detach() for base in bases), bias.new_zeros(sum(map(len, downs)))])
        scaled = [up.detach() * layer.scaling[ADAPTER] for up, layer in zip(ups, layers, strict=True)]
        self.wide, self.up = PackedLinear(torch.cat(weights), bias), PackedLinear(torch.block_diag(*scaled).to(dtype))
        self.layers, self.gate, self.widths = layers, gate, [base.out_features for base in bases]
        self.input: Tensor | None = None  # what ``outputs``, by layer, were computed from; each is handed out once
        self.outputs: dict[int, Tensor] = {}

    def output(self, index: int, x: Tensor) -> Tensor:
        """The output [B, S, N] of the layer number ``index``."""
        if x is not self.input or index not in self.outputs:
            out, width = self.wide(x), sum(self.widths)
            if self.gate.num_mtp:
                tail = out[:, x.shape[1] - self.gate.num_mtp :]
                tail[..., :width].add_(self.up(tail[..., width:]))
            self.input, self.outputs = x, dict(enumerate(out[..., :width].split(self.widths, dim=-1)))
        output = self.outputs.pop(index)
        if not self.outputs:
            self.input = None
        return output

    def forwards(self) -> list[tuple[nn.Module, Forward]]:
        """The forward pass of each layer."""

        def forward(index: int, layer: Any, x: Tensor) -> Tensor:
            return self.output(index, x) if _in_step(x, self.gate) else type(layer).forward(layer, x)

        return [(layer, functools.partial(forward, index, layer)) for index, layer in enumerate(self.layers)]


def joining_pays(weight: Tensor) -> bool:
    """True for weights that are packed, so copied anyway, and in bfloat16: in float32 larger products are no faster."""
    return weight.dtype == torch.bfloat16 and can_pack(weight)


def _joined(base: nn.Module, layers: Sequence[Any]) -> list[list[Any]]:
    """The layers that are joined, in groups, by their names."""
    fitting = {layer for layer in layers if joining_pays(layer.base_layer.weight)}

    def fits(group: list[Any]) -> bool:
        if not fitting.issuperset(group) or len({(layer.in_features, layer.base_layer.bias is None) for layer in group}) > 1:
            return False
        return sum(layer.r[ADAPTER] for layer in group) <= MAX_RANK_SHARE * sum(layer.out_features for layer in group)

    groups = [[getattr(module, name, None) for name in names] for module in base.modules() for names in SAME_INPUT]
    return [group for group in groups if fits(group)]


def fused_forwards(
    base: nn.Module, layers: Sequence[Any], output: nn.Linear | None, gate: Gate
) -> list[tuple[nn.Module, Forward]]:
    """The forward passes of LoRA layers that can be fused, and of the base's ``output`` layer if it is packed."""
    modules = [*layers, *([] if output is None else [output])]
    weights = [weight for module in modules for weight in module.parameters()]
    pack = sum(weight.numel() * weight.element_size() for weight in weights) <= MAX_COPY_BYTES
    groups = _joined(base, layers) if pack else []
    forwards = [pair for group in groups for pair in _JoinedLayers(group, gate).forwards()]
    done = {layer for layer, _ in forwards}
    forwards += [(layer, _separate_forward(layer, gate, pack)) for layer in layers if layer not in done]
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
