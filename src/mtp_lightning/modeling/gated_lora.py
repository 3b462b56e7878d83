# SPDX-License-Identifier: Apache-2.0
"""The gate on PEFT's LoRA layers. PEFT owns the layers; this file owns where they act. Knows nothing of masks or tokens.

y_t = W x_t + I(t) * (alpha / r) * B A x_t with I(t) = 1 at the last ``Gate.num_mtp`` positions of every row and 0 before
them. The positions before the tail get the base layer's output untouched, so they keep the base model's bits.

Source: Samragh et al. 2025, §2.2. The tail form is equal to the paper's I(t) because MTP positions come last in memory.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from mtp_lightning.errors import UsageError
from mtp_lightning.modeling.decoder import text_config
from mtp_lightning.modeling.peft_private import ADAPTER, LoraLayer, LoraVariant, lora_layers, set_variant
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
            linear layers of the decoder; with a mixture-of-experts base the attention projections alone.
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
            raise UsageError(f"rank must be 1 or more, got {self.rank}. Set model.lora.rank in the YAML.")
        if self.alpha is not None and not 0 < self.alpha < math.inf:
            raise UsageError(f"alpha must be above 0, or null for 2 * rank, got {self.alpha}. Set model.lora.alpha.")
        if not 0 <= self.dropout < 1:
            raise UsageError(f"dropout must be at least 0 and below 1, got {self.dropout}. Set model.lora.dropout.")

    @property
    def effective_alpha(self) -> float:
        """What is divided by the rank to give the scale."""
        return 2 * self.rank if self.alpha is None else self.alpha


class Gate:
    """How many positions at the end of every row the adapters act on. One object is shared by all layers of a model.

    A plain attribute, not a context variable: torch.compile traces it without a graph break.

    Attributes:
        num_mtp: number of positions, or None outside a forward pass of ``MTPModel``.
    """

    def __init__(self) -> None:
        self.num_mtp: int | None = None

    @contextlib.contextmanager
    def open(self, num_mtp: int | None) -> Iterator[None]:
        """Let the adapters act on the last ``num_mtp`` positions within the ``with`` block."""
        before, self.num_mtp = self.num_mtp, num_mtp
        try:
            yield
        finally:
            self.num_mtp = before

    def checkpoint_context(self) -> tuple[contextlib.AbstractContextManager[None], contextlib.AbstractContextManager[None]]:
        """``context_fn`` of non-reentrant checkpointing: the recomputation in backward sees the forward pass's gate."""
        return contextlib.nullcontext(), self.open(self.num_mtp)


