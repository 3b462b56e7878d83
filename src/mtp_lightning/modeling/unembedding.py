# SPDX-License-Identifier: Apache-2.0
"""The base's unembedding: from hidden states to logits, scaled or soft-capped as the architecture does it."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mtp_lightning.modeling.decoder import text_config


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

    def scale_and_cap(self, logits: Tensor) -> Tensor:
        """Scale and cap raw logits of any part of the vocabulary."""
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits
