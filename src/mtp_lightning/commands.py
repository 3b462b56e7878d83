# SPDX-License-Identifier: Apache-2.0
"""Commands that use a trained model without a trainer."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, NoReturn

import torch
from jsonargparse import ArgumentParser

from mtp_lightning.decoding import DecodingOptions, decode_rows, prepare
from mtp_lightning.errors import UsageError
from mtp_lightning.model import MTPModel
from mtp_lightning.model_limits import check_prompt, trained_masks
from mtp_lightning.noise import row_seeds
from mtp_lightning.parser_messages import clear_message, missing_arguments, required
from mtp_lightning.prompts import Prompt, encode_prompt, read_prompts
from mtp_lightning.text_stream import GrowingText


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


class OneLineParser(ArgumentParser):
    """A parser whose errors are raised for ``main`` to print as one line. Its options are all on the command line."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **{"allow_abbrev": False, **options})

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise what is wrong with the command line."""
        actions = [action for action in self._actions if action.dest != "help"]
        if missing := missing_arguments(message):
            words = {action.dest: f"--{action.dest}" if action.option_strings else action.dest.upper() for action in actions}
            raise UsageError(
                f"{required([words.get(name, name) for name in missing])} on the command line. {self.prog} --help shows all."
            ) from ex
        raise UsageError(clear_message(str(message), [action.dest for action in actions])) from ex


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
    texts = [GrowingText(model, prompt, options, stops) for prompt in prompts]
    finished: set[int] = set()
    steps = decode_rows(model, [torch.tensor(prompt.input_ids) for prompt in prompts], options, finished=finished)
    seconds = 0.0
    prepare(model, options)
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
                pieces[row] += text.rest()
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
    trained_masks(model, arguments.options())  # what is wrong shows before anything is printed
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
    parser = OneLineParser(prog="mtp generate", description="Generates text with a trained model.")
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
