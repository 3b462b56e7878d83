# SPDX-License-Identifier: Apache-2.0
"""The gated LoRA in vLLM's linear layers: it acts on the rows of masks, after the scheduler's, and on no other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
from vllm.utils.torch_utils import direct_register_custom_op

from mtp_lightning.errors import RunError
from mtp_lightning.integrations.vllm.folder import packed_lora
from mtp_lightning.integrations.vllm.pass_state import PassState

Product = Callable[[Tensor], Tensor]


class GatedLayer(NamedTuple):
    """A linear layer of vLLM with its LoRA."""

    state: PassState
    down: Product  # from rows [.., in] to [.., r]
    up: Product  # from rows [.., r] to [.., out]


_LAYERS: dict[str, GatedLayer] = {}
"""By name. The custom operation looks its layer up here, so that torch.compile sees no state that changes between passes."""


def _gated_lora(y: Tensor, x: Tensor, name: str) -> None:
    """Add the update to the rows of masks of a layer's output y [rows, out], in place, by its input x [rows, in]."""
    layer = _LAYERS[name]
    if layer.state.layout is not None:
        rows = layer.state.layout.num_tokens
        y[rows:] += layer.up(layer.down(x[rows:]))


def _no_result(y: Tensor, x: Tensor, name: str) -> None:
    return


direct_register_custom_op(op_name="mtp_gated_lora", op_func=_gated_lora, mutates_args=["y"], fake_impl=_no_result)


def gate_layers(model: nn.Module, state: PassState, lora: dict[str, tuple[Tensor, Tensor]]) -> None:
    """Add the LoRA matrices, by the base's layer name, to a model's linear layers; RunError if one does not fit."""
    packed = getattr(model, "packed_modules_mapping", {})
    parameter, left = next(model.parameters()), dict(lora)
    for name, module in model.named_modules():
        if not isinstance(module, LinearBase):
            continue
        folder, _, leaf = name.rpartition(".")
        sizes = getattr(module, "output_sizes", None) or [module.output_size]
        names = [f"{folder}.{part}" for part in packed.get(leaf, [leaf])]
        parts = [left.pop(full_name, None) for full_name in names]
        if all(part is None for part in parts):
            continue
        for full_name, part, size in zip(names, parts, sizes, strict=True):
            if part is not None and (part[0].shape[1], part[1].shape[0]) != (module.input_size, size):
                raise RunError(f"the LoRA of {full_name} is for {part[0].shape[1]} inputs and {part[1].shape[0]} outputs.")
        down, up = (_product(weight.to(parameter)) for weight in packed_lora(parts, sizes))
        _LAYERS[name] = GatedLayer(state, down, up)
        module.forward = _with_update(module.forward, name)
    if left:
        raise RunError(f"the base has no linear layer {min(left)}, which the saved folder has a LoRA for.")


def _product(weight: Tensor) -> Product:
    """The product with a weight [out, in]; on a CPU by vLLM's kernel, for which the weight is packed here."""
    if weight.device.type != "cpu":
        return lambda x: F.linear(x, weight)
    layer: Any = nn.Module()
    layer.weight = nn.Parameter(weight, requires_grad=False)
    dispatch_cpu_unquantized_gemm(layer, remove_weight=True)
    return lambda x: layer.cpu_linear(x, layer.weight, None)


def _with_update(plain: Callable[..., Any], name: str) -> Callable[..., Any]:
    """A layer's ``forward`` with its update."""

    def forward(x: Tensor, *others: Any, **options: Any) -> Any:
        out = plain(x, *others, **options)
        # Calling the operation takes longer than finding out that there are no masks; only compilers need it.
        add = torch.ops.vllm.mtp_gated_lora if torch.compiler.is_compiling() else _gated_lora
        add(out[0] if isinstance(out, tuple) else out, x, name)
        return out

    return forward
