# SPDX-License-Identifier: Apache-2.0
"""The paper's Table 1: acceptance length by evaluation set, for 1 to 8 masks; quadratic decoding, greedy, at most 100 steps.

    python benchmarks/reproduce/table1.py MODEL gsm8k humaneval mt_bench ifeval --num_prompts 20
    python benchmarks/reproduce/table1.py MODEL spec_bench=question.jsonl --num_prompts 60

MODEL is what ``mtp benchmark`` takes, sets are those of ``prompt_sets.py``. A set that has its row in the results is not
measured again unless the model's weights have changed. Each text is compared with autoregressive decoding by the same model.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from common import OUTPUT
from prompt_sets import prompts_of
from recipe_runs import commit, read_rows

from mtp_lightning import MTPModel
from mtp_lightning.decoding.options import DecodingOptions
from mtp_lightning.evaluation.acceptance import summarise
from mtp_lightning.evaluation.benchmark import PLAIN, decoding_system, difference_finder, settings_grid
from mtp_lightning.evaluation.benchmark import measure as measure_systems
from mtp_lightning.evaluation.losslessness import autoregressive
from mtp_lightning.text.prompts import read_prompts

PAPER = {
    "gsm8k": (1.84, 2.58, 3.21, 3.75, 4.20, 4.60, 4.95, 5.22),
    "humaneval": (1.86, 2.63, 3.30, 3.87, 4.40, 4.79, 5.14, 5.35),
    "ifeval": (1.55, 1.86, 2.05, 2.16, 2.24, 2.30, 2.36, 2.39),
}
"""Rows of the paper's table that have a loader here: a model of 8 billion parameters."""


def measure(model: MTPModel, name: str, args: argparse.Namespace) -> dict[str, Any]:
    """The row of a set."""
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in prompts_of(name, args.num_prompts, args.text))
        file.flush()
        prompts = read_prompts(file.name, model.tokenizer, context=model.context)
    options = DecodingOptions(max_steps=100, max_new_tokens=args.max_new_tokens)
    settings = settings_grid(model, ["quadratic"], [model.sampler_head is not None], range(1, model.num_masks + 1))
    ways = {PLAIN: autoregressive(options), **{each.masks: replace(options, **each._asdict()) for each in settings}}
    systems = {way: decoding_system(model, prompts, chosen) for way, chosen in ways.items()}
    domains, find = [prompt.domain for prompt in prompts], difference_finder(model, prompts, options)
    began = time.process_time()
    results = measure_systems(systems, domains, 1, options.max_new_tokens, find)
    plain, *summaries = [summarise(group) for group in results.values()]
    lengths: dict[str, list[float]] = {}
    for summary in summaries:
        for domain, figures in {name.partition("=")[0]: summary["overall"], **summary["domains"]}.items():
            lengths.setdefault(domain, []).append(round(figures["acceptance_length"], 4))
    equal = [summary["overall"]["lossless"] for summary in summaries]
    return {
        **identity(name, args),
        "lengths": lengths,
        "texts_equal": sum(each["equal"] for each in equal),
        "texts": sum(each["checked"] for each in equal),
        "repeated_8grams": round(plain["overall"]["repeated_8grams"], 4),
        "cpu_seconds": round(time.process_time() - began, 1),
        "commit": commit(),
    }


def identity(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """What a row is the result of."""
    path = Path(args.model)
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path] if path.is_file() else []
    weights = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12] if files else None
    return {
        "name": name.partition("=")[0],
        "model": path.name,
        "weights": weights,
        "prompts": args.num_prompts,
        "tokens": args.max_new_tokens,
    }


def main() -> None:
    """Measure what is missing and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="saved folder, checkpoint file or hub id")
    parser.add_argument("sets", nargs="+", help="NAME or NAME=FILE: see prompt_sets.py")
    parser.add_argument("--num_prompts", type=int, default=20, help="of each set")
    parser.add_argument("--max_new_tokens", type=int, default=900, help="100 steps of 9 tokens; fewer for quick runs")
    parser.add_argument("--text", action="store_true", help="plain text, for a base without a chat template")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--rows", type=Path, default=OUTPUT / "table1.jsonl")
    args = parser.parse_args()
    model = None
    print("| set | " + " | ".join(str(k) for k in range(1, 9)) + " | texts equal |\n|" + "---|" * 10)
    for name in args.sets:
        wanted = identity(name, args)
        row = next((row for row in read_rows(args.rows) if wanted.items() <= row.items()), None)
        if row is None:
            model = model or MTPModel.from_pretrained(args.model, dtype=args.dtype)
            row = measure(model, name, args)
            with args.rows.open("a") as file:
                file.write(json.dumps(row) + "\n")
        for domain, lengths in row["lengths"].items():
            equal = f"{row['texts_equal']} of {row['texts']}" if domain == row["name"] else ""
            cells = [f"{length:.2f}" for length in lengths] + ["-"] * (8 - len(lengths))  # a model has 8 masks at most here
            print(f"| {domain} | " + " | ".join(cells) + f" | {equal} |", flush=True)
        if row["name"] in PAPER:
            print(f"| {row['name']}, the paper | " + " | ".join(f"{x:.2f}" for x in PAPER[row["name"]]) + " | |", flush=True)


if __name__ == "__main__":
    main()
