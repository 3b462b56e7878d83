# SPDX-License-Identifier: Apache-2.0
"""``mtp benchmark``: acceptance length by domain and number of masks, losslessness, speed-up. Prints, writes three files."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse.typing import NonNegativeInt, PositiveInt

from mtp_lightning.commands.arguments import DecodingArguments
from mtp_lightning.commands.parser import CommandParser
from mtp_lightning.commands.progress import Progress, note
from mtp_lightning.decoding.limits import resolve_num_masks
from mtp_lightning.decoding.options import Decoding, DecodingOptions
from mtp_lightning.decoding.planner import calibrate
from mtp_lightning.errors import RunError, UsageError
from mtp_lightning.evaluation.benchmark import Setting, acceptance_grid, grid_settings
from mtp_lightning.evaluation.benchmark_report import markdown, save_benchmark_plot
from mtp_lightning.evaluation.benchmark_speed import batches_by_domain, measure_speed, speed_systems
from mtp_lightning.evaluation.reporting import save_json
from mtp_lightning.files import atomic_file
from mtp_lightning.model import MTPModel
from mtp_lightning.paths import why_unwritable
from mtp_lightning.text.prompts import read_prompts

VARIED = {"decoding", "num_masks", "sampler_head"}
"""Options of decoding that are varied by default."""


def run_benchmark(args: list[str]) -> None:
    """``mtp benchmark MODEL --prompts F``."""
    parser = CommandParser(
        prog="mtp benchmark",
        description="Measures tokens per step and speed-up on prompts, and compares each text with autoregressive decoding.",
    )
    parser.add_argument("model", type=str, help="saved folder, checkpoint file or hub id")
    parser.add_argument("--prompts", type=str, required=True, help=".txt or .jsonl file of prompts; - standard input")
    parser.add_argument(
        "--num_prompts", type=PositiveInt | None, default=None, help="maximum number, taken evenly from the domains"
    )
    parser.add_argument("--decoding", type=Decoding | None, default=None, help="quadratic or linear. Default: both")
    parser.add_argument(
        "--num_masks", type=int | Literal["auto"] | None, default=None, help="Default: 1 to k, and auto in the timing"
    )
    parser.add_argument("--sampler_head", type=bool | None, default=None, help="Default: with it and without it")
    parser.add_argument("--speed_rounds", type=NonNegativeInt, default=12, help="rounds of timing, each a batch; 0: none")
    parser.add_argument("--output", type=str, default="benchmark", help="folder for benchmark.json, .md and .png")
    parser.add_argument("--json", action="store_true", help="print the JSON report instead of the tables")
    DecodingArguments.add_to(parser, skip=VARIED)
    config = parser.parse_args(args)
    if config.decoding == "autoregressive":
        raise UsageError("--decoding must be quadratic or linear: autoregressive decoding is what both are compared with.")
    measure(config, DecodingArguments.from_config(config, skip=VARIED))


def measure(config: Any, arguments: DecodingArguments) -> None:
    """Load the model, measure, print and write."""
    folder = Path(config.output)
    if (reason := why_unwritable(folder)) is not None:  # before hours of measuring
        raise RunError(f"{folder} can't be written: {reason}.")
    model = arguments.load(config.model)
    prompts = read_prompts(config.prompts, model.tokenizer, config.num_prompts, model.context)
    options = arguments.options()
    shown_options = {name: value for name, value in asdict(options).items() if name != "logits_processor"}
    settings = _settings(model, config)
    progress = Progress()

    def on_progress(label: str, done: int, count: int) -> None:
        progress(f"{label}: {done} of {count} {'rounds' if label == 'speed' else 'prompts'}", always=done == count)

    report: dict[str, Any] = {
        "model": config.model,
        "base_model": model.base_model,
        "revision": model.revision,
        "prompts": config.prompts,
        "options": {**shown_options, "batch_size": config.batch_size, "stop": arguments.stop},
        "dtype": str(model.base.dtype).removeprefix("torch."),
        "device": _device(model),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        **acceptance_grid(model, prompts, settings, options, config.batch_size, on_progress, arguments.stop),
        "speed": None,
    }
    batches = batches_by_domain(prompts, config.batch_size, config.speed_rounds)
    if batches:
        head = model.sampler_head is not None and config.sampler_head is not False
        chosen = replace(options, decoding=config.decoding or "quadratic", sampler_head=head)
        masks = [setting.num_masks for setting in settings if setting[:2] == (chosen.decoding, chosen.sampler_head)]
        masks += ["auto"] if config.num_masks is None else []
        if "auto" in masks:
            calibrate(model, replace(chosen, num_masks="auto"), set(map(len, batches)), note)
        systems = speed_systems(model, chosen, masks, config.batch_size, arguments.stop)
        report["speed"] = measure_speed(systems, batches, options.max_new_tokens, on_progress)
    text = markdown(report)
    # Printed first: if the disk is full by now, the measurements are not lost.
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


def _device(model: MTPModel) -> str:
    device = model.base.device
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {os.cpu_count()} cores, {platform.machine()}"
