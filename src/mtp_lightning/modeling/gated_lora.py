# SPDX-License-Identifier: Apache-2.0
"""Gated LoRA: PEFT's LoRA layers, with a gate that says at which positions they act. Knows nothing of masks or tokens.

y_t = W x_t + I(t) * (alpha / r) * B A x_t with I(t) = 1 at the last ``Gate.num_mtp`` positions of every row and 0 before
them. The positions before the tail get the base layer's output untouched, so they keep the base model's bits.

Source: Samragh et al. 2025, §2.2. The tail form is equal to the paper's I(t) because MTP positions come last in memory.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from mtp_lightning.errors import UsageError
from mtp_lightning.modeling.decoder import num_experts, text_config
from mtp_lightning.modeling.peft_private import ADAPTER, LoraLayer, LoraVariant, set_variant
from mtp_lightning.modeling.transformers_private import offload_hook
from mtp_lightning.types import compute_dtype


@dataclass
class LoRA:
    """Settings of the gated LoRA.

    Args:
        rank: rank r of the update. The paper: 128.
        alpha: scale; the update is multiplied by alpha / rank. None: 2 * rank.
        dropout: dropout on the adapter's input while training.
        target_modules: PEFT's selection: a list of layer names, a regular expression, or ``all-linear``. None: all
            linear layers of the decoder, or only the attention projections of a mixture-of-experts base.
        gated: False makes a standard LoRA that is active at every position (ablation of the paper's figure 6; it
            changes next-token outputs).
    """

    rank: int = 128
    alpha: float | None = None
    dropout: float = 0.0
    target_modules: list[str] | str | None = None
    gated: bool = True

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UsageError(f"lora.rank must be 1 or more, got {self.rank}.")
        if self.alpha is not None and not 0 < self.alpha < math.inf:
            raise UsageError(f"lora.alpha must be above 0, or null for 2 * rank, got {self.alpha}.")
        if not 0 <= self.dropout < 1:
            raise UsageError(f"lora.dropout must be at least 0 and below 1, got {self.dropout}.")

    @property
    def effective_alpha(self) -> float:
        """Alpha, or its default of 2 * rank."""
        return 2 * self.rank if self.alpha is None else self.alpha


class Gate(threading.local):
    """The number of positions at the end of every row that the adapters act on; one object shared by all layers.

    Each thread has its own, so that the base may be called in one while another decodes. None outside a forward pass of
    ``MTPModel``.
    """

    def __init__(self) -> None:
        self.num_mtp: int | None = None

    def __reduce__(self) -> Any:
        return Gate, ()

    @contextlib.contextmanager
    def over_last(self, num_mtp: int | None) -> Iterator[None]:
        """Let the adapters act on the last ``num_mtp`` positions within the ``with`` block."""
        before, self.num_mtp = self.num_mtp, num_mtp
        try:
            yield
        finally:
            self.num_mtp = before

    def checkpoint_context(self) -> tuple[contextlib.AbstractContextManager[None], contextlib.AbstractContextManager[None]]:
        """``context_fn`` of non-reentrant checkpointing: the recomputation in backward sees the forward pass's gate."""
        return contextlib.nullcontext(), self.over_last(self.num_mtp)


class _AddLowRank(torch.autograd.Function):
    """``result`` [.., out] plus scaling * up down x, in place and in its dtype: two products forward, four backward.

    The same by automatic differentiation takes twice as many operations, most of them casts and copies.
    """

    @staticmethod
    def forward(ctx: Any, result: Tensor, x: Tensor, down: Tensor, up: Tensor, scaling: float) -> Tensor:
        down, up = down.detach().to(x.dtype), (up.detach() * scaling).to(x.dtype)
        rows = x.detach().reshape(-1, x.shape[-1])
        low = rows @ down.t()
        result.view(-1, result.shape[-1]).addmm_(low, up.t())
        ctx.mark_dirty(result)
        ctx.save_for_backward(rows, low, down, up)
        ctx.scaling = scaling
        return result

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        rows, low, down, up = ctx.saved_tensors
        grad = upstream[0].reshape(-1, upstream[0].shape[-1])
        dtype = compute_dtype(grad.dtype)
        grad_low = grad @ up
        grad_x = (grad_low @ down).view(*upstream[0].shape[:-1], -1) if ctx.needs_input_grad[1] else None
        return upstream[0], grad_x, (grad_low.t() @ rows).to(dtype), (grad.t() @ low).to(dtype) * ctx.scaling, None


