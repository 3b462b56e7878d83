# SPDX-License-Identifier: Apache-2.0
"""A base without adapters whose linear layers have packed weights: for transformers' own ``generate`` on a CPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from transformers import PreTrainedModel

from mtp_lightning.decoding.execution.fused_lora import MAX_COPY_BYTES, is_plain_linear
from mtp_lightning.decoding.packed_linear import PackedLinear, can_pack, is_autocast


class PackedBase:
    """Packed copies of the weights of a base's plain linear layers, where products with them are faster.

    The copies are of at most ``MAX_COPY_BYTES``; a larger base stays as it is. No gradients.
    """

    def __init__(self, base: PreTrainedModel) -> None:
        layers = [layer for layer in base.modules() if is_plain_linear(layer) and can_pack(layer.weight)]
        size = sum(layer.weight.numel() * layer.weight.element_size() for layer in layers)
        layers = layers if size <= MAX_COPY_BYTES else []
        self._device = base.device
        self._products = [(vars(layer), PackedLinear(layer.weight, layer.bias)) for layer in layers]

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Multiply with the copies within the ``with`` block, unless under autocast."""
        try:
            for attributes, product in [] if is_autocast(self._device) else self._products:
                attributes["forward"] = product
            yield
        finally:
            for attributes, _ in self._products:
                attributes.pop("forward", None)
