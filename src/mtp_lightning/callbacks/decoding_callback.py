# SPDX-License-Identifier: Apache-2.0
"""What callbacks that decode prompts share: reading the prompts in time, and printing beside Lightning's progress bar."""

from __future__ import annotations

import sys
from io import StringIO
from typing import Any, Literal

import rich
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from rich.console import Console

from mtp_lightning.decoding.limits import resolve_auto
from mtp_lightning.decoding.options import Decoding, DecodingOptions
from mtp_lightning.errors import RunError, UsageError
from mtp_lightning.text.prompts import Prompt, read_prompts


class DecodingCallback(Callback):
    """Reads prompts before anything runs, so that what is wrong with them or the options shows at once.

    Args:
        prompts: ``.txt`` or ``.jsonl`` file of prompts.
        num_prompts: at most so many, evenly from the domains; None: all.
        max_new_tokens: at most so many tokens a prompt.
        max_steps: at most so many steps a prompt; None: no limit.
        decoding: ``quadratic``, ``linear`` or ``autoregressive``.
        num_masks: masks in a block; ``auto``: as many as were trained.
        sampler_head: draft with the sampler head.
    """

    def __init__(
        self,
        prompts: str,
        num_prompts: int | None,
        max_new_tokens: int,
        max_steps: int | None,
        decoding: Decoding,
        num_masks: int | Literal["auto"],
        sampler_head: bool,
    ) -> None:
        if prompts == "-":
            raise UsageError(
                "a callback's prompts must be a file, got - (standard input), which only one process could read."
            )
        for name, value in (("num_prompts", num_prompts), ("max_new_tokens", max_new_tokens), ("max_steps", max_steps)):
            if value is not None and value < 1:
                raise UsageError(f"{name} of {type(self).__name__} must be 1 or more, got {value}.")
        self.prompts = prompts
        self.num_prompts = num_prompts
        self.options = self.asked = DecodingOptions(decoding, num_masks, sampler_head, max_new_tokens, max_steps)
        self.loaded: list[Prompt] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Read the prompts.

        Args:
            trainer: the trainer.
            pl_module: an ``MTPModule``.
            stage: what is about to run.

        Raises:
            UsageError: more masks than the module has.
            RunError: the prompts can't be read, or one does not fit the base's context.
        """
        if stage == "predict":
            return
        module: Any = pl_module
        self.options = resolve_auto(module, self.options)
        prompts = read_prompts(self.prompts, module.tokenizer, self.num_prompts)
        for prompt in prompts:
            if len(prompt.input_ids) >= module.context:
                raise RunError(
                    f"{self.prompts}: expected prompts of fewer tokens than the base's context, {module.context}; one has"
                    f" {len(prompt.input_ids)}: {prompt.text[:60]!r}... Shorten or delete it."
                )
        self.loaded = prompts


def progress_console(trainer: Trainer) -> Console:
    """A console whose lines stand above Lightning's progress bar and do not break it.

    Args:
        trainer: the trainer.

    Returns:
        The console that Lightning's rich bar uses too, or one that writes past the tqdm bar.
    """
    if isinstance(trainer.progress_bar_callback, TQDMProgressBar):
        return Console(file=_BesideTqdm(), force_terminal=sys.stdout.isatty())
    return rich.get_console()


class _BesideTqdm(StringIO):
    """A text file whose lines go to standard output, with the bars out of their way."""

    def flush(self) -> None:
        text = self.getvalue()
        self.seek(0)
        self.truncate()
        if text:
            Tqdm.write(text, end="")
