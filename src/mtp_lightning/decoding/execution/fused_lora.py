# SPDX-License-Identifier: Apache-2.0
"""Forward passes of gated LoRA layers while decoding: the adapters' update is added in place to the tail; nothing is cast.

``JoinedLayers`` copies the weights of layers that read one input into one packed matrix, adapters and all: for bases that
are small enough, on a CPU, where calls cost more than numbers. ``SharedAdapters`` reads the base's weights where they lie,
and joins only the adapters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtp_lightning.decoding.packed_linear import PackedLinear, is_autocast
from mtp_lightning.modeling.gated_lora import Gate
from mtp_lightning.modeling.peft_private import ADAPTER

LARGEST_BLOCK = 1 << 17
"""Numbers in a matrix of several adapters that is zeros but for its blocks; larger ones are multiplied one by one."""

Forward = Callable[[Tensor], Tensor]


def adapter(layer: Any) -> tuple[Tensor, Tensor]:
    """A layer's LoRA matrices, A [r, D] and B [N, r]."""
    return layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight


def _keeps_pefts_path(x: Tensor) -> bool:
    """PEFT says what is wrong; or somebody trains while a reader has paused in the middle of a text; or autocast."""
    return x.ndim != 3 or torch.is_grad_enabled() or is_autocast(x.device)


def _matrices(members: list[Any]) -> tuple[Tensor, list[Tensor]]:
    """The first matrices above each other, [sum r, D]; the second ones with their scaling, [N, r] each."""
    dtype = members[0].base_layer.weight.dtype
    down = torch.cat([adapter(layer)[0].detach() for layer in members]).to(dtype)
    return down, [(adapter(layer)[1].detach() * layer.scaling[ADAPTER]).to(dtype) for layer in members]


class JoinedLayers:
    """Layers that read one input as one product: their weights and the adapters' first matrices above each other.

    Args:
        members: the layers, in one dtype and on one device.
        gate: says how many positions at the end the adapters add to.
    """

    def __init__(self, members: list[Any], gate: Gate) -> None:
        self.members, self.gate = members, gate
        self.input: Tensor | None = None
        self.outputs: list[Tensor] = []
        weights = [layer.base_layer.weight.detach() for layer in members]
        biases = [layer.base_layer.bias for layer in members]
        down, ups = _matrices(members)
        width = sum(len(weight) for weight in weights)
        bias = None
        if any(each is not None for each in biases):
            own = [w.new_zeros(len(w)) if b is None else b.detach() for w, b in zip(weights, biases, strict=True)]
            bias = torch.cat([*own, down.new_zeros(len(down))])
        self.linear = PackedLinear(torch.cat([*weights, down]), bias, single=False)
        self.widths = [len(weight) for weight in weights]
        # The updates' columns: the layers' outputs, then what the first matrices gave.
        if width * len(down) <= LARGEST_BLOCK:
            self.ups, self.columns = [PackedLinear(torch.block_diag(*ups))], [width, len(down)]
        else:
            self.ups, self.columns = [PackedLinear(up) for up in ups], [*self.widths, *(up.shape[1] for up in ups)]
        self.widths.append(len(down))

    def compute(self, x: Tensor) -> list[Tensor]:
        """The layers' outputs, [B, L, N] each."""
        out = self.linear(x)
        num_mtp = self.gate.num_mtp
        if num_mtp:
            parts = out[:, x.shape[1] - num_mtp :].split_with_sizes(self.columns, -1)
            for up, to, low in zip(self.ups, parts, parts[len(self.ups) :], strict=False):
                up.add_to(to, low)
        return list(out.split_with_sizes(self.widths, -1))

    def forwards(self) -> list[tuple[nn.Module, Forward]]:
        """The layers and their forward passes."""
        return [(layer, self._forward(number, layer)) for number, layer in enumerate(self.members)]

    def _forward(self, number: int, layer: Any) -> Forward:
        weight, bias, last = layer.base_layer.weight, layer.base_layer.bias, layer is self.members[-1]
        gate, plain_single = self.gate, self.linear.plain_single

        def forward(x: Tensor) -> Tensor:
            if _keeps_pefts_path(x):
                return type(layer).forward(layer, x)
            if plain_single and not gate.num_mtp and x.numel() == x.shape[2]:
                return F.linear(x, weight, bias)
            if self.input is not x:
                self.input, self.outputs = x, self.compute(x)
            out = self.outputs[number]
            if last:
                self.input, self.outputs = None, []
            return out

        return forward


class SharedAdapters:
    """Layers that read one input, each with its own product; the adapters' first matrices are one.

    Args:
        members: the layers, on one device.
        gate: says how many positions at the end the adapters add to.
    """

    def __init__(self, members: list[Any], gate: Gate) -> None:
        self.members, self.gate = members, gate
        down, ups = _matrices(members)
        self.down, self.ups = down.t(), [up.t() for up in ups]
        self.input: Tensor | None = None
        self.product: Tensor | None = None

    def forwards(self) -> list[tuple[nn.Module, Forward]]:
        """The layers and their forward passes."""
        found, begin = [], 0
        for layer, up in zip(self.members, self.ups, strict=True):
            found.append((layer, self._forward(layer, begin, up)))
            begin += len(up)
        return found

    def _forward(self, layer: Any, begin: int, up: Tensor) -> Forward:
        weight, bias, last = layer.base_layer.weight, layer.base_layer.bias, layer is self.members[-1]
        end, gate = begin + len(up), self.gate

        def forward(x: Tensor) -> Tensor:
            if _keeps_pefts_path(x):
                return type(layer).forward(layer, x)
            out = F.linear(x, weight, bias)
            num_mtp = gate.num_mtp
            if not num_mtp:
                return out
            at = x.shape[1] - num_mtp
            if self.input is not x:
                self.input, self.product = x, torch.matmul(x[:, at:], self.down)
            assert self.product is not None
            product = self.product[..., begin:end]
            if out.shape[0] == 1:
                out[0, at:].addmm_(product[0], up)
            else:
                out[:, at:] += torch.matmul(product, up)
            if last:
                self.input = self.product = None
            return out

        return forward


def unembedding_forward(layer: nn.Linear) -> Forward:
    """The forward pass of the base's output layer, its weight packed.

    Args:
        layer: the layer.

    Returns:
        The forward pass.
    """
    linear = PackedLinear(layer.weight, layer.bias)

    def forward(x: Tensor) -> Tensor:
        if torch.is_grad_enabled() or is_autocast(x.device):
            return type(layer).forward(layer, x)
        return linear(x)

    return forward
