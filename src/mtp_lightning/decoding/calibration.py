# SPDX-License-Identifier: Apache-2.0
"""Calibration: what decoding steps take on this machine, measured once and kept on disk, so that plans repeat themselves."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import transformers

from mtp_lightning.decoding.compiled_executor import EAGER_RUNS, CompiledExecutor, can_compile
from mtp_lightning.decoding.execution.decode_cache import decode_cache
from mtp_lightning.decoding.executor import EagerExecutor, token_choice
from mtp_lightning.decoding.options import DecodingOptions
from mtp_lightning.decoding.planning.draft_plan import PLAIN, Plan, block_placement, draft_sizes
from mtp_lightning.decoding.planning.step_costs import StepCosts, pair
from mtp_lightning.decoding.state import DecodeState
from mtp_lightning.files import shared_file
from mtp_lightning.modeling.network import MTPNetwork

FOLDER_VARIABLE = "MTP_CACHE"
"""The environment variable with the folder where calibrations are kept."""
UNRELATED = {"_name_or_path", "transformers_version"}
"""Entries of a configuration that say nothing about shapes."""
STEPS_VERSION = 3
"""To be raised by changes of the code that change what steps take."""
CONTEXT = 128
"""Tokens in the cache while measuring."""
ROUNDS, MIN_ROUNDS, SECONDS = 9, 3, 8.0
"""Rounds of measurements, how many a median needs, and the time after which no further round starts."""

StepSeconds = Callable[[Plan, int], float]
"""Seconds of a step by its plan and the number of rows."""


def plan_sizes(model: MTPNetwork, options: DecodingOptions) -> tuple[int, ...]:
    """Numbers of drafts and of masks that plans use: few where each shape takes seconds to compile."""
    return draft_sizes(model.num_masks, few=can_compile(model, options) and model.base.device.type == "cpu")


def measured_plans(model: MTPNetwork, options: DecodingOptions) -> list[Plan]:
    """The plans to measure: all that there are if they are few, else some of each kind; those with the most masks last."""
    k, sizes, where = model.num_masks, plan_sizes(model, options), block_placement(options.decoding)
    plans = [Plan(c, 0, "last") for c in sizes if c in (0, 1, 2, 4, k)]
    few = sizes != draft_sizes(k)
    plans += [Plan(0, m, "last") for m in sizes[1:]] if few else [Plan(0, 1, "last"), Plan(0, k, "last"), *pair(k)]
    return list(dict.fromkeys([*plans, *(Plan(m, m, where) for m in sizes if m in (1, 2, 4, k))]))


@torch.inference_mode()
def measure(model: MTPNetwork, options: DecodingOptions, num_rows: int) -> dict[Plan, float]:
    """Seconds of whole steps of a batch; the model is prepared for decoding.

    Each is timed between two plain ones, and the median of these ratios counts, if there are ``MIN_ROUNDS``: a busy machine
    slows both. Plans after the first one that takes longer than all its drafts could ever save are left out.
    """
    # Both depend on whether steps compile, and these options decide that too.
    executor_type = CompiledExecutor if can_compile(model, options) else EagerExecutor
    plans = measured_plans(model, options)
    options = replace(options, logits_processor=None, repetition_penalty=1.0)
    choice = token_choice(model, options, [0] * num_rows)
    executor = executor_type(model, options, choice)
    prompts, found = [torch.zeros(min(CONTEXT, model.context // 2), dtype=torch.int64)] * num_rows, dict[Plan, float]()
    with executor.open_cache(prompts, len(prompts[0]) + 1, None) as cache:
        limits = [model.context] * num_rows  # only the prompt's step is committed, so no row gets there
        state = DecodeState(prompts, limits, cache, choice, fixed_shapes=executor.fixed_shapes)
        prompt_step = executor.run(Plan(0, model.num_masks, "last"), state)
        state.commit(PLAIN, prompt_step)
        state.drafts = prompt_step.output.drafts

        def seconds(plan: Plan, runs: int = 1) -> float:
            for row in state.rows:
                row.num_drafts = plan.num_drafts
            times = [time.perf_counter()]
            for _ in range(runs):
                executor.run(plan, state)  # ends by reading tokens from the device, so all of the step is in its time
                times.append(time.perf_counter())
            return min(end - begin for begin, end in itertools.pairwise(times))

        warm_up = EAGER_RUNS[model.base.device.type] + 1 if executor.fixed_shapes else 0  # compiled after some steps
        begin = time.perf_counter()
        for plan in plans:
            if warm_up:  # no part of the time that measuring may take
                compiling = time.perf_counter()
                seconds(plan, warm_up)
                begin += time.perf_counter() - compiling
            found[plan] = seconds(plan, 2)  # for a slow model there is no time for more
            too_long = (1 + plan.masks) * found[PLAIN]
            if plan.num_drafts == plan.masks and found[plan] > too_long:
                found[plan] = min(found[plan], seconds(plan, 2))  # on a busy machine once is not enough
                if found[plan] > too_long:
                    break
        return _between_plain_steps(found, seconds, begin + SECONDS)


def _between_plain_steps(
    found: Mapping[Plan, float], seconds: Callable[[Plan], float], deadline: float
) -> dict[Plan, float]:
    """Seconds of the plans, each timed between two plain steps; those ``found`` before where the time is too short."""
    plain, ratios = [seconds(PLAIN)], {plan: list[float]() for plan in found if plan != PLAIN}
    for _ in range(ROUNDS):
        if time.perf_counter() > deadline:
            break
        for plan, of_plan in ratios.items():
            step = seconds(plan)
            plain.append(seconds(PLAIN))
            of_plan.append(2 * step / (plain[-2] + plain[-1]))
    least = min(found[PLAIN], *plain)
    medians = {plan: statistics.median(r) for plan, r in ratios.items() if len(r) >= MIN_ROUNDS}
    return {**found, PLAIN: least, **{plan: least * max(1.0, ratio) for plan, ratio in medians.items()}}


@functools.cache
def cpu_name() -> str:
    """The model of the CPU, as far as the system tells."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _settings(model: MTPNetwork, options: DecodingOptions, num_rows: int) -> dict[str, Any]:
    """What costs depend on, apart from the model."""
    device = model.base.device
    return {
        "steps": STEPS_VERSION,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "versions": [import_module("mtp_lightning").__version__, torch.__version__, transformers.__version__],
        "dtype": str(model.base.dtype),
        "autocast": torch.is_autocast_enabled(device.type),
        "compiled": can_compile(model, options),
        "rows": num_rows,
        "sampler_head": options.sampler_head,
        "candidates": token_choice(model, options, [0]).num_candidates,
        "choice": [options.temperature > 0, options.top_k is None, options.top_p is None, options.verification],
        "plans": measured_plans(model, options),
    }


