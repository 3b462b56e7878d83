# SPDX-License-Identifier: Apache-2.0
"""``mtp generate``: streams the text of a prompt, or of each prompt of a file; what ``mtp predict`` prints too."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import replace

import torch

from mtp_lightning.commands.arguments import DecodingArguments
from mtp_lightning.commands.parser import CommandParser
from mtp_lightning.commands.progress import note
from mtp_lightning.decoding.limits import check_prompt, resolve_num_masks, with_text_ends
from mtp_lightning.decoding.loop import decode_rows
from mtp_lightning.decoding.noise import row_seeds
from mtp_lightning.decoding.options import DecodingOptions
from mtp_lightning.decoding.planner import calibrate
from mtp_lightning.errors import UsageError
from mtp_lightning.model import MTPModel
from mtp_lightning.text.prompts import Prompt, encode_prompt, read_prompts
from mtp_lightning.text.stream import GeneratedText


def print_generations(model: MTPModel, prompts: list[Prompt], arguments: DecodingArguments, as_json: bool) -> None:
    """Generate for each prompt and print text as it is decoded, or one JSON line per prompt."""
    options, stops = with_text_ends(model, arguments.options()), [arguments.stop] if arguments.stop else []
    resolve_num_masks(model, options)  # an error shows before anything is printed
    seeds = row_seeds(arguments.seed, len(prompts))
    batch_sizes = {min(len(prompts), arguments.batch_size), len(prompts) % arguments.batch_size} - {0}  # the last is smaller
    calibrate(model, options, batch_sizes, note)
    for begin in range(0, len(prompts), arguments.batch_size):
        batch = prompts[begin : begin + arguments.batch_size]
        batch_options = replace(options, seed=seeds[begin : begin + len(batch)])
        texts = [GeneratedText(model, prompt, batch_options, stops) for prompt in batch]
        streamed = not as_json and len(batch) == 1  # several texts at a time can't be shown as they grow
        if streamed:
            print(("\n\n" if begin else "") + batch[0].shown, end="", flush=True)
        for piece in _decode_texts(model, texts, batch_options):
            if streamed:
                print(piece, end="", flush=True)
        for number, text in enumerate(texts, begin):
            if as_json:
                line = json.dumps(text.record(), ensure_ascii=False) + "\n"
                print(line, end="", flush=True)  # in one write, so that Ctrl-C leaves whole lines
                continue
            if not streamed:
                print(("\n\n" if number else "") + text.prompt.shown + text.text, end="", flush=True)
            print(f"\n{text.summary()}", file=sys.stderr)


def _decode_texts(model: MTPModel, texts: list[GeneratedText], options: DecodingOptions) -> Iterator[str]:
    """Decode a batch of texts to their ends; yields the first one's pieces."""
    finished: set[int] = set()
    steps = decode_rows(model, [torch.tensor(text.prompt.input_ids) for text in texts], options, stopped=finished)
    seconds = 0.0
    while len(finished) < len(texts):
        # Only decoding is timed: neither making text of tokens nor printing it.
        begin = time.perf_counter()
        results = next(steps)
        seconds += time.perf_counter() - begin
        for row, step, reason in results:
            text = texts[row]
            piece = text.add(step.tokens)
            text.seconds = seconds
            if reason is not None or text.stopped:
                piece += text.flush()
                finished.add(row)
            if row == 0:
                yield piece


def run_generate(args: list[str]) -> None:
    """``mtp generate MODEL --prompt TEXT``."""
    parser = CommandParser(prog="mtp generate", description="Generates text with a trained model.")
    parser.add_argument("model", type=str, help="saved folder, checkpoint file or hub id")
    parser.add_argument("--prompt", type=str, default=None, help="the prompt")
    parser.add_argument("--prompts", type=str, default=None, help=".txt or .jsonl file of prompts; - standard input")
    parser.add_argument("--json", action="store_true", help="print one JSON line per prompt")
    DecodingArguments.add_to(parser)
    config = parser.parse_args(args)
    if (config.prompt is None) == (config.prompts is None):
        raise UsageError("give either --prompt TEXT or --prompts FILE.")
    arguments = DecodingArguments.from_config(config)
    model = arguments.load(config.model)
    if config.prompt is not None:
        prompts = [encode_prompt(config.prompt, model.tokenizer, arguments.raw)]
        check_prompt(len(prompts[0].input_ids), model.context)
    else:
        prompts = read_prompts(config.prompts, model.tokenizer, context=model.context, raw=arguments.raw)
    print_generations(model, prompts, arguments, config.json)
