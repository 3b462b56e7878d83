# SPDX-License-Identifier: Apache-2.0
"""``mtp benchmark``: acceptance length by domain and number of masks, losslessness, speed-up. Prints, writes three files."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch

from mtp_lightning.commands.arguments import DecodingArguments
from mtp_lightning.commands.parser import CommandParser
from mtp_lightning.commands.progress import Progress
from mtp_lightning.decoding.limits import resolve_num_masks
from mtp_lightning.decoding.options import Decoding, DecodingOptions
from mtp_lightning.errors import RunError, UsageError
from mtp_lightning.evaluation.benchmark import Setting, acceptance_grid, grid_settings
from mtp_lightning.evaluation.benchmark_report import markdown, save_benchmark_plot
from mtp_lightning.evaluation.benchmark_speed import batches_by_domain, measure_speed, speed_systems
from mtp_lightning.evaluation.reporting import save_json
from mtp_lightning.files import atomic_file
from mtp_lightning.model import MTPModel
from mtp_lightning.paths import why_unwritable
from mtp_lightning.text.prompts import read_prompts

OWN = {"decoding", "num_masks", "sampler_head", "batch_size"}
"""Options of decoding that mean something else here: not given, they are varied."""


def parser() -> CommandParser:
    """The command's options."""
    made = CommandParser(
        prog="mtp benchmark",
        description="Measures tokens a step and speed-up on prompts, and compares each text with autoregressive decoding.",
    )
    made.add_argument("model", type=str, help="saved folder, checkpoint file or hub id")
    made.add_argument("--prompts", type=str, required=True, help=".txt or .jsonl file of prompts; - standard input")
    made.add_argument("--num_prompts", type=int | None, default=None, help="at most so many, evenly from the domains")
    made.add_argument("--decoding", type=Decoding | None, default=None, help="quadratic or linear; not given: both")
    made.add_argument(
        "--num_masks", type=int | Literal["auto"] | None, default=None, help="not given: 1 to k, and auto in the timing"
    )
    made.add_argument("--sampler_head", type=bool | None, default=None, help="not given: with it and without it")
    made.add_argument("--batch_size", type=int, default=1, help="so many prompts are decoded together")
    made.add_argument("--speed_rounds", type=int, default=12, help="interleaved rounds of timing, each a batch; 0: none")
    made.add_argument("--output", type=str, default="benchmark", help="folder for benchmark.json, .md and .png")
    made.add_argument("--json", action="store_true", help="print the JSON report instead of the tables")
    made.add_class_arguments(DecodingArguments, None, skip=OWN & set(DecodingArguments.__dataclass_fields__))
    return made


def run_benchmark(args: list[str]) -> None:
    """``mtp benchmark MODEL --prompts F``.

    Args:
        args: options.

    Raises:
        UsageError: a wrong option.
    """
    config = parser().parse_args(args)
    for name, least in (("batch_size", 1), ("speed_rounds", 0)):
        if config[name] < least:
            raise UsageError(f"{name} must be {least} or more, got {config[name]}. Change --{name}.")
    if config.num_prompts is not None and config.num_prompts < 1:
        raise UsageError(f"num_prompts must be 1 or more, got {config.num_prompts}. Change --num_prompts.")
    if not config.output:
        raise UsageError("output must be a folder, got an empty name. Change --output.")
    if config.decoding == "autoregressive":
        raise UsageError(
            "autoregressive decoding is what all others are compared with: leave --decoding out or name another."
        )
    shared = {name: config[name] for name in DecodingArguments.__dataclass_fields__ if name not in OWN}
    arguments = DecodingArguments(**shared)
    measure(config, arguments)


def measure(config: Any, arguments: DecodingArguments) -> None:
    """Load the model, measure, print and write.

    Args:
        config: the command's options.
        arguments: those of decoding.

    Raises:
        UsageError: a wrong option.
        RunError: a file can't be read or written, or a prompt does not fit the context.
    """
    folder = Path(config.output)
    if (reason := why_unwritable(folder)) is not None:  # seen before hours of measuring
        raise RunError(f"{folder} can't be written: {reason}. Give --output another folder.")
    model = arguments.load(config.model)
    prompts = read_prompts(config.prompts, model.tokenizer, config.num_prompts, model.context)
    options = arguments.options()
    settings = _settings(model, config)
    progress = Progress()

    def on_progress(label: str, done: int, count: int) -> None:
        progress(f"{label}: {done} of {count} {'rounds' if label == 'speed' else 'prompts'}", always=done == count)

    report: dict[str, Any] = {
        "model": config.model,
        "base_model": model.base_model,
        "revision": model.revision,
        "prompts": config.prompts,
        "options": {**_plain(options), "batch_size": config.batch_size, "stop": arguments.stop},
        "dtype": str(model.base.dtype).removeprefix("torch."),
        "device": _device(model),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        **acceptance_grid(model, prompts, settings, options, config.batch_size, on_progress, arguments.stop),
        "speed": None,
    }
    batches = batches_by_domain(prompts, config.batch_size, config.speed_rounds)
    if batches:
        chosen = _speed_options(model, config, options)
        masks = [each.num_masks for each in settings if each[:2] == (chosen.decoding, chosen.sampler_head)]
        masks += ["auto"] if config.num_masks is None else []
        systems = speed_systems(model, chosen, masks, config.batch_size, arguments.stop)
        report["speed"] = measure_speed(systems, batches, options.max_new_tokens, on_progress)
    text = markdown(report)
    # Printed first: should the disk be full by now, what was measured is not lost.
    print(json.dumps(report, ensure_ascii=False) if config.json else text, end="\n" if config.json else "", flush=True)
    try:
        save_json(report, folder / "benchmark.json")
        with atomic_file(folder / "benchmark.md") as file:
            file.write(text.encode())
        save_benchmark_plot(report, folder / "benchmark.png")
    except RunError as error:
        raise RunError(f"{error} The report is printed above.") from error


def _settings(model: MTPModel, config: Any) -> list[Setting]:
    decodings: list[Decoding] = [config.decoding] if config.decoding else ["quadratic", "linear"]
    heads = [True, False] if config.sampler_head is None else [config.sampler_head]
    if config.num_masks is not None:
        resolve_num_masks(model, DecodingOptions(num_masks=config.num_masks))  # fails before anything is decoded
        return grid_settings(model, decodings, heads, [config.num_masks])
    return grid_settings(model, decodings, heads, range(1, model.num_masks + 1))


def _speed_options(model: MTPModel, config: Any, options: DecodingOptions) -> DecodingOptions:
    """The decoding and head that are timed: those that were asked for, else quadratic with the sampler head."""
    head = model.sampler_head is not None and config.sampler_head is not False
    return DecodingOptions(**{**_plain(options), "decoding": config.decoding or "quadratic", "sampler_head": head})


def _plain(options: DecodingOptions) -> dict[str, Any]:
    return {name: value for name, value in asdict(options).items() if name != "logits_processor"}


def _device(model: MTPModel) -> str:
    device = model.base.device
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {os.cpu_count()} cores, {platform.machine()}"
