# SPDX-License-Identifier: Apache-2.0
"""Lean layers: while decoding, gated LoRA layers over plain linear ones run few operations, from weights made ready once.

Adapters that read the same input are one matrix; the update is added in place to the tail of the base layer's output;
nothing is cast. The modules themselves are left as they are: only their ``forward`` is covered, and uncovered afterwards.
Layers of any other kind (quantised, offloaded, sharded, with hooks, with other adapters) keep PEFT's own path, and under
``torch.autocast`` all do.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import Tensor, nn

from mtp_lightning.draft_chain import Chain, DraftChain, unrolled
from mtp_lightning.gated_lora import ADAPTER, Gate, GatedVariant, lora_layers

if TYPE_CHECKING:
    from mtp_lightning.budget import DraftRecord
    from mtp_lightning.model import MTPModel
    from mtp_lightning.step_costs import StepCosts

SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Names of layers that read the same input. Each pass looks again, so a model where they do not only loses time."""


class LeanWeights:
    """Weights made ready for decoding, and whether they are still those of the model.

    A copied or pickled model makes its own.

    Attributes:
        draft_costs: what steps cost on this device and in this dtype, and how drafts do; None until somebody asks.
    """

    def __init__(self) -> None:
        self._made_from: tuple[Any, ...] | None = None
        self._forwards: list[tuple[nn.Module, Callable[[Tensor], Tensor]]] = []
        self._chain: Chain | None = None
        self._depth = 0
        self._place: tuple[torch.device, torch.dtype] | None = None
        self.draft_costs: tuple[StepCosts, DraftRecord] | None = None

    def __reduce__(self) -> Any:
        return LeanWeights, ()

    def __deepcopy__(self, memo: Any) -> LeanWeights:
        return LeanWeights()

    @contextlib.contextmanager
    def use(self, model: MTPModel) -> Iterator[None]:
        """Cover the layers of the model these weights belong to within the ``with`` block."""
        if self._depth:  # another reader has paused in the middle of a text
            self._uncover()
        self._prepare(model)
        for layer, forward in self._forwards:
            layer.forward = forward
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            if self._depth == 0:
                self._uncover()

    def _uncover(self) -> None:
        for layer, _ in self._forwards:
            del layer.forward

    def chain(self, model: MTPModel) -> Chain:
        """The sampler head's chain."""
        assert model.sampler_head is not None
        if self._depth and self._chain is not None and not _autocast(model.base.device):
            return self._chain
        return DraftChain(model.sampler_head, model.base.get_input_embeddings())

    def _prepare(self, model: MTPModel) -> None:
        device, dtype = model.base.device, model.base.dtype
        if self._place not in (None, (device, dtype)):
            self.draft_costs = None
        self._place = (device, dtype)
        layers = [layer for layer in lora_layers(model.base) if is_plain(layer, model.gate)]
        head = model.sampler_head
        weights = [each for layer in layers for each in (*_adapter(layer), layer.base_layer.weight)]
        weights += [] if head is None else [model.base.get_input_embeddings().weight, *head.parameters()]
        made_from = (head, *((w.data_ptr(), _version(w), w.dtype, w.device) for w in weights))
        if made_from == self._made_from:
            return
        self._forwards = lean_forwards(layers, model)
        self._chain = None
        if head is not None and all(type(p.data) is Tensor and p.device == device for p in head.parameters()):
            vocab_size = model.unembed.vocab_size
            with torch.autocast(device.type, enabled=False):
                self._chain = unrolled(head, model.base.get_input_embeddings(), vocab_size, dtype)
        self._made_from = made_from


def _version(weight: Tensor) -> int:
    """Counts changes in place; a weight made in inference mode has no count, and -1 stands for it."""
    return -1 if weight.is_inference() else weight._version


def _autocast(device: torch.device) -> bool:
    return torch.is_autocast_enabled(device.type)


def _adapter(layer: Any) -> tuple[Tensor, Tensor]:
    return layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight


def is_plain(layer: Any, gate: Gate) -> bool:
    """Whether a LoRA layer is a gated adapter on a plain linear layer, and nobody else has a hand in it."""
    modules = (layer, *layer.children(), *layer.lora_A.children(), *layer.lora_B.children())
    hooked = any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) or hasattr(m, "_hf_hook") for m in modules)
    if hooked or type(layer) is not PeftLinear or type(layer.base_layer) is not nn.Linear:
        return False
    if layer.disable_adapters or layer.merged or layer.active_adapters != [ADAPTER] or layer.fan_in_fan_out:
        return False
    variant = layer.lora_variant.get(ADAPTER)
    if not isinstance(variant, GatedVariant) or variant.gate is not gate or layer.lora_B[ADAPTER].bias is not None:
        return False
    weights = (*_adapter(layer), layer.base_layer.weight)
    return all(type(w.data) is Tensor and w.device == weights[0].device and w.device.type != "meta" for w in weights)


class _Shared:
    """The first product of the adapters that read one input, kept until the last of them has it."""

    def __init__(self, down: Tensor) -> None:
        self.down = down
        self.input: Tensor | None = None
        self.product = down


def lean_forwards(layers: list[Any], model: MTPModel) -> list[tuple[nn.Module, Callable[[Tensor], Tensor]]]:
    """A forward for each layer.

    Args:
        layers: gated LoRA layers on plain linear ones.
        model: the model that they are in.

    Returns:
        Layers and their forwards.
    """
    names = {id(module): name for name, module in model.base.named_modules()}
    groups: dict[tuple[str, str], list[Any]] = {}
    for layer in layers:
        parent, _, own = names[id(layer)].rpartition(".")
        family = next((siblings[0] for siblings in SIBLINGS if own in siblings), own)
        groups.setdefault((parent, family), []).append(layer)
    found = []
    for members in groups.values():
        dtype = members[0].base_layer.weight.dtype
        shared = _Shared(torch.cat([_adapter(layer)[0].detach() for layer in members]).to(dtype).t())
        begin = 0
        for layer in members:
            up = (_adapter(layer)[1].detach() * layer.scaling[ADAPTER]).to(dtype).t()
            end = begin + up.shape[0]
            found.append((layer, _forward(layer, shared, begin, end, up, model.gate, layer is members[-1])))
            begin = end
    return found


def _forward(
    layer: Any, shared: _Shared, begin: int, end: int, up: Tensor, gate: Gate, last: bool
) -> Callable[[Tensor], Tensor]:
    weight, bias = layer.base_layer.weight, layer.base_layer.bias

    def forward(x: Tensor) -> Tensor:
        num_mtp = gate.num_mtp
        if x.ndim != 3 or torch.is_grad_enabled() or _autocast(x.device):
            # PEFT's path: it says what is wrong, somebody trains while a reader has paused in the middle of a text, or
            # products have another dtype than what they are added to.
            return type(layer).forward(layer, x)
        out = F.linear(x, weight, bias)
        if not num_mtp:
            return out
        at = x.shape[1] - num_mtp
        if shared.input is not x:
            shared.input, shared.product = x, torch.matmul(x[:, at:], shared.down)
        product = shared.product[..., begin:end]
        if out.shape[0] == 1:
            out[0, at:].addmm_(product[0], up)
        else:
            out[:, at:] += torch.matmul(product, up)
        if last:
            shared.input, shared.product = None, shared.down
        return out

    return forward
