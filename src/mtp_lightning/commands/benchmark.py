# SPDX-License-Identifier: Apache-2.0
"""``mtp benchmark``: which way to decode is the fastest on this machine. Prints tables, writes three files."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from mtp_lightning.commands.arguments import DecodingArguments
from mtp_lightning.commands.distill import base_of
from mtp_lightning.commands.options import VARIED
from mtp_lightning.commands.progress import counted
from mtp_lightning.decoding.limits import resolve_num_masks
from mtp_lightning.decoding.options import Decoding, DecodingOptions
from mtp_lightning.decoding.planner import calibrate
from mtp_lightning.errors import RunError, UsageError
from mtp_lightning.evaluation.acceptance import summarise
from mtp_lightning.evaluation.benchmark import (
    PLAIN,
    Setting,
    System,
    batches_by_domain,
    decoding_system,
    difference_finder,
    measure,
    order_violations,
    settings_grid,
)
from mtp_lightning.evaluation.benchmark_report import markdown, print_report, save_benchmark_plot
from mtp_lightning.evaluation.losslessness import autoregressive, first_difference
from mtp_lightning.evaluation.reporting import note, save_json
from mtp_lightning.evaluation.transformers_systems import transformers_systems
from mtp_lightning.files import atomic_file
from mtp_lightning.integrations.openai_server import served_model, server_system
from mtp_lightning.model import MTPModel
from mtp_lightning.modeling.base import load_tokenizer
from mtp_lightning.paths import check_writable
from mtp_lightning.text.prompts import Prompt, read_prompts

FILE = "benchmark.json"


def run_benchmark(config: Any) -> None:
    """``mtp benchmark MODEL --prompts F``."""
    if config.decoding == "autoregressive":
        raise UsageError("--decoding must be quadratic or linear: autoregressive decoding is what both are compared with.")
    if config.baseline_endpoint is not None and config.endpoint is None:
        raise UsageError("--baseline_endpoint needs --endpoint, the server to compare with it.")
    arguments = DecodingArguments.from_config(config, skip=VARIED)
    check_output(Path(config.output), config.overwrite)  # before minutes of measuring
    report = (measure_model if config.endpoint is None else measure_servers)(config, arguments)
    write(report, Path(config.output), config.json)


def check_output(folder: Path, overwrite: bool) -> None:
    """Refuse a folder that can't be written, or that holds another benchmark."""
    check_writable(folder)
    if (folder / FILE).exists() and not overwrite:
        raise UsageError(
            f"{str(folder)!r} holds a benchmark already: choose another folder with --output, or replace it (--overwrite)."
        )


def measure_model(config: Any, arguments: DecodingArguments) -> dict[str, Any]:
    """Load the model and measure its ways to decode."""
    model = arguments.load(config.model)
    prompts = read_prompts(config.prompts, model.tokenizer, config.num_prompts, model.context, arguments.raw)
    options = arguments.options()
    settings = chosen_settings(model, config)
    by_name: dict[str, Setting] = {s.label if config.grid else s.masks: s for s in settings}
    ways = {PLAIN: autoregressive(options), **{name: replace(options, **s._asdict()) for name, s in by_name.items()}}
    systems = {name: decoding_system(model, prompts, way, arguments.stop) for name, way in ways.items()}
    if config.grid:
        systems |= transformers_systems(model, prompts, options, config.batch_size, arguments.stop)
    domains = [prompt.domain for prompt in prompts]
    sizes = set(map(len, batches_by_domain(domains, config.batch_size)))
    for way in ways.values():
        calibrate(model, way, sizes, note)
    with counted("texts" if config.batch_size == 1 else "batches") as progress:
        find = difference_finder(model, prompts, options)
        results = measure(systems, domains, config.batch_size, options.max_new_tokens, find, progress)
    return {
        **described(config, arguments),
        "base_model": model.base_model,
        "revision": model.revision,
        "dtype": str(model.base.dtype).removeprefix("torch."),
        "device": device_name(model),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "endpoints": None,
        "plain": summarise(results[PLAIN]),
        "settings": [
            {
                "name": name,
                **(by_name[name]._asdict() if name in by_name else dict.fromkeys(Setting._fields)),
                "has_head": model.sampler_head is not None,
                **summarise(group),
            }
            for name, group in results.items()
            if name != PLAIN
        ],
        "order": order_violations({s: results[name] for name, s in by_name.items()}) if config.grid else {},
    }


