# SPDX-License-Identifier: Apache-2.0
"""What ``custom_generate/generate.py`` of a saved folder runs: speculative decoding inside ``generate``."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from mtp_lightning.errors import UsageError
from mtp_lightning.model import MTPModel

MODELS = "_mtp_models"
"""Attribute of a base that holds the models that ``generate_from`` has loaded onto it, by name."""


def generate_from(model: PreTrainedModel, mtp_model: str, **arguments: Any) -> Any:
    """What ``custom_generate/generate.py`` of a saved folder calls: ``generate`` with the folder's adapters on the base.

    The adapters stay on the base but inactive: its own outputs do not change. UsageError if no folder is named, or the base
    already has another one.
    """
    if not mtp_model:
        raise UsageError("custom_generate of a saved folder needs its name once more: give mtp_model=FOLDER.")
    models = model.__dict__.setdefault(MODELS, {})  # not setattr, which would make it a part of the base
    if mtp_model not in models:
        if models:
            raise UsageError(f"the base already has {next(iter(models))!r}. Load the base again to use {mtp_model!r}.")
        models[mtp_model] = MTPModel.from_pretrained(mtp_model, base=model)
    given = {name: value for name, value in arguments.items() if value is not None}
    if "streamer" in given:
        given["mtp_streamer"] = given.pop("streamer")
    return model.generate(custom_generate=models[mtp_model].custom_generate, **given)
