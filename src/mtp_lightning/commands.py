# SPDX-License-Identifier: Apache-2.0
"""Commands that use a trained model without a trainer."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

import torch
from jsonargparse import ArgumentParser

from mtp_lightning.decoding import DecodingOptions, decode, end_tokens, trained_masks
from mtp_lightning.errors import UsageError
from mtp_lightning.model import MTPModel
from mtp_lightning.prompts import Prompt, read_prompts


@dataclass
class DecodingArguments:
    """Options that all commands which decode share.

    Args:
        decoding: quadratic, linear or autoregressive.
        num_masks: masks in a block, at most as many as were trained; auto: all of them.
        sampler_head: draft with the sampler head; false: from the base head.
        max_new_tokens: at most so many tokens a prompt.
        max_steps: at most so many forward passes of the base a prompt.
        stop: a text that ends the generation; it is cut off.
        dtype: dtype of the model; not given: the one the base was saved in.
        device: cpu, cuda, ..; not given: cuda where there is one.
        revision: hub revision of the base model.
        base_model: where the base model lies now, if it moved.
    """

    decoding: Literal["quadratic", "linear", "autoregressive"] = "quadratic"
    num_masks: int | Literal["auto"] = "auto"
    sampler_head: bool = True
    max_new_tokens: int = 256
    max_steps: int | None = None
    stop: str | None = None
    dtype: str | None = None
    device: str | None = None
    revision: str | None = None
    base_model: str | None = None

    def options(self) -> DecodingOptions:
        """The part that decoding itself takes."""
        return DecodingOptions(self.decoding, self.num_masks, self.sampler_head, self.max_new_tokens, self.max_steps)


class OneLineParser(ArgumentParser):
    """A parser whose errors are raised for ``main`` to print as one line."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise what is wrong with the command line."""
        raise UsageError(" ".join(str(message).split())) from ex


def stable_text(tokenizer: Any, tokens: list[int]) -> str:
    """The text of tokens, less a character that is not complete yet."""
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    return text.rstrip("\ufffd")


def stream(model: MTPModel, prompt: Prompt, arguments: DecodingArguments, record: dict[str, Any]) -> Iterator[str]:
    """Generate for one prompt and yield text as it is verified.

    Args:
        model: the model.
        prompt: the prompt.
        arguments: how to decode.
        record: filled with the fields of the JSON line.

    Yields:
        Pieces of text.
    """
    options = arguments.options()
    ends = end_tokens(model, options)
    tokens: list[int] = []
    accepted: list[int] = []
    text, reason, begin = "", "length", time.perf_counter()
    for step in decode(model, torch.tensor(prompt.input_ids), options):
        tokens += step.tokens
        accepted.append(len(step.tokens) - 1)
        now = stable_text(model.tokenizer, tokens)
        if arguments.stop and arguments.stop in now:
            now, reason = now[: now.index(arguments.stop)], "stop"
        if len(now) > len(text):
            yield now[len(text) :]
            text = now
        if reason == "stop":
            break
    seconds = time.perf_counter() - begin
    if tokens[-1] in ends:
        reason = "stop"
    record.update(
        prompt=prompt.text,
        text=text,
        token_ids=tokens,
        num_steps=len(accepted),
        acceptance_length=len(tokens) / len(accepted),
        accepted_per_step=accepted,
        seconds=seconds,
        tokens_per_second=len(tokens) / seconds,
        decoding=options.decoding,
        num_masks=trained_masks(model, options),
        finish_reason=reason,
    )


def print_generations(model: MTPModel, prompts: list[Prompt], arguments: DecodingArguments, as_json: bool) -> None:
    """Generate for each prompt and print text as it comes, or one JSON line a prompt.

    Args:
        model: the model.
        prompts: the prompts.
        arguments: how to decode.
        as_json: JSON lines instead of text.
    """
    for number, prompt in enumerate(prompts):
        record: dict[str, Any] = {}
        if not as_json:
            print(("\n\n" if number else "") + prompt.text, end="", flush=True)
        for piece in stream(model, prompt, arguments, record):
            if not as_json:
                print(piece, end="", flush=True)
        if as_json:
            print(json.dumps(record, ensure_ascii=False), flush=True)
        else:
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
    parser.add_argument("model", type=str, help="checkpoint file that mtp fit wrote")
    parser.add_argument("--prompt", type=str | None, default=None, help="the prompt")
    parser.add_argument("--prompts", type=str | None, default=None, help=".txt or .jsonl file of prompts; - standard input")
    parser.add_argument("--json", action="store_true", help="print one JSON line a prompt")
    parser.add_class_arguments(DecodingArguments, None)
    config = parser.parse_args(args)
    if (config.prompt is None) == (config.prompts is None):
        raise UsageError("give either --prompt TEXT or --prompts FILE.")
    arguments = DecodingArguments(**{name: config[name] for name in DecodingArguments.__dataclass_fields__})
    model = MTPModel.from_pretrained(
        config.model,
        base_model=arguments.base_model,
        revision=arguments.revision,
        dtype=arguments.dtype or "auto",
        device=arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"),
    )
    if config.prompt is not None:
        prompts = [Prompt(config.prompt, model.tokenizer(config.prompt)["input_ids"], "")]
    else:
        prompts = read_prompts(config.prompts, model.tokenizer)
    print_generations(model, prompts, arguments, config.json)
