# SPDX-License-Identifier: Apache-2.0
"""The options that all commands which decode share."""

from __future__ import annotations

import sys
from collections.abc import Collection
from dataclasses import dataclass, fields
from typing import Any

from jsonargparse import ArgumentParser
from jsonargparse.typing import PositiveInt

from mtp_lightning.decoding.options import DecodingOptions


@dataclass
class DecodingArguments(DecodingOptions):
    """Options of decoding.

    Args:
        seed: seed of the draws; each prompt of a file has its own, derived from this one and its number. Default: random.
        batch_size: number of prompts decoded together.
        stop: a text that ends the generation; it is cut off.
        raw: continue prompts of text as they are. Default: they are a user's turn where the base has a chat template.
        dtype: dtype of the model. Default: the one the base was saved in.
        device: cpu, cuda, ... Default: cuda if there is one.
        revision: hub revision of the base model.
        base_model: where the base model is now, if it moved.
        trust_remote_code: import the sampler head that a saved folder names, whatever package it is in.
    """

    seed: int | None = None
    batch_size: PositiveInt = 1
    stop: str | None = None
    raw: bool = False
    dtype: str | None = None
    device: str | None = None
    revision: str | None = None
    base_model: str | None = None
    trust_remote_code: bool = False

    @classmethod
    def add_to(cls, parser: ArgumentParser, skip: Collection[str] = ()) -> None:
        """Add the options to a parser, without some of them."""
        parser.add_class_arguments(cls, None, skip={"logits_processor", *skip})

    @classmethod
    def from_config(cls, config: Any, skip: Collection[str] = ()) -> DecodingArguments:
        """The options in a parsed command line; those that were skipped have their defaults."""
        names = {field.name for field in fields(cls)} - {"logits_processor", *skip}
        return cls(**{name: config[name] for name in names})

    def options(self) -> DecodingOptions:
        """The options of decoding alone."""
        return DecodingOptions(**{field.name: getattr(self, field.name) for field in fields(DecodingOptions)})

    def chosen_device(self) -> str:
        """The device to decode on."""
        import torch  # seconds, which a command's help does not need

        return self.device or ("cuda" if torch.cuda.is_available() else "cpu")

    def load(self, name: str) -> Any:
        """Load a saved folder, checkpoint file or hub id as an ``MTPModel`` with these options."""
        from mtp_lightning.model import MTPModel

        if self.compile:
            print(
                "mtp: each shape of step is compiled once it has occurred a few times, which takes seconds or more;"
                " this pays off over thousands of tokens.",
                file=sys.stderr,
            )
        return MTPModel.from_pretrained(
            name,
            base_model=self.base_model,
            revision=self.revision,
            dtype=self.dtype or "auto",
            device=self.chosen_device(),
            trust_remote_code=self.trust_remote_code,
        )
