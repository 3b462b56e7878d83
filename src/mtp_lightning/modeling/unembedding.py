# SPDX-License-Identifier: Apache-2.0
"""The base's unembedding: from hidden states to logits, scaled or soft-capped as the architecture does it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mtp_lightning.modeling.decoder import text_config
from mtp_lightning.modeling.transformers_private import offload_hook


class FrozenUnembedding:
    """The base's unembedding, with the soft-capping or scaling that its architecture applies to logits."""

    def __init__(self, base: PreTrainedModel) -> None:
        config = text_config(base)
        self.head = base.get_output_embeddings()
        self.vocab_size = int(config.vocab_size)
        self.softcap = getattr(config, "final_logit_softcapping", None)  # Gemma
        scale = getattr(config, "logit_scale", None) or 1.0  # Cohere
        self.scale = scale / (getattr(config, "logits_scaling", None) or 1.0)  # Granite

    def __call__(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of hidden states [..., D]."""
        return self.scale_and_cap(self.head(hidden))

    @property
    def matrix(self) -> Tensor | None:
        """W [V, D] if logits are just W h and W is in memory as it is; else None (bias, scale, cap, sharded, quantised)."""
        head: Any = self.head
        if type(head) is not nn.Linear or head.bias is not None or self.scale != 1.0 or self.softcap is not None:
            return None
        is_plain = type(head.weight.data) is Tensor and head.weight.device.type != "meta" and not head.weight.requires_grad
        return head.weight if is_plain and not head._forward_pre_hooks and offload_hook(head) is None else None

    def scale_and_cap(self, logits: Tensor) -> Tensor:
        """Scale and cap raw logits of any part of the vocabulary."""
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits
