# SPDX-License-Identifier: Apache-2.0
"""The options that all commands which decode share."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Literal

import torch

from mtp_lightning.decoding.options import DecodingOptions
from mtp_lightning.errors import UsageError
from mtp_lightning.model import MTPModel


@dataclass
class DecodingArguments:
    """Options that all commands which decode share.

    Args:
        decoding: quadratic, linear or autoregressive.
        num_masks: masks in a block, at most as many as were trained; auto: each step what pays on this machine.
        sampler_head: draft with the sampler head; false: from the base head.
        max_new_tokens: at most so many tokens a prompt.
        max_steps: at most so many forward passes of the base a prompt.
        temperature: 0, greedy; else the logits are divided by it and tokens are drawn.
        top_k: draw from the so many likeliest tokens.
        top_p: draw from the likeliest tokens that together have this probability.
        seed: seed of the draws; each prompt of a file has its own, made from this one and its number. Not given: any.
        verification: coupled (the text depends on prompt and seed alone) or rejection (a few more drafts are kept).
        draft_vocabulary: tokens that drafts are chosen from, the most frequent ones; all; auto: what pays.
        prompt_lookup: whether auto also verifies drafts that the text itself offers; the text is the same.
        compile: run steps as graphs: CUDA graphs, or on a CPU torch.compile, which takes seconds for each new shape of step.
        batch_size: prompts decoded together.
        stop: a text that ends the generation; it is cut off.
        dtype: dtype of the model; not given: the one the base was saved in.
        device: cpu, cuda, ..; not given: cuda where there is one.
        revision: hub revision of the base model.
        base_model: where the base model lies now, if it moved.
        trust_remote_code: import the sampler head that a saved folder names, whatever package it is in.
    """

    decoding: Literal["quadratic", "linear", "autoregressive"] = "quadratic"
    num_masks: int | Literal["auto"] = "auto"
    sampler_head: bool = True
    max_new_tokens: int = 256
    max_steps: int | None = None
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None
    verification: Literal["coupled", "rejection"] = "coupled"
    draft_vocabulary: int | Literal["auto", "all"] = "auto"
    prompt_lookup: bool = True
    compile: bool = False
    batch_size: int = 1
    stop: str | None = None
    dtype: str | None = None
    device: str | None = None
    revision: str | None = None
    base_model: str | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "max_steps", "top_k", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} must be 1 or more, got {value}. Change --{name}.")
        if self.stop == "":
            raise UsageError("stop must be a text of one character at least, got an empty one. Change --stop.")
        self.options()

    def load(self, name: str) -> MTPModel:
        """Open a model where and as these options say.

        Args:
            name: saved folder, checkpoint file or hub id.

        Returns:
            The model.
        """
        if self.compile:
            print(
                "mtp: each shape of step is compiled when it has come up a few times, which takes seconds or more:"
                " this pays for thousands of tokens.",
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

    def chosen_device(self) -> str:
        """The device to decode on."""
        return self.device or ("cuda" if torch.cuda.is_available() else "cpu")

    def options(self) -> DecodingOptions:
        """The part that decoding itself takes."""
        return DecodingOptions(
            self.decoding,
            self.num_masks,
            self.sampler_head,
            self.max_new_tokens,
            self.max_steps,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            seed=self.seed,
            verification=self.verification,
            draft_vocabulary=self.draft_vocabulary,
            prompt_lookup=self.prompt_lookup,
            compile=self.compile,
        )
