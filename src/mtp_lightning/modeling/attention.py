# SPDX-License-Identifier: Apache-2.0
"""From the attention pattern to the mask argument of a transformers decoder, for each attention kernel and window form."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mtp_lightning.modeling.decoder import text_config
from mtp_lightning.modeling.masking import AttentionPattern, dense_mask, mask_mod
from mtp_lightning.modeling.transformers_private import attention_kernel

GROUPED_SDPA = "mtp_grouped_sdpa"
"""Name of ``grouped_attention`` among transformers' attention functions."""


def layer_windows(base: PreTrainedModel) -> list[int | None]:
    """The sliding window of each layer in positions, or None for full attention."""
    config = text_config(base)
    window = getattr(config, "sliding_window", None)
    layer_types = getattr(config, "layer_types", None)
    if layer_types is None:
        is_used = getattr(config, "use_sliding_window", True)
        return [window if is_used else None] * int(config.num_hidden_layers)
    return [window if layer_type == "sliding_attention" else None for layer_type in layer_types]


def per_layer_type(base: PreTrainedModel, make_mask: Callable[[int | None], Any]) -> Any:
    """A mask made for a window in positions or for None, or a dict of them by layer type, as this architecture takes it.

    Architectures whose configuration lists layer types take a dict; Mistral and Phi-3 reject one and take a single
    windowed mask.
    """
    layer_types = getattr(text_config(base), "layer_types", None) or []
    if "sliding_attention" in layer_types:
        return {name: make_mask(window) for name, window in dict(zip(layer_types, layer_windows(base), strict=True)).items()}
    return make_mask(layer_windows(base)[0])


def kernel_mask(base: PreTrainedModel, allowed: Tensor) -> Tensor:
    """A mask, [B, 1, Q, S] bool, True where the query sees the key, in the form that the base's attention kernel takes.

    The same for SDPA; for the eager kernel, which would add True and False, an additive mask in the base's dtype.
    """
    if attention_kernel(base) in ("sdpa", GROUPED_SDPA):
        return allowed
    lowest = torch.finfo(base.dtype).min  # not -inf: the softmax of a row that sees nothing would be NaN
    return torch.zeros(allowed.shape, dtype=base.dtype, device=allowed.device).masked_fill_(~allowed, lowest)


def attention_mask(
    base: PreTrainedModel, pattern: AttentionPattern, num_ntp: int, begin: int = 0, end: int | None = None
) -> Any:
    """The decoder's mask argument for positions ``begin`` to ``end`` (None: S) of a masked input; those before are cached.

    A dense mask is built for SDPA and eager attention only; FlexAttention gets a block mask. ``num_ntp`` is L.
    """
    if attention_kernel(base) != "flex_attention":
        return per_layer_type(base, lambda window: kernel_mask(base, dense_mask(pattern, num_ntp, window, begin, end)))
    from torch.nn.attention.flex_attention import create_block_mask  # slow to import, and rarely used

    B, S = pattern.documents.shape
    device = str(pattern.documents.device)
    end = S if end is None else end
    # Not compiled, it would build the dense mask on the way.
    create: Any = torch.compile(create_block_mask) if device.startswith("cuda") else create_block_mask

    def block_mask(window: int | None) -> Any:
        sees = mask_mod(pattern, num_ntp, window)
        return create(lambda b, h, q, k: sees(b, h, q + begin, k), B, None, end - begin, end, device=device)

    return per_layer_type(base, block_mask)