class GatedVariant(LoraVariant):
    """PEFT's hook for another form of LoRA forward: the update is computed for the last positions only.

    Args:
        gate: says how many positions these are.
        name: full name of the layer, for errors.
    """

    def __init__(self, gate: Gate, name: str) -> None:
        self.gate = gate
        self.name = name

    def supports_lora_conversion(self) -> bool:
        """False: a gated update is not a plain weight update."""
        return False

    @staticmethod
    def init(module: LoraLayer, adapter_name: str, config: LoraConfig, **kwargs: Any) -> None:
        """Nothing to set up: the variant has no weights of its own."""

    @staticmethod
    def merge_safe(module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """Refused: the update acts at some positions only."""
        raise UsageError("a gated LoRA cannot be merged into the base weights: it acts at MTP positions only.")

    merge_unsafe = unmerge = merge_safe

    def forward(self, module: LoraLayer, *, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        """The base layer's output plus the update at the last ``num_mtp`` positions: [B, S, out], the dtype of ``result``.

        ``x`` is the layer's input, [B, S, in], ``result`` the base layer's output. RuntimeError if no
        gate is open in a training forward pass, UsageError if the input has another form, as in experts and in OPT's MLPs.
        """
        num_mtp = self.gate.num_mtp
        if num_mtp is None and module.training and torch.is_grad_enabled():
            raise RuntimeError("no gate: call MTPModel, not its base, and MTPModel.enable_gradient_checkpointing().")
        if not num_mtp:
            return result
        if x.ndim != 3:
            raise UsageError(
                f"model.lora.target_modules: {self.name} can have no gated LoRA, because its input is {list(x.shape)}, not"
                " [batch, positions, features]. List the layers that get one, without it (null is all linear layers)."
            )
        down, up = module.lora_A[active_adapter], module.lora_B[active_adapter]
        scaling, num_ntp = module.scaling[active_adapter], result.shape[1] - num_mtp
        tail = module.lora_dropout[active_adapter](x[:, num_ntp:])
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else down.weight.dtype
        if (
            num_ntp == 0
            and dtype == result.dtype
            and type(module.base_layer) is nn.Linear
            and offload_hook(down) is None  # which brings the weights when the module is called
            and not torch.compiler.is_compiling()
        ):
            return _AddLowRank.apply(result, tail.to(dtype), down.weight, up.weight, scaling)
        update = (up(down(tail.to(down.weight.dtype))) * scaling).to(result.dtype)
        if num_ntp == 0:
            return result + update
        return torch.cat([result[:, :num_ntp], result[:, num_ntp:] + update], dim=1)


def add_gated_lora(base: PreTrainedModel, lora: LoRA, gate: Gate) -> LoraConfig:
    """Freeze the base and put gated LoRA layers into it, in place; returns PEFT's configuration of the adapter.

    Adapter weights are float32 (float64 on a float64 base). UsageError if ``target_modules`` matches no layer.
    """
    targets = _default_targets(base) if lora.target_modules is None else lora.target_modules
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.effective_alpha,
        lora_dropout=lora.dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
    )
    base.requires_grad_(False)
    try:
        inject_adapter_in_model(config, base, adapter_name=ADAPTER)
    except ValueError as error:
        raise UsageError(f"model.lora.target_modules {targets!r} fits no layer of the base model: {error}") from error
    dtype = compute_dtype(base.dtype)
    for name, layer in _named_lora_layers(base):
        _materialize(layer)
        set_variant(layer, GatedVariant(gate, name))
        layer.cast_input_dtype_enabled = False  # the variant casts, and only the positions that it needs
        layer.lora_A[ADAPTER].to(dtype)
        layer.lora_B[ADAPTER].to(dtype)
    return config


def adapted_layers(config: Any, lora: LoRA) -> list[str]:
    """Full names of the layers that get an adapter in a base of this configuration; needs no weights."""
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(config)
        add_gated_lora(base, lora, Gate())
    return [name for name, _ in _named_lora_layers(base)]


def _named_lora_layers(base: PreTrainedModel) -> list[tuple[str, Any]]:
    return [(name, module) for name, module in base.named_modules() if isinstance(module, LoraLayer)]


def _default_targets(base: PreTrainedModel) -> list[str]:
    """Full names of the decoder's linear layers, in a mixture of experts only those in the attention.

    Experts see the positions of all rows regrouped by a router, so a gate by position is meaningless there. A vision tower
    next to the decoder gets no adapters.
    """
    decoder = base.get_decoder()
    prefix = next(name for name, module in base.named_modules() if module is decoder)
    is_mixture = num_experts(text_config(base)) > 1
    return [
        f"{prefix}.{name}"
        for name, module in decoder.named_modules()
        if isinstance(module, nn.Linear) and (not is_mixture or "self_attn" in name)
    ]


def _materialize(layer: Any) -> None:
    """Allocate an adapter on its layer's device if PEFT left it on the meta device, as it does for offloaded layers."""
    hook = offload_hook(layer.base_layer)
    if hook is not None and layer.lora_A[ADAPTER].weight.is_meta:
        for module in (layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]):
            module.to_empty(device=hook.execution_device)
        layer.reset_lora_parameters(ADAPTER, init_lora_weights=True)
