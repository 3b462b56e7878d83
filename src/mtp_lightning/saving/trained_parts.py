# SPDX-License-Identifier: Apache-2.0
"""TrainedParts: what a checkpoint or a saved folder holds. Also how a sampler head is named in a file and built from it."""

from __future__ import annotations

import inspect
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mtp_lightning.errors import RunError, UsageError, one_line
from mtp_lightning.sampler_heads import SamplerHead


class TrainedParts(NamedTuple):
    """Trained weights, and the settings of the network that takes them."""

    source: str  # the file or folder, for messages
    base_model: str  # the base that was trained on
    revision: str | None  # its hub revision
    base_shape: dict[str, Any]  # its ``layer_shape``
    num_masks: int  # masks in a block
    lora: dict[str, Any]  # arguments of ``LoRA``
    sampler_head: dict[str, Any] | None  # ``class_path`` and ``init_args``, or None
    weights: dict[str, Tensor]  # trained weights by their names in ``MTPNetwork``
    acceptance: dict[str, Any] | None = None  # figures for the model card
    lineage: dict[str, Any] | None = None  # the training and the licence, for the model card
    mask_tokens: str = "learned"  # or noise; files of earlier versions do not say
    folder: Path | None = None  # the saved folder; None: a checkpoint

    def with_num_masks(self, num_masks: int) -> TrainedParts:
        """The same parts with only the first masks, or with further ones that start as copies of the last."""
        weights, embeddings = dict(self.weights), self.weights.get("mask_embeddings")  # [k, D]
        if embeddings is not None and embeddings.shape[:1] == (self.num_masks,):  # else damaged: ``load_weights`` says so
            weights["mask_embeddings"] = embeddings[torch.arange(num_masks).clamp(max=len(embeddings) - 1)]
        return self._replace(num_masks=num_masks, weights=weights)


def shape_mismatch(expected: dict[str, Tensor], weights: dict[str, Tensor]) -> str | None:
    """The first weight, by name, that is missing, unexpected or of another shape, in words; None if there is none."""
    shapes, others = ({name: tuple(value.shape) for name, value in tensors.items()} for tensors in (expected, weights))
    for name in sorted(shapes.keys() | others.keys()):
        if shapes.get(name) != others.get(name):
            return f"{name} should be {shapes.get(name, 'absent')} and is {others.get(name, 'absent')}"
    return None


def head_settings(head: SamplerHead | None) -> dict[str, Any] | None:
    """Class path and arguments of a sampler head; each argument must be an attribute of the same name."""
    if head is None:
        return None
    path = f"{type(head).__module__}.{type(head).__qualname__}"
    names = [name for name in inspect.signature(type(head).__init__).parameters if name not in ("self", "args", "kwargs")]
    missing = [name for name in names if not hasattr(head, name)]
    if missing:
        raise UsageError(f"sampler head {path} must keep its arguments as attributes; missing: {', '.join(missing)}.")
    return {"class_path": path, "init_args": {name: getattr(head, name) for name in names}}


def build_head(settings: dict[str, Any] | None) -> SamplerHead | None:
    """A sampler head from its class path and arguments. Importing the class runs its module: check the source first."""
    if settings is None:
        return None
    try:
        path = settings["class_path"]
        module, _, name = path.rpartition(".")
        head_class = getattr(import_module(module), name)
        if not issubclass(head_class, SamplerHead):
            raise TypeError("it is not a SamplerHead")
        head: SamplerHead = head_class(**settings["init_args"])
    except (ImportError, AttributeError, ValueError, KeyError, TypeError) as error:
        advice = " Start in the folder of that module, or set PYTHONPATH." if isinstance(error, ImportError) else ""
        raise RunError(f"sampler head {settings} can't be built: {one_line(error)}.{advice}") from error
    return head
