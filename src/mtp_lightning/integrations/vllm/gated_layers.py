# SPDX-License-Identifier: Apache-2.0
"""The gated LoRA in vLLM's linear layers: it acts on the rows of masks, after the scheduler's, and on no other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import LinearBase
from vllm.utils.torch_utils import direct_register_custom_op

from mtp_lightning.errors import RunError
from mtp_lightning.integrations.vllm.pass_state import PassState


class Update(NamedTuple):
    """The LoRA of one of the base's layers, of several that vLLM may have packed into one."""

    A: Tensor  # transposed, [in, r]
    B: Tensor  # transposed and scaled, [r, out]
    begin: int  # first column of its output in the packed layer's


class GatedLayer(NamedTuple):
    """A linear layer of vLLM with updates."""

    state: PassState
    updates: list[Update]


_LAYERS: dict[str, GatedLayer] = {}
"""By name. The custom operation looks its layer up here, so that torch.compile sees no state that changes between passes."""


def _gated_lora(y: Tensor, x: Tensor, name: str) -> None:
    """Add the update to the rows of masks of a layer's output y [rows, out], in place, by its input x [rows, in]."""
    layer = _LAYERS[name]
    if layer.state.layout is None:
        return
    rows = layer.state.layout.num_tokens
    inputs, outputs = x[rows:], y[rows:]
    for update in layer.updates:
        outputs[:, update.begin : update.begin + update.B.shape[1]].addmm_(inputs @ update.A, update.B)


def _no_result(y: Tensor, x: Tensor, name: str) -> None:
    return


direct_register_custom_op(op_name="mtp_gated_lora", op_func=_gated_lora, mutates_args=["y"], fake_impl=_no_result)


def gate_layers(model: nn.Module, state: PassState, lora: dict[str, tuple[Tensor, Tensor]]) -> None:
    """Add the LoRA matrices, by the base's layer name, to a model's linear layers; RunError if one does not fit."""
    packed = getattr(model, "packed_modules_mapping", {})
    parameter = next(model.parameters())
    left = dict(lora)
    for name, module in model.named_modules():
        if not isinstance(module, LinearBase):
            continue
        folder, _, leaf = name.rpartition(".")
        sizes = getattr(module, "output_sizes", None) or [module.output_size]
        updates, begin = [], 0
        for part, size in zip(packed.get(leaf, [leaf]), sizes, strict=True):
            full_name = f"{folder}.{part}"
            if (matrices := left.pop(full_name, None)) is not None:
                A, B = (matrix.t().contiguous().to(parameter) for matrix in matrices)
                if (A.shape[0], B.shape[1]) != (module.input_size, size):
                    raise RunError(f"the LoRA of {full_name} does not fit the base: {A.shape[0]} to {B.shape[1]} features.")
                updates.append(Update(A, B, begin))
            begin += size
        if updates:
            _LAYERS[name] = GatedLayer(state, updates)
            module.forward = _with_update(module.forward, name)  # type: ignore[method-assign]
    if left:
        raise RunError(f"the base has no linear layer {min(left)}, which the saved folder has a LoRA for.")


def _with_update(plain: Callable[..., Any], name: str) -> Callable[..., Any]:
    """A layer's ``forward`` with its update."""

    def forward(x: Tensor, *others: Any, **options: Any) -> Any:
        out = plain(x, *others, **options)
        torch.ops.vllm.mtp_gated_lora(out[0] if isinstance(out, tuple) else out, x, name)
        return out

    return forward
