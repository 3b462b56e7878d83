# SPDX-License-Identifier: Apache-2.0
"""vLLM engines for the checks, in this process: plain ones and ours, and our own decoder's texts and steps."""

from __future__ import annotations

import contextlib
import gc
import json
import os
from importlib.resources import files
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the engine in this process: its counters can be read
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch  # noqa: E402
from vllm import LLM, SamplingParams  # noqa: E402
from vllm.distributed import cleanup_dist_env_and_memory  # noqa: E402
from vllm.outputs import CompletionOutput  # noqa: E402

from mtp_lightning import MTPModel  # noqa: E402
from mtp_lightning.decoding.planner import FixedPlanner  # noqa: E402
from mtp_lightning.decoding.planning.draft_plan import Plan  # noqa: E402
from mtp_lightning.integrations.vllm.load_table import LoadTable, parse_loads  # noqa: E402
from mtp_lightning.integrations.vllm.settings import KEY, PROPOSER  # noqa: E402
from mtp_lightning.paths import resolve  # noqa: E402


def demo_prompts(number: int) -> list[str]:
    """Openings of the demo's texts."""
    lines = files("mtp_lightning").joinpath("demo/prompts.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["prompt"] for line in lines[:number]]


def read_prompts(file: str | None, number: int, tokenizer: Any) -> list[list[int]]:
    """Token ids of prompts, taken evenly from a file of messages, or the demo's texts."""
    if file is None:
        return [tokenizer.encode(text) for text in demo_prompts(number)]
    rows = [json.loads(line)["messages"] for line in Path(file).read_text(encoding="utf-8").splitlines()]
    rows = [rows[i * len(rows) // number] for i in range(number)]
    return [list(tokenizer.apply_chat_template(row, add_generation_prompt=True, return_dict=False)) for row in rows]


def base_of(folder: str) -> str:
    """The base model of a saved folder."""
    return resolve(json.loads((Path(folder) / "mtp_config.json").read_text())["base_model"])


def start(folder: str, ours: bool, dtype: str, num_masks: int = 8, **options: Any) -> LLM:
    """An engine: the base alone, or with our plugin."""
    base = base_of(folder)
    if ours:
        architecture = json.loads((Path(base) / "config.json").read_text())["architectures"][0]
        options = {
            "hf_overrides": {"architectures": ["MTP" + architecture]},
            "additional_config": {KEY: {"folder": folder}},
            "speculative_config": {"method": "custom_class", "model": PROPOSER, "num_speculative_tokens": num_masks},
        } | options
    settings = {"max_model_len": 512, "max_num_seqs": 8, "enforce_eager": True, "gpu_memory_utilization": 0.3, "seed": 0}
    return LLM(model=base, dtype=dtype, **(settings | options))


def stop(engine: LLM) -> None:
    """Free an engine, so that another can be started."""
    engine.llm_engine.engine_core.shutdown()
    del engine
    gc.collect()
    cleanup_dist_env_and_memory()


def set_blocks(engine: LLM, kind: str, num_masks: int) -> str:
    """Replace the load table by one row; kind ``plain``: by none, ``auto``: by that of the start. Returns it in words."""
    rows = [] if kind == "plain" else [[1000, kind, num_masks]]

    def change(worker: Any) -> str:
        served = worker.model_runner.model.mtp
        if not hasattr(served, "table_at_start"):
            served.table_at_start = served.table
        served.table = served.table_at_start
        if kind != "auto":
            served.table = LoadTable(parse_loads(rows, num_masks), served.table.max_rows)
        return str(served.table.loads)

    return str(engine.collective_rpc(change)[0])


def take_steps(engine: LLM) -> int:
    """Steps that requests took since the last call, added up."""

    def take(worker: Any) -> int:
        drafter = worker.model_runner.drafter
        steps, drafter.num_steps = drafter.num_steps, 0
        return int(steps)

    return sum(engine.collective_rpc(take))


def metrics(engine: LLM) -> dict[str, float]:
    """vLLM's counters by name."""
    return {metric.name: metric.value for metric in engine.get_metrics() if hasattr(metric, "value")}


def greedy_ids(engine: LLM, prompts: list[Any], together: bool = True, **options: Any) -> list[list[int]]:
    """The token ids of greedy answers, with all prompts at once or one after another."""
    return [list(answer.token_ids) for answer in greedy(engine, prompts, together, **options)]


def greedy(engine: LLM, prompts: list[Any], together: bool = True, **options: Any) -> list[CompletionOutput]:
    """vLLM's greedy answers."""
    params = SamplingParams(temperature=0, **options)
    groups = [prompts] if together else [[prompt] for prompt in prompts]
    return [output.outputs[0] for group in groups for output in engine.generate(group, params, use_tqdm=False)]


class AlternatingPlanner(FixedPlanner):
    """Plans of our own decoder that are those of the kind ``alternating``; the pass over the prompt is plain."""

    def plan(self, state: Any) -> Plan:
        """See ``Planner``."""
        plan = super().plan(state)
        return plan if state.num_steps and not plan.num_drafts else plan._replace(masks=0)


def our_steps(
    model: MTPModel, prompts: list[list[int]], max_tokens: int, kind: str, num_masks: int
) -> tuple[list[list[int]], int]:
    """The texts of our own decoder, and its steps, added up."""
    decoding, texts, steps = kind, [], 0
    with contextlib.ExitStack() as stack:
        if kind == "alternating":
            decoding, planner = "linear", AlternatingPlanner("linear", num_masks)
            stack.enter_context(mock.patch("mtp_lightning.decoding.loop.make_planner", lambda *_: planner))
        for ids in prompts:
            out = model.generate(torch.tensor([ids]), max_new_tokens=max_tokens, decoding=decoding, num_masks=num_masks)
            texts.append(out.sequences[0, len(ids) :].tolist())
            steps += int(out.num_steps.sum())
    return texts, steps
