# SPDX-License-Identifier: Apache-2.0
"""What ``custom_generate/generate.py`` of a saved folder runs: speculative decoding inside ``generate``."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from mtp_lightning.errors import UsageError
from mtp_lightning.model import MTPModel

MODELS = "_mtp_models"
"""Attribute of a base that holds what ``generate_from`` put onto it, by name."""


def generate_from(model: PreTrainedModel, mtp_model: str, **arguments: Any) -> Any:
    """What ``custom_generate/generate.py`` of a saved folder calls: ``generate`` with the folder put onto the base.

    The adapters stay on the base, closed: its own outputs are as before. UsageError if no folder is named, or the base
    carries another one.
    """
    if not mtp_model:
        raise UsageError("custom_generate of a saved folder needs its name once more: give mtp_model=FOLDER.")
    models = model.__dict__.setdefault(MODELS, {})  # not setattr, which would make it a part of the base
    if mtp_model not in models:
        if models:
            raise UsageError(f"the base carries {next(iter(models))!r} already. Load it anew to use {mtp_model!r}.")
        models[mtp_model] = MTPModel.from_pretrained(mtp_model, base=model)
    given = {name: value for name, value in arguments.items() if value is not None}
    if "streamer" in given:
        given["mtp_streamer"] = given.pop("streamer")
    return model.generate(custom_generate=models[mtp_model].custom_generate, **given)
