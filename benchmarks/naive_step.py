# SPDX-License-Identifier: Apache-2.0
"""The training step as one would first write it, on the model's own weights: the baseline of ``training_step.py``.

Blocks stand after their start in one sequence; a dense mask over all positions; the LoRA runs at every position and is
multiplied by the gate; all logits of both heads exist at once, and autograd finds every gradient.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mtp_lightning.losses import LossTerm, TokenLoss, term_value
from mtp_lightning.model import MTPModel
from mtp_lightning.modeling.attention import kernel_mask
from mtp_lightning.modeling.decoder import run_decoder
from mtp_lightning.modeling.gated_lora import GatedVariant
from mtp_lightning.modeling.masking import attention_pattern, dense_mask
from mtp_lightning.modeling.peft_private import get_variant, lora_layers, set_variant
from mtp_lightning.types import IGNORE_INDEX, MTP, HiddenStates, LossSum, MaskedInput, compute_dtype


class _EverywhereVariant(GatedVariant):
    """The update at every position, times the gate, [B, S, 1]."""

    values: Tensor

    def forward(self, module: Any, *, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        down, up = module.lora_A[active_adapter], module.lora_B[active_adapter]
        update = up(down(x.to(down.weight.dtype))) * module.scaling[active_adapter]
        return result + (update * self.values).to(result.dtype)


@contextlib.contextmanager
def _lora_everywhere(model: MTPModel, gate: Tensor) -> Iterator[None]:
    layers = lora_layers(model.base)
    before = [get_variant(layer) for layer in layers]
    variant = _EverywhereVariant(model.gate, "every layer")
    variant.values = gate
    try:
        for layer in layers:
            set_variant(layer, variant)
        yield
    finally:
        for layer, own in zip(layers, before, strict=True):
            assert own is not None
            set_variant(layer, own)


def naive_states(model: MTPModel, batch: MaskedInput) -> HiddenStates:
    """The hidden states of all positions, from one sequence in which each block follows its start."""
    (B, P), K, L = batch.starts.shape, model.num_masks, batch.input_ids.shape[1]
    tokens = model.embed(batch.input_ids)
    masks = model.mask_embeddings.to(tokens.dtype).expand(B, P, K, -1).flatten(1, 2)
    pattern, offsets = attention_pattern(batch, K), torch.arange(1, K + 1)
    starts = torch.where(batch.starts < 0, L, batch.starts)  # empty blocks at the end
    places = torch.cat([(torch.arange(L) * (K + 1)).expand(B, L), (starts[..., None] * (K + 1) + offsets).flatten(1)], 1)
    order = places.argsort(dim=1, stable=True)
    row = torch.arange(B)[:, None]
    mask = dense_mask(pattern, L)[row[..., None], 0, order[:, :, None], order[:, None, :]][:, None]
    inputs, positions = torch.cat([tokens, masks], 1)[row, order], pattern.position_ids[row, order]
    with _lora_everywhere(model, (order >= L)[..., None].to(model.mask_embeddings.dtype)):
        hidden = run_decoder(model.base, inputs, kernel_mask(model.base, mask), positions)[row, order.argsort(dim=1)]
    ntp, mtp = hidden[:, :L], hidden[:, L:].unflatten(1, (P, K))
    return HiddenStates(ntp, mtp, *model._sampler_states(batch, tokens, ntp, mtp))


def naive_sums(model: MTPModel, batch: MaskedInput, terms: dict[str, LossTerm]) -> dict[str, list[LossSum]]:
    """The sums of the terms: distillation from all logits at once, all other terms as they are."""
    states = naive_states(model, batch)
    assert states.sampler is not None
    dtype = compute_dtype(states.mtp.dtype)
    teacher = batch.at_anchors(model.unembed(states.ntp).to(dtype).detach().softmax(-1)).flatten(0, 2)
    valid = (batch.mtp_labels != IGNORE_INDEX).flatten()
    weights = (batch.block_weights[:, :, None] * (batch.mtp_labels != IGNORE_INDEX)).flatten().to(dtype)
    sums = {}
    for name, term in terms.items():
        if isinstance(term, TokenLoss):
            logits = model.unembed(states.mtp if term.head == "base" else states.sampler).to(dtype).flatten(0, 2)
            losses = F.cross_entropy(logits, teacher, reduction="none")
            sums[name] = [LossSum((losses.where(valid, 0) * weights).sum(), MTP)]
        else:
            sums[name] = list(term(states, batch, model.unembed))
    return sums


def total(sums: dict[str, Any], counts: Tensor) -> Tensor:
    """The loss."""
    return torch.stack([term_value(each, counts) for each in sums.values()]).sum()