class GatedVariant(LoraVariant):
    """PEFT's hook for another form of LoRA forward: the update is computed for the tail alone."""

    def __init__(self, gate: Gate) -> None:
        self.gate = gate

    def supports_lora_conversion(self) -> bool:
        """A gated update is no plain weight update."""
        return False

    @staticmethod
    def init(module: LoraLayer, adapter_name: str, config: LoraConfig, **kwargs: Any) -> None:
        """Nothing to set up: the variant has no weights of its own."""

    @staticmethod
    def merge_safe(module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """Refused: the update acts at some positions only."""
        raise UsageError("a gated LoRA cannot be merged into the base weights: it acts at MTP positions only.")

    @staticmethod
    def merge_unsafe(module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> None:
        """Refused, as ``merge_safe``."""
        GatedVariant.merge_safe(module, active_adapter, orig_weight)

    @staticmethod
    def unmerge(module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """Refused, as ``merge_safe``."""
        return GatedVariant.merge_safe(module, active_adapter, orig_weight)

    def forward(self, module: LoraLayer, *, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        """The base layer's output plus the update at the last ``num_mtp`` positions.

        Args:
            module: the LoRA layer.
            active_adapter: name of the adapter.
            x: the layer's input in the adapter's dtype, [B, S, in].
            result: the base layer's output, [B, S, out].
            **kwargs: other variants' arguments, unused.

        Returns:
            [B, S, out], the dtype of ``result``.

        Raises:
            RuntimeError: no gate is open in a training forward pass, or the input has no position dimension.
        """
        num_mtp = self.gate.num_mtp
        if num_mtp is None:
            if module.training and torch.is_grad_enabled():
                raise RuntimeError(
                    "a gated LoRA layer ran in training without a gate. Call MTPModel, not its base; with gradient"
                    " checkpointing use MTPModel.enable_gradient_checkpointing()."
                )
            return result
        if num_mtp == 0:
            return result
        if x.ndim != 3:
            raise RuntimeError(
                f"a gated LoRA layer needs inputs [rows, positions, features], got {tuple(x.shape)}. Leave layers that"
                " regroup positions (experts) out of model.lora.target_modules."
            )
        tail = module.lora_dropout[active_adapter](x[:, x.shape[1] - num_mtp :])
        update = module.lora_B[active_adapter](module.lora_A[active_adapter](tail)) * module.scaling[active_adapter]
        update = update.to(result.dtype)
        num_ntp = result.shape[1] - num_mtp
        if num_ntp == 0:
            return result + update
        return torch.cat([result[:, :num_ntp], result[:, num_ntp:] + update], dim=1)


def is_mixture_of_experts(config: Any) -> bool:
    """Whether a base's configuration names experts."""
    return any((getattr(config, name, None) or 0) > 1 for name in ("num_experts", "num_local_experts", "n_routed_experts"))


def decoder_layers(base: PreTrainedModel) -> list[str]:
    """Names of the decoder's linear layers; with a mixture of experts of those in the attention alone.

    Experts see the rows of all positions regrouped by a router, so a gate by position has nothing to hold on to there.

    Args:
        base: the base model; a vision tower beside its decoder gets no adapters.

    Returns:
        Full names, as PEFT selects them.
    """
    decoder = base.get_decoder()
    prefix = next(name for name, module in base.named_modules() if module is decoder)
    attention_only = is_mixture_of_experts(text_config(base))
    return [
        f"{prefix}.{name}"
        for name, module in decoder.named_modules()
        if isinstance(module, nn.Linear) and (not attention_only or "self_attn" in name)
    ]


def add_gated_lora(base: PreTrainedModel, lora: LoRA, gate: Gate) -> LoraConfig:
    """Freeze the base and put gated LoRA layers into it, in place. Adapter weights are float32 (float64 on a float64 base).

    Args:
        base: the base model.
        lora: settings.
        gate: the gate that all layers share.

    Returns:
        PEFT's configuration of the adapter.

    Raises:
        UsageError: ``target_modules`` matches no layer.
    """
    targets = lora.target_modules
    if targets is None:
        targets = decoder_layers(base)
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
    variant = GatedVariant(gate)
    dtype = compute_dtype(base.dtype)
    for layer in lora_layers(base):
        _place(layer)
        set_variant(layer, variant)
        layer.lora_A[ADAPTER].to(dtype)
        layer.lora_B[ADAPTER].to(dtype)
    return config


def adapted_layers(config: Any, lora: LoRA) -> list[str]:
    """Names of the layers that get an adapter, without weights.

    Args:
        config: the base's configuration.
        lora: settings.

    Returns:
        Full names.
    """
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(config)
        add_gated_lora(base, lora, Gate())
    return [name for name, module in base.named_modules() if isinstance(module, LoraLayer)]


def _place(layer: Any) -> None:
    """Give an adapter memory where its layer runs: PEFT leaves it without, as its offloaded base layer is."""
    hook = offload_hook(layer.base_layer)
    if hook is not None and layer.lora_A[ADAPTER].weight.is_meta:
        for part in (layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]):
            part.to_empty(device=hook.execution_device)
        layer.reset_lora_parameters(ADAPTER, init_lora_weights=True)
