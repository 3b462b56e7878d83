# SPDX-License-Identifier: Apache-2.0
"""SampleText: shows what the model writes at validation, with the tokens of each step marked."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from lightning import LightningModule, Trainer
from rich.text import Text

from mtp_lightning.callbacks.decoding_callback import DecodingCallback, progress_console
from mtp_lightning.decoding.limits import with_text_ends
from mtp_lightning.decoding.lockstep import in_step
from mtp_lightning.decoding.loop import decode
from mtp_lightning.decoding.options import Decoding
from mtp_lightning.errors import UsageError
from mtp_lightning.text.detokenizer import Detokenizer
from mtp_lightning.text.step_display import has_colour, step_text


class SampleText(DecodingCallback):
    """Prints a few texts at every validation with the tokens of each step marked, and writes them to loggers that take text.

    The tokens of a step share a colour; where there is none, steps of several tokens are between double brackets.

    Args:
        prompts: ``.txt`` (one prompt a line) or ``.jsonl`` file (``prompt`` or ``messages``, optional ``domain``), or
            ``package://...`` for one shipped with this package.
        num_samples: the most texts, evenly from the domains.
        max_new_tokens: maximum tokens per text.
        decoding: ``quadratic``, ``linear`` or ``autoregressive``.
        num_masks: masks in a block, at most as many as are trained; ``auto``: all.
        sampler_head: draft with the sampler head; false: from the base head.
    """

    def __init__(
        self,
        prompts: str,
        num_samples: int = 3,
        max_new_tokens: int = 64,
        decoding: Decoding = "quadratic",
        num_masks: int | Literal["auto"] = "auto",
        sampler_head: bool = True,
    ) -> None:
        if num_samples < 1:
            raise UsageError(f"num_samples of SampleText must be 1 or more, got {num_samples}.")
        super().__init__(prompts, num_samples, max_new_tokens, None, decoding, num_masks, sampler_head)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Decode and show."""
        if trainer.sanity_checking:
            return
        module: Any = pl_module
        for number, prompt in enumerate(self.loaded):
            # All processes decode, with sharded parameters they have to; one shows.
            options = with_text_ends(module.model, self.options)
            with in_step(module.model):
                steps = [step.tokens for step in decode(module.model, torch.tensor(prompt.input_ids), options)]
            if not trainer.is_global_zero:
                continue
            detokenizer = Detokenizer(module.tokenizer, prompt.input_ids, skip_special_tokens=False)
            pieces = [("".join(map(detokenizer.add, step)), len(step)) for step in steps]
            length = sum(map(len, steps)) / len(steps)
            heading = f"sample {number}{prompt.domain and f' ({prompt.domain})'}, {length:.2f} tokens per step"
            console = progress_console(trainer)
            console.print(heading, style="bold", highlight=False)
            console.print(Text.assemble((prompt.shown, "dim"), marked(pieces, has_colour(console))), highlight=False)
            text = f"{heading}\n\n````\n{prompt.text}{marked(pieces, colour=False)}\n````"
            for logger in trainer.loggers:
                add_text = getattr(getattr(logger, "experiment", None), "add_text", None)
                if add_text is not None:
                    step = max(0, trainer.global_step - 1)  # Lightning counts logged steps from 0
                    add_text(f"val/sample_{number}", text, step)
        module.model.clear_decode_cache()  # training needs the memory


def marked(pieces: Iterable[tuple[str, int]], colour: bool) -> Text:
    """The texts of steps, each with its number of tokens, as one."""
    return Text.assemble(*(step_text(number, *piece, colour) for number, piece in enumerate(pieces)))