def _digest(model: MTPNetwork) -> str:
    """Identifies a model's shapes: those of its weights, and its configuration."""
    config = {name: value for name, value in model.base.config.to_dict().items() if name not in UNRELATED}
    shapes = [(name, str(weight.dtype), *weight.shape) for name, weight in model.named_parameters()]
    return hashlib.sha256(repr((config, shapes)).encode()).hexdigest()


def folder() -> Path:
    """Where calibrations are kept: what ``MTP_CACHE`` says, else ``mtp-lightning`` in the user's cache folder."""
    if given := os.environ.get(FOLDER_VARIABLE):
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "mtp-lightning"


def _read(path: Path, key: Any) -> StepCosts | None:
    """Stored costs; None if the file is missing, damaged or about something else."""
    with suppress(OSError, ValueError, TypeError, KeyError):
        stored = json.loads(path.read_bytes())
        found = {Plan(c, m, where): float(seconds) for c, m, where, seconds in stored["seconds"]}
        if stored["key"] == key and PLAIN in found and all(0 < seconds < math.inf for seconds in found.values()):
            return StepCosts(found)
    return None


def step_costs(
    model: MTPNetwork, options: DecodingOptions, num_rows: int, notify: Callable[[str], object] | None = None
) -> StepCosts:
    """What steps of a batch take: as measured earlier, else measured now and stored."""
    settings = _settings(model, options, num_rows)
    known, kind = decode_cache(model).calibrations, json.dumps(settings)
    if kind not in known:
        key = json.loads(json.dumps({"model": _digest(model), **settings}))
        path = folder() / f"steps-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]}.json"
        costs = _read(path, key)
        if costs is None:
            if notify is not None:
                kept = f"kept in {str(path)!r} (delete it to measure again)"
                notify(f"measuring what decoding steps take on this machine, once; {kept}")
            costs = StepCosts(measure(model, options, num_rows))
            if (others := _read(path, key)) is not None:
                costs = others  # another process was faster: both go by the same
            else:
                stored = {"key": key, "seconds": [[*plan, seconds] for plan, seconds in costs.measured.items()]}
                with suppress(OSError), shared_file(path) as file:
                    file.write(json.dumps(stored).encode())
        known[kind] = costs
    return known[kind]


def step_seconds(
    model: MTPNetwork, options: DecodingOptions, num_rows: int, notify: Callable[[str], object] | None = None
) -> StepSeconds:
    """What steps take with up to ``num_rows`` rows; ``notify`` gets a line of text if that has to be measured.

    Costs are measured for one row and for the next power of two, and rise evenly in between. Compiled steps keep all rows,
    and where shapes are few, plans that were not measured cost infinity.
    """
    if can_compile(model, options):
        costs, few = step_costs(model, options, num_rows, notify), model.base.device.type == "cpu"
        return lambda plan, _: math.inf if few and plan not in costs.measured else costs.seconds(plan)
    most = 1 << (num_rows - 1).bit_length()
    one, all_rows = step_costs(model, options, 1, notify), step_costs(model, options, most, notify)

    def seconds(plan: Plan, rows: int) -> float:
        alone = one.seconds(plan)
        return alone + (rows - 1) / max(1, most - 1) * (all_rows.seconds(plan) - alone)

    return seconds
