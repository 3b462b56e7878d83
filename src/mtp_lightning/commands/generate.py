# SPDX-License-Identifier: Apache-2.0
"""``mtp generate``: streams the text of a prompt, or of each prompt of a file; what ``mtp predict`` prints too."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from mtp_lightning.commands.arguments import DecodingArguments
from mtp_lightning.commands.parser import CommandParser
from mtp_lightning.decoding.limits import check_prompt, resolve_num_masks
from mtp_lightning.decoding.loop import decode_rows
from mtp_lightning.decoding.noise import row_seeds
from mtp_lightning.decoding.planner import calibrate
from mtp_lightning.errors import UsageError
from mtp_lightning.model import MTPModel
from mtp_lightning.text.prompts import Prompt, encode_prompt, read_prompts
from mtp_lightning.text.stream import GeneratedText


def stream(
    model: MTPModel, prompt: Prompt, arguments: DecodingArguments, record: dict[str, Any], seed: int | None = None
) -> Iterator[str]:
    """Generate for one prompt and yield text as it is verified.

    Args:
        model: the model.
        prompt: the prompt.
        arguments: how to decode.
        record: filled with the fields of the JSON line.
        seed: seed of this prompt's draws; None: the arguments'.

    Yields:
        Pieces of text.
    """
    for pieces in _stream_together(model, [prompt], arguments, [record], None if seed is None else [seed]):
        yield pieces[0]


def _stream_together(
    model: MTPModel,
    prompts: list[Prompt],
    arguments: DecodingArguments,
    records: list[dict[str, Any]],
    seeds: list[int] | None,
) -> Iterator[list[str]]:
    """The same for several prompts; one piece a prompt each time."""
    options = arguments.options() if seeds is None else replace(arguments.options(), seed=seeds)
    stops = [arguments.stop] if arguments.stop else []
    texts = [GeneratedText(model, prompt, options, stops) for prompt in prompts]
    finished: set[int] = set()
    steps = decode_rows(model, [torch.tensor(prompt.input_ids) for prompt in prompts], options, stopped=finished)
    seconds = 0.0
    calibrate(model, options)
    while len(finished) < len(prompts):
        # Decoding alone is timed, not the text made of it nor what the reader does with it.
        begin = time.perf_counter()
        gained = next(steps)
        seconds += time.perf_counter() - begin
        pieces = [""] * len(prompts)
        for row, step, reason in gained:
            text = texts[row]
            pieces[row] = text.add(step.tokens)
            text.seconds = seconds
            if reason is not None or text.stopped:
                pieces[row] += text.flush()
                finished.add(row)
        yield pieces
    for text, record in zip(texts, records, strict=True):
        record.update(text.record())


def print_generations(model: MTPModel, prompts: list[Prompt], arguments: DecodingArguments, as_json: bool) -> None:
    """Generate for each prompt and print text as it comes, or one JSON line a prompt.

    Args:
        model: the model.
        prompts: the prompts.
        arguments: how to decode.
        as_json: JSON lines instead of text.

    Raises:
        UsageError: more masks than are trained.
    """
    resolve_num_masks(model, arguments.options())  # what is wrong shows before anything is printed
    seeds = row_seeds(arguments.seed, len(prompts))
    for begin in range(0, len(prompts), arguments.batch_size):
        batch = prompts[begin : begin + arguments.batch_size]
        records: list[dict[str, Any]] = [{} for _ in batch]
        if not as_json and len(batch) == 1:
            print(("\n\n" if begin else "") + batch[0].text, end="", flush=True)
        for pieces in _stream_together(model, batch, arguments, records, seeds[begin : begin + len(batch)]):
            if not as_json and len(batch) == 1:
                print(pieces[0], end="", flush=True)
        for number, record in enumerate(records, begin):
            if as_json:
                line = json.dumps(record, ensure_ascii=False) + "\n"
                print(line, end="", flush=True)  # at once, so that Ctrl-C leaves whole lines
                continue
            if len(batch) > 1:  # several texts at a time can't be shown as they grow
                print(("\n\n" if number else "") + record["prompt"] + record["text"], end="", flush=True)
            print(
                f"\n[{len(record['token_ids'])} tokens in {record['num_steps']} steps, acceptance length"
                f" {record['acceptance_length']:.2f}, {record['tokens_per_second']:.1f} tokens/s]",
                file=sys.stderr,
            )


def run_generate(args: list[str]) -> None:
    """``mtp generate MODEL --prompt TEXT``.

    Args:
        args: options.

    Raises:
        UsageError: no prompt, or both kinds of prompt.
    """
    parser = CommandParser(prog="mtp generate", description="Generates text with a trained model.")
    parser.add_argument("model", type=str, help="saved folder, checkpoint file or hub id")
    parser.add_argument("--prompt", type=str, default=None, help="the prompt")
    parser.add_argument("--prompts", type=str, default=None, help=".txt or .jsonl file of prompts; - standard input")
    parser.add_argument("--json", action="store_true", help="print one JSON line a prompt")
    parser.add_class_arguments(DecodingArguments, None)
    config = parser.parse_args(args)
    if (config.prompt is None) == (config.prompts is None):
        raise UsageError("give either --prompt TEXT or --prompts FILE.")
    arguments = DecodingArguments(**{name: config[name] for name in DecodingArguments.__dataclass_fields__})
    model = arguments.load(config.model)
    if config.prompt is not None:
        prompts = [Prompt(config.prompt, encode_prompt(config.prompt, model.tokenizer), "")]
        check_prompt(len(prompts[0].input_ids), model.context)
    else:
        prompts = read_prompts(config.prompts, model.tokenizer, context=model.context)
    print_generations(model, prompts, arguments, config.json)