def chosen_settings(model: MTPModel, config: Any) -> list[Setting]:
    """The settings that the command line asks for."""
    k = model.num_masks
    masks: Sequence[Any] = [*range(1, k + 1), "auto"] if config.grid else [*(m for m in (2, 4, 8) if m < k), k, "auto"]
    if config.num_masks is not None:
        resolve_num_masks(model, DecodingOptions(num_masks=config.num_masks))  # fails before anything is decoded
        masks = [config.num_masks]
    decodings: list[Decoding] = ["quadratic", "linear"] if config.grid else ["quadratic"]
    heads = [True, False] if config.grid else [True]
    return settings_grid(
        model,
        [config.decoding] if config.decoding else decodings,
        heads if config.sampler_head is None else [config.sampler_head],
        masks,
    )


def measure_servers(config: Any, arguments: DecodingArguments) -> dict[str, Any]:
    """Measure one server, or two against each other."""
    tokenizer = load_tokenizer(*base_of(config.model, config.base_model, config.revision))
    prompts: list[Prompt] = read_prompts(config.prompts, tokenizer, config.num_prompts, raw=arguments.raw)
    options = arguments.options()
    endpoints = {PLAIN: config.baseline_endpoint, "server": config.endpoint}
    named = {name: (url, served_model(url)) for name, url in endpoints.items() if url is not None}
    systems: dict[str, System] = {n: server_system(*at, prompts, options, arguments.stop) for n, at in named.items()}
    with counted("requests" if config.batch_size == 1 else "batches") as progress:
        domains = [prompt.domain for prompt in prompts]
        # Servers do not couple: only greedy texts must be equal.
        compare = (lambda _, expected, tokens: first_difference(expected, tokens)) if options.temperature == 0 else None
        results = measure(systems, domains, config.batch_size, options.max_new_tokens, compare, progress)
    return {
        **described(config, arguments),
        "dtype": "",
        "device": f"server {config.endpoint}",
        "endpoints": {name: {"url": url, "model": model} for name, (url, model) in named.items()},
        "plain": summarise(results[PLAIN]) if PLAIN in results else None,
        "settings": [
            {"name": "server", **dict.fromkeys(Setting._fields), "has_head": True, **summarise(results["server"])},
        ],
        "order": {},
    }


def described(config: Any, arguments: DecodingArguments) -> dict[str, Any]:
    """What was asked for."""
    options = {name: value for name, value in asdict(arguments.options()).items() if name != "logits_processor"}
    return {
        "model": config.model,
        "prompts": config.prompts,
        "options": {**options, "batch_size": config.batch_size, "stop": arguments.stop},
    }


def device_name(model: MTPModel) -> str:
    """The device that the model is on, in words."""
    device = model.base.device
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} with {torch.get_num_threads()} of {os.cpu_count()} cores, {platform.machine()}"


def write(report: dict[str, Any], folder: Path, as_json: bool) -> None:
    """Print the report and write its files. Printed first: if the disk is full by now, the measurements are not lost."""
    if as_json:
        print(json.dumps(report, ensure_ascii=False), flush=True)
    else:
        print_report(report, Console())
    try:
        save_json(report, folder / FILE)
        with atomic_file(folder / "benchmark.md") as file:
            file.write(markdown(report).encode())
        save_benchmark_plot(report, folder / "benchmark.png")
    except RunError as error:
        raise RunError(f"{error} The report is printed above.") from error
    note(f"written to {folder}: {FILE}, benchmark.md, benchmark.png")
