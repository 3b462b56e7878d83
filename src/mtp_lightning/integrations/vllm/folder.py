# SPDX-License-Identifier: Apache-2.0
"""What the server needs of a saved folder: LoRA matrices by layer, mask embeddings and the sampler head. No vLLM."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mtp_lightning.errors import RunError, UsageError, one_line
from mtp_lightning.sampler_heads import SamplerHead
from mtp_lightning.saving.base_identity import check_layer_shape
from mtp_lightning.saving.saved_folder import check_head_source, find_folder, read_folder
from mtp_lightning.saving.trained_parts import TrainedParts, build_head


class ServedParts(NamedTuple):
    """Trained parts in the form that a server applies them."""

    num_masks: int  # masks in a block
    # by the base's layer name: A [r, in] and B [out, r], which is multiplied by alpha / r
    lora: dict[str, tuple[Tensor, Tensor]]
    mask_embeddings: Tensor  # [num_masks, D]
    sampler_head: SamplerHead | None  # in evaluation mode


def read_parts(folder: str, base_config: Any, base_name: str, trust_remote_code: bool = False) -> ServedParts:
    """Read a saved folder, or a hub id, for a base with this configuration.

    Errors: the folder is missing or damaged, was trained on a base with other layers, holds a LoRA that is not gated, has
    no trained mask embeddings, or names a sampler head whose import would run its sender's code.
    """
    path = find_folder(folder)
    parts = read_folder(path)
    if not parts.lora.get("gated", True):
        raise UsageError(f"{folder} holds a standard LoRA, which changes the base's text: only a gated one can be served.")
    if parts.mask_tokens != "learned":
        raise UsageError(f"{folder} has mask_tokens: {parts.mask_tokens}, which can't be served yet: only learned can.")
    if not trust_remote_code:
        check_head_source(parts.sampler_head, path if Path(folder).is_dir() else None)
    check_layer_shape(parts.base_shape, base_config, base_name)
    masks = parts.weights["mask_embeddings"]
    return ServedParts(parts.num_masks, _lora(parts), masks, _sampler_head(parts, masks.shape[1]))


def _lora(parts: TrainedParts) -> dict[str, tuple[Tensor, Tensor]]:
    """Matrices of each layer; the scale, alpha / r, is in B."""
    rank, alpha = parts.lora["rank"], parts.lora["alpha"]
    scale = (2 * rank if alpha is None else alpha) / rank
    end_a, end_b = ".lora_A.default.weight", ".lora_B.default.weight"
    return {
        name.removeprefix("base.").removesuffix(end_a): (value, parts.weights[name.removesuffix(end_a) + end_b] * scale)
        for name, value in parts.weights.items()
        if name.endswith(end_a)
    }


def packed_lora(parts: Sequence[tuple[Tensor, Tensor] | None], sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """One pair of matrices for layers that vLLM packs into one: two products instead of two for each.

    Args:
        parts: A [r, in] and B [out, r] of each layer, or None if it has no LoRA; at least one has.
        sizes: outputs of each layer.

    Returns:
        A [R, in] and B [all outputs, R]; R is the sum of the ranks.
    """
    present = [part for part in parts if part is not None]
    A = torch.cat([A for A, _ in present])
    B, row, column = A.new_zeros(sum(sizes), len(A)), 0, 0
    for part, size in zip(parts, sizes, strict=True):
        if part is not None:
            rank = part[1].shape[1]
            B[row : row + size, column : column + rank] = part[1]
            column += rank
        row += size
    return A, B


def _sampler_head(parts: TrainedParts, width: int) -> SamplerHead | None:
    head = build_head(parts.sampler_head)
    if head is None:
        return None
    head.build(width)
    prefix = "sampler_head."
    weights = {name.removeprefix(prefix): value for name, value in parts.weights.items() if name.startswith(prefix)}
    try:
        head.load_state_dict(weights)
    except RuntimeError as error:
        raise RunError(f"{parts.source} does not fit its own settings: {one_line(error)}.") from error
    return head.eval().requires_grad_(False)
