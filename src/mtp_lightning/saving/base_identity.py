# SPDX-License-Identifier: Apache-2.0
"""Which base model trained weights belong to: its name, its hub commit and the shape of its layers.

Verification makes the base's own text come out whatever drafts it: a wrong base costs speed. So another name or commit is
a warning, and only layers that the weights do not fit are an error. The vocabulary may differ: padding rows often do.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from mtp_lightning.errors import RunError
from mtp_lightning.paths import resolve

LAYER_SHAPE = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)
_COMMIT_LENGTH = 40


def layer_shape(config: Any) -> dict[str, int]:
    """The values of ``LAYER_SHAPE`` that a text decoder's configuration has."""
    values = {name: getattr(config, name, None) for name in LAYER_SHAPE}
    return {name: value for name, value in values.items() if isinstance(value, int)}


def check_layer_shape(expected: dict[str, Any], config: Any, name: str) -> None:
    """Refuse a base whose layers the trained weights do not fit.

    ``expected`` is the ``layer_shape`` of the base that was trained on; other keys are ignored.
    """
    shape = layer_shape(config)
    for key in LAYER_SHAPE:
        if key in expected and expected[key] != shape.get(key):
            raise RunError(f"the weights belong to a base with {key} {expected[key]}, and {name!r} has {shape.get(key)}.")


def warn_if_other_base(trained_on: str, trained_revision: str | None, name: str, revision: str | None) -> None:
    """Warn if the base has another name, not counting the folders it lies in, or another hub commit."""
    commits = {commit for commit in (trained_revision, revision) if commit is not None and len(commit) == _COMMIT_LENGTH}
    if Path(trained_on).name != Path(name).name:
        used = f"{trained_on!r}, and {name!r} is used"
    elif len(commits) == 2:
        used = f"revision {trained_revision} of {trained_on!r}, and revision {revision} is used"
    else:
        return
    warnings.warn(f"the weights were trained on base model {used}: fewer drafts may be accepted", stacklevel=3)


def hub_commit(name: str, revision: str | None) -> str | None:
    """The commit that a branch or tag of a hub id stands for in the local cache; None for a folder or an uncached id."""
    if "://" in name or Path(resolve(name)).exists():
        return None
    file = cached_hub_file(name, "config.json", revision)
    return None if file is None else file.parent.name


def cached_hub_file(name: str, file: str, revision: str | None) -> Path | None:
    """A file of a hub id in the local cache; None if it is not there, or the name is no hub id."""
    try:
        found = try_to_load_from_cache(name, file, revision=revision)
    except HFValidationError:
        return None
    return Path(found) if isinstance(found, str) else None
