# SPDX-License-Identifier: Apache-2.0
"""What callbacks that decode prompts share: reading the prompts early, and printing above Lightning's progress bar."""

from __future__ import annotations

import sys
from io import StringIO
from typing import Any, Literal

import numpy as np
import rich
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from rich.console import Console

from mtp_lightning.callbacks.steps_progress_bar import StepsProgressBar
from mtp_lightning.data.rows import TokenRows
from mtp_lightning.decoding.limits import resolve_auto
from mtp_lightning.decoding.options import Decoding, DecodingOptions
from mtp_lightning.errors import RunError, UsageError
from mtp_lightning.text.prompts import Prompt, has_chat_template, read_prompt_rows, read_prompts

OPENING_TOKENS = 32
"""The longest opening of a row that is decoded from, where the prompts can't be used."""


class DecodingCallback(Callback):
    """Reads prompts before anything runs, so that errors in them or in the options show at once."""

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
            raise UsageError("prompts of a callback must be a file, got - (standard input).")
        for name, value in (("num_prompts", num_prompts), ("max_new_tokens", max_new_tokens), ("max_steps", max_steps)):
            if value is not None and value < 1:
                raise UsageError(f"{name} of {type(self).__name__} must be 1 or more, got {value}.")
        self.prompts = prompts
        self.num_prompts = num_prompts
        self.options = DecodingOptions(decoding, num_masks, sampler_head, max_new_tokens, max_steps)
        self.loaded: list[Prompt] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Read the prompts, and refuse more masks than the module has or a prompt that does not fit the base's context."""
        if stage == "predict":
            return
        module: Any = pl_module
        self.options = resolve_auto(module, self.options)
        prompts = self._read(trainer, module)
        for prompt in prompts:
            if len(prompt.input_ids) >= module.context:
                length = f"{len(prompt.input_ids)} tokens, and the base's context is {module.context}"
                raise RunError(f"{self.prompts}: a prompt has {length}: {prompt.text[:60]!r}...")
        self.loaded = prompts

    def _read(self, trainer: Trainer, module: Any) -> list[Prompt]:
        """The prompts; of conversations, for a base without a chat template, openings of the run's own rows instead."""
        if not has_chat_template(module.tokenizer):
            rows = getattr(getattr(trainer, "datamodule", None), "rows", {})
            rows = rows.get("validation", rows.get("test"))
            if rows and all(not isinstance(row.content, str) for row in read_prompt_rows(self.prompts)):
                prompts = openings(rows, module.tokenizer, self.num_prompts)
                if trainer.is_global_zero:
                    reason = f"{self.prompts} holds conversations, and the base has no chat template"
                    text = f"prompts of {type(self).__name__}: openings of {len(prompts)} validation rows; {reason}"
                    print(text, file=sys.stderr)
                return prompts
        return read_prompts(self.prompts, module.tokenizer, self.num_prompts)


def openings(rows: TokenRows, tokenizer: Any, limit: int | None) -> list[Prompt]:
    """The beginnings of documents of some rows, evenly spaced, at most ``limit``: half of each, up to 32 tokens."""
    documents = np.unique(rows.order)
    if limit is not None and len(documents) > limit:
        documents = documents[np.arange(limit) * len(documents) // limit]
    prompts = []
    for index in documents:
        ids, _, domain = rows.documents.document(int(index))
        opening = ids[: max(1, min(OPENING_TOKENS, len(ids) // 2))].tolist()
        prompts.append(Prompt(tokenizer.decode(opening, skip_special_tokens=True), opening, domain))
    return prompts


def show_progress(trainer: Trainer, text: str) -> None:
    """Show what is being done behind the bar of the run."""
    bar = trainer.progress_bar_callback
    if isinstance(bar, StepsProgressBar):
        bar.note(text)


def progress_console(trainer: Trainer) -> Console:
    """A console whose lines appear above Lightning's rich or tqdm progress bar and do not break it."""
    if isinstance(trainer.progress_bar_callback, TQDMProgressBar):
        return Console(file=_AboveTqdm(), force_terminal=sys.stdout.isatty())
    return rich.get_console()


class _AboveTqdm(StringIO):
    """A text file whose lines go to standard output, above the bars."""

    def flush(self) -> None:
        text = self.getvalue()
        self.seek(0)
        self.truncate()
        if text:
            Tqdm.write(text, end="")
