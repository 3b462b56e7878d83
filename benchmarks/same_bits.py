# SPDX-License-Identifier: Apache-2.0
"""Hashes of what a change that should alter no number must leave as it is: run before and after, and compare.

``python benchmarks/same_bits.py`` prints three hashes: losses and final weights of 20 seeded steps of
configs/demo.yaml; then texts, steps and accepted drafts with a fixed number of masks, quadratic and linear, greedy and
sampled, in float64 and float32; then the acceptance table of ``mtp benchmark``. ``--checkpoint FILE`` decodes with a
checkpoint that is at hand, so that both trees decode with the same weights and some drafts are right. Only the command
line is used, so that any version can be asked. One thread: the order of sums is then fixed.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

CONFIG = Path(__file__).parents[1] / "configs" / "demo.yaml"
DECODINGS = [["--decoding", kind, "--num_masks", masks] for kind in ("quadratic", "linear") for masks in ("1", "4", "8")]
SAMPLING: list[list[str]] = [[], ["--temperature", "0.8", "--top_p", "0.9", "--seed", "5"]]
FIGURES = ("token_ids", "num_steps", "accepted_per_step", "acceptance_length", "finish_reason")


def mtp(*words: str, folder: Path) -> str:
    """Run a command of the program on one thread and return what it prints."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "mtp_lightning", *words]
    return subprocess.run(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout


def training_hash(folder: Path) -> str:
    """Train 20 steps in ``folder``; a hash of the logged losses and of the trained weights."""
    options = {"max_steps": 20, "log_every_n_steps": 1, "val_check_interval": 20, "limit_val_batches": 1}
    words = [word for name, value in options.items() for word in (f"--trainer.{name}", str(value))]
    mtp("fit", "--config", str(CONFIG), *words, "--trainer.callbacks.num_prompts", "3", folder=folder)
    with (folder / "runs/demo/metrics.csv").open() as file:
        losses = [line["train/loss"] for line in csv.DictReader(file) if line.get("train/loss")]
    assert len(losses) == 20, len(losses)
    state = torch.load(folder / "runs/demo/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    digest = hashlib.sha256("\n".join(losses).encode())
    for name in sorted(state):
        digest.update(name.encode() + state[name].contiguous().numpy().tobytes())
    return digest.hexdigest()


def decoding_hash(checkpoint: str, num_prompts: int, folder: Path) -> str:
    """Decode prompts of the demo in every way; a hash of texts, steps and accepted drafts."""
    lines = []
    prompts = "package://demo/prompts.jsonl"
    for dtype in ("float64", "float32"):
        for sampling in SAMPLING:
            for decoding in DECODINGS:
                options = ["--max_new_tokens", "48", "--batch_size", "3", "--dtype", dtype, "--json", *sampling, *decoding]
                out = mtp("generate", checkpoint, "--prompts", prompts, *options, folder=folder)
                found = [json.loads(line) for line in out.splitlines()][:num_prompts]
                lines += [json.dumps({name: each.get(name) for name in FIGURES}) for each in found]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def benchmark_hash(checkpoint: str, folder: Path) -> str:
    """Run ``mtp benchmark`` with fixed numbers of masks; a hash of its acceptance lengths."""
    options = ["--num_prompts", "6", "--max_new_tokens", "48", "--speed_rounds", "0", "--dtype", "float64", "--json"]
    out = mtp("benchmark", checkpoint, "--prompts", "package://demo/prompts.jsonl", *options, folder=folder)
    return hashlib.sha256(json.dumps(_lengths(json.loads(out)), sort_keys=True).encode()).hexdigest()


def _lengths(report: object) -> object:
    """The part of a report that does not depend on the clock: every ``acceptance_length`` and ``lossless`` in it."""
    if isinstance(report, dict):
        kept = {name: _lengths(value) for name, value in report.items() if name not in ("acceptance_length", "lossless")}
        kept = {name: value for name, value in kept.items() if value not in (None, {}, [])}
        return kept | {name: report[name] for name in ("acceptance_length", "lossless") if name in report}
    if isinstance(report, list):
        return [_lengths(each) for each in report]
    return None


def main() -> None:
    """Print the hashes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", default=None, help="decode with this; default: what the 20 steps gave")
    parser.add_argument("--num_prompts", type=int, default=6)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        print(f"training  {training_hash(folder)}", flush=True)
        checkpoint = str(Path(args.checkpoint).resolve()) if args.checkpoint else "runs/demo/checkpoints/last.ckpt"
        print(f"decoding  {decoding_hash(checkpoint, args.num_prompts, folder)}", flush=True)
        print(f"benchmark {benchmark_hash(checkpoint, folder)}", flush=True)


if __name__ == "__main__":
    main()
