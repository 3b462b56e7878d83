# SPDX-License-Identifier: Apache-2.0
"""``mtp generate``: streams the text of a prompt, or of each prompt of a file; what ``mtp predict`` prints too."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from mtp_lightning.commands.arguments import DecodingArguments
from mtp_lightning.decoding.limits import check_prompt, resolve_num_masks, with_text_ends
from mtp_lightning.decoding.noise import row_seeds
from mtp_lightning.decoding.planner import calibrate
from mtp_lightning.evaluation.acceptance import WARM_UP_TOKENS
from mtp_lightning.evaluation.decoded_text import decode_batch
from mtp_lightning.evaluation.losslessness import autoregressive
from mtp_lightning.evaluation.reporting import note
from mtp_lightning.evaluation.steps_page import ShownText, steps_page
from mtp_lightning.files import atomic_file
from mtp_lightning.model import MTPModel
from mtp_lightning.text.prompts import Prompt, encode_prompt, read_prompts
from mtp_lightning.text.step_display import has_colour, step_text
from mtp_lightning.text.stream import GeneratedText, decode_texts


def print_generations(
    model: MTPModel, prompts: list[Prompt], arguments: DecodingArguments, as_json: bool, show_steps: bool = False
) -> list[GeneratedText]:
    """Generate for each prompt and print text as it is decoded, or one JSON line per prompt; returns the texts."""
    options, stops = with_text_ends(model, arguments.options()), [arguments.stop] if arguments.stop else []
    resolve_num_masks(model, options)  # an error shows before anything is printed
    seeds = row_seeds(arguments.seed, len(prompts))
    batch_sizes = {min(len(prompts), arguments.batch_size), len(prompts) % arguments.batch_size} - {0}  # the last is smaller
    calibrate(model, options, batch_sizes, note)
    writer, all_texts = _Writer(show_steps), list[GeneratedText]()
    for begin in range(0, len(prompts), arguments.batch_size):
        batch = prompts[begin : begin + arguments.batch_size]
        batch_options = replace(options, seed=seeds[begin : begin + len(batch)])
        texts = [GeneratedText(model, prompt, batch_options, stops) for prompt in batch]
        streamed = not as_json and len(batch) == 1  # several texts at a time can't be shown as they grow
        if streamed:
            writer.write(("\n" if begin else "") + batch[0].shown)
        for _ in decode_texts(texts):
            if streamed:
                writer.write_step(texts[0])
        for number, text in enumerate(texts, begin):
            if as_json:
                line = json.dumps(text.record(), ensure_ascii=False) + "\n"
                print(line, end="", flush=True)  # in one write, so that Ctrl-C leaves whole lines
                continue
            if not streamed:
                writer.write(("\n" if number else "") + text.prompt.shown)
                for step in range(len(text.steps)):
                    writer.write_step(text, step)
            writer.write("\n")
            print(text.summary(), file=sys.stderr)
        all_texts += texts
    return all_texts


class _Writer:
    """Writes text to standard output as it comes; with ``show_steps`` the tokens of each step are marked."""

    def __init__(self, show_steps: bool) -> None:
        self._console = Console(highlight=False, soft_wrap=True) if show_steps else None

    def write(self, text: str) -> None:
        """Write a text as it is."""
        print(text, end="", flush=True)

    def write_step(self, text: GeneratedText, step: int = -1) -> None:
        """Write what a step gave, the last one by default."""
        if self._console is None:
            self.write(text.pieces[step])
            return
        number, num_tokens = step % len(text.steps), len(text.steps[step].tokens)
        self._console.print(step_text(number, text.pieces[step], num_tokens, has_colour(self._console)), end="")


def write_page(path: Path, name: str, texts: Sequence[GeneratedText]) -> None:
    """Write the page of ``--html``; every prompt is decoded plainly too, to compare time and text."""
    shown: list[ShownText] = []
    for text in texts:
        model, prompt = text.model, text.prompt
        (expected,), seconds = decode_batch(model, [prompt], autoregressive(text.options, len(text.token_ids)))
        rejected = [[model.tokenizer.decode([token]) for token in step.rejected] for step in text.steps]
        is_same = expected.tokens == text.token_ids
        shown.append(ShownText(prompt.shown, text.steps, text.pieces, rejected, text.seconds, seconds, is_same))
    options = texts[0].options
    masks = "auto" if options.num_masks == "auto" else str(options.num_masks)
    description = (
        f"{options.decoding} decoding, masks: {masks}; {str(texts[0].model.base.dtype).removeprefix('torch.')} on"
        f" {texts[0].model.base.device.type}. Each text was timed once."
    )
    with atomic_file(path) as file:
        file.write(steps_page(f"How {name} wrote {len(texts)} text{'s' * (len(texts) != 1)}", description, shown).encode())
    note(f"written to {path}")


def run_generate(config: Any) -> None:
    """``mtp generate MODEL --prompt TEXT``."""
    arguments = DecodingArguments.from_config(config)
    model = arguments.load(config.model)
    if config.prompt is not None:
        prompts = [encode_prompt(config.prompt, model.tokenizer, arguments.raw)]
        check_prompt(len(prompts[0].input_ids), model.context)
    else:
        prompts = read_prompts(config.prompts, model.tokenizer, context=model.context, raw=arguments.raw)
    if config.html is not None:
        for way in (arguments.options(), autoregressive(arguments.options())):  # a model's first steps are slower
            decode_batch(model, prompts[:1], replace(way, max_new_tokens=WARM_UP_TOKENS))
    texts = print_generations(model, prompts, arguments, config.json, config.show_steps)
    if config.html is not None:
        write_page(Path(config.html), config.model, texts)
