# SPDX-License-Identifier: Apache-2.0
"""DecodingMode: what a step changes in the user's model, and undoes before it returns."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from mtp_lightning.decoding.execution.decode_cache import decode_cache
from mtp_lightning.decoding.execution.grouped_attention import decoding_kernel
from mtp_lightning.modeling.network import MTPNetwork
from mtp_lightning.modeling.transformers_private import SwitchedAttention


class DecodingMode:
    """Evaluation mode, an attention kernel for few queries, and (if ``fused``) the layers that ``DecodeCache`` has prepared.

    Applied around each step, so that a reader who pauses has the model as it was; threads take turns.
    """

    def __init__(self, model: MTPNetwork, fused: bool = True) -> None:
        self._model, self._base, self._cache, self._fused = model, model.base, decode_cache(model), fused
        self._attention = SwitchedAttention(model.base, decoding_kernel(model.base))
        self._partly_training = True  # not known yet: parts may be in training mode while the model is not

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Apply it within the ``with`` block."""
        model = self._model
        with self._cache.lock:
            training = []
            if self._partly_training or model.training or self._base.training:
                training = [module for module in model.modules() if module.training]
                self._partly_training = bool(training)
            if training:
                model.eval()
            try:
                fused = self._cache.fused() if self._fused else contextlib.nullcontext()
                with self._attention, fused:
                    yield
            finally:
                for module in training:
                    module.training = True
