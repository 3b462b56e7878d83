# SPDX-License-Identifier: Apache-2.0
"""From "who sees whom" to the mask argument that a transformers decoder takes, for each attention kernel and window form."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mtp_lightning.modeling.decoder import text_config
from mtp_lightning.modeling.masking import AttentionPattern, dense_mask, pattern_function
from mtp_lightning.modeling.transformers_private import attention_kernel

GROUPED_SDPA = "mtp_grouped_sdpa"
"""What ``grouped_attention`` is called among transformers' attention functions."""


def per_layer_type(base: PreTrainedModel, make: Callable[[int | None], Any]) -> Any:
    """One mask, or one for each layer type, in the form that this architecture takes.

    Architectures whose configuration lists layer types take a dict; Mistral and Phi-3 reject one and take a single
    windowed mask.

    Args:
        base: the base model.
        make: gives the mask for a window in positions, or for None.

    Returns:
        A mask, or a dict of masks by layer type.
    """
    config = text_config(base)
    window = getattr(config, "sliding_window", None)
    layer_types = getattr(config, "layer_types", None)
    if layer_types is None:
        return make(window if getattr(config, "use_sliding_window", True) else None)
    if "sliding_attention" not in layer_types:
        return make(None)
    return {"full_attention": make(None), "sliding_attention": make(window)}


def layer_windows(base: PreTrainedModel) -> list[int | None]:
    """The sliding window of each layer in positions, or None, by the same rule as ``per_layer_type``."""
    config = text_config(base)
    window = getattr(config, "sliding_window", None)
    layer_types = getattr(config, "layer_types", None)
    if layer_types is None:
        used = getattr(config, "use_sliding_window", True)
        return [window if used else None] * int(config.num_hidden_layers)
    return [window if layer_type == "sliding_attention" else None for layer_type in layer_types]


def kernel_mask(base: PreTrainedModel, allowed: Tensor) -> Tensor:
    """A boolean mask in the form that the base's attention kernel takes.

    Args:
        base: the base model.
        allowed: True where the query sees the key, [B, 1, Q, S] bool.

    Returns:
        The same for SDPA; an additive mask in the base's dtype for the eager kernel, which would add True and False.
    """
    if attention_kernel(base) in ("sdpa", GROUPED_SDPA):
        return allowed
    # Not -inf: a row that sees nothing would be NaN.
    lowest = torch.finfo(base.dtype).min
    return torch.zeros(allowed.shape, dtype=base.dtype, device=allowed.device).masked_fill_(~allowed, lowest)


def attention_mask(
    base: PreTrainedModel, pattern: AttentionPattern, num_ntp: int, begin: int = 0, end: int | None = None
) -> Any:
    """The mask argument of the base's decoder for positions ``begin`` to ``end`` of a masked input, those before cached.

    The dense mask is made for SDPA and eager attention only; FlexAttention gets a block mask.

    Args:
        base: the base model.
        pattern: who sees whom.
        num_ntp: L.
        begin: first position that is fed.
        end: one past the last position that is fed; None: S.

    Returns:
        A tensor, a FlexAttention block mask, or a dict of them by layer type.
    """
    if attention_kernel(base) != "flex_attention":
        return per_layer_type(base, lambda window: kernel_mask(base, dense_mask(pattern, num_ntp, window, begin, end)))
    from torch.nn.attention.flex_attention import create_block_mask

    B, S = pattern.documents.shape
    device = str(pattern.documents.device)
    end = S if end is None else end

    def make(window: int | None) -> Any:
        sees = pattern_function(pattern, num_ntp, window)
        # Not compiled, it would make the dense mask on its way.
        make_mask = torch.compile(create_block_mask) if device.startswith("cuda") else create_block_mask
        return make_mask(lambda b, h, q, k: sees(b, h, q + begin, k), B, None, end - begin, end, device=device)

    return per_layer_type(base, make)
