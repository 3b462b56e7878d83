# SPDX-License-Identifier: Apache-2.0
"""A base without adapters whose linear layers have packed weights: for transformers' own ``generate`` on a CPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from transformers import PreTrainedModel

from mtp_lightning.decoding.execution.fused_lora import MAX_COPY_BYTES, is_plain_linear
from mtp_lightning.decoding.packed_linear import PackedLinear, can_pack, is_autocast


@contextlib.contextmanager
def packed_layers(base: PreTrainedModel) -> Iterator[None]:
    """Within the ``with`` block plain linear layers multiply with packed copies of their weights, where that is faster.

    The copies are of at most ``MAX_COPY_BYTES``; a larger base stays as it is, and so does one under autocast. No gradients.
    """
    layers = [layer for layer in base.modules() if is_plain_linear(layer) and can_pack(layer.weight)]
    size = sum(layer.weight.numel() * layer.weight.element_size() for layer in layers)
    if size > MAX_COPY_BYTES or is_autocast(base.device):
        layers = []
    try:
        for layer in layers:
            vars(layer)["forward"] = PackedLinear(layer.weight, layer.bias)
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)
