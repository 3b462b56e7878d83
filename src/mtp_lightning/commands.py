# SPDX-License-Identifier: Apache-2.0
"""Commands that use a trained model without a trainer."""

from __future__ import annotations

import difflib
import json
import re
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, NoReturn

import torch
from jsonargparse import ArgumentParser

from mtp_lightning.decoding import DecodingOptions, decode_rows, prepare, trained_masks
from mtp_lightning.errors import UsageError
from mtp_lightning.model import MTPModel
from mtp_lightning.noise import row_seeds
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
        self.options()

    def load(self, name: str) -> MTPModel:
        """Open a model where and as these options say.

        Args:
            name: saved folder, checkpoint file or hub id.

        Returns:
            The model.
        """
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
        )


class OneLineParser(ArgumentParser):
    """A parser whose errors are raised for ``main`` to print as one line."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **{"allow_abbrev": False, **options})

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise what is wrong with the command line."""
        known = [action.dest for action in self._actions if action.dest != "help"]
        raise UsageError(clear_message(str(message), known)) from ex


_PLAIN = {
    r"<class '(?:\w+\.)*(\w+)'>": r"\1",
    r"typing\.Literal\[(.+?)\]": r"\1",
    r"\bNoneType\b": "null",
    r"Expected a dot import path string: (\S+)": r"\1 is no import path",
    r"^Expected an? ": "expected ",
    r" or Expected an? ": " or ",
}
"""What Python's types and jsonargparse's terms are called in a message."""


def clear_message(message: str, known: Iterable[str]) -> str:
    """A message of jsonargparse in one line and in the user's terms.

    ``Subcommand 'fit' does not accept option 'model.num_maks' -> unknown key or option 'model.num_maks': did you mean ..``

    Args:
        message: the message.
        known: the keys that there are, to find the one meant.

    Returns:
        The line.
    """
    line = " ".join(message.split())
    if unknown := re.search(r"^(?:Group '(.+)'|.*) does not accept option '(.+)'|^unrecognized arguments: (\S+)", line):
        group, key, option = unknown.groups()
        name = option.partition("=")[0] if option else f"{group}.{key}" if group else key
        near = difflib.get_close_matches(name.lstrip("-"), known, n=1)
        return f"unknown key or option {name!r}: {f'did you mean {near[0]!r}?' if near else '--help lists what there is.'}"
    if missing := re.match(r"the following arguments are required: (?:fit\.|validate\.|test\.)?(.+)", line):
        return f"{missing[1]} is required: set it in the configuration file or on the command line."
    wrong = re.match(r'Parser key "(.+?)":(.*)', message, re.DOTALL)
    if not wrong:
        return line
    key, what = wrong[1], wrong[2]
    got = re.search(r"(?:\. Got value:|\n *Given value:) (.*)", what, re.DOTALL)
    # Of a type with alternatives each has its own error; what is indented deeper explains it at length.
    errors = re.findall(r"^    - (.+)$", what, re.MULTILINE) or re.findall(
        r"^  - (.+?)(?:\. Got value:.*)?$", what, re.MULTILINE
    )
    errors = [error for error in errors if not error.startswith("Expected a path but")]
    if cause := [error for error in errors if not re.match(r"Expected an? (<class|typing)|Not a valid subclass", error)]:
        errors, got = cause, None  # the type is right
    text = " ".join(" or ".join(dict.fromkeys(errors or [what[: got and got.start()]])).split())
    for python, plain in _PLAIN.items():
        text = re.sub(python, plain, text)
    if "class_path" in text or "import path" in text.lower():
        text += "; a class_path is module.Class, of an installed package or of a file in the current folder"
    value = f", got {' '.join(got[1].split())[:100]}" if got and "Namespace(" not in got[1] else ""
    return f"{key}: {text.rstrip('.')}{value}."


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
        UsageError: more masks than are trained, or a prompt that does not fit the context.
    """
    trained_masks(model, arguments.options())  # what is wrong shows before anything is printed
    for number, prompt in enumerate(prompts, 1):
        if len(prompt.input_ids) >= model.context:
            raise UsageError(
                f"prompt {number} has {len(prompt.input_ids)} tokens and the model's context is {model.context}:"
                f" shorten it to {model.context - 1} or less."
            )
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
                print(json.dumps(record, ensure_ascii=False), flush=True)
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
    else:
        prompts = read_prompts(config.prompts, model.tokenizer)
    print_generations(model, prompts, arguments, config.json)
