# SPDX-License-Identifier: Apache-2.0
"""Hashes of what a change that should alter no number must leave as it is: run before and after, and compare.

``python benchmarks/same_bits.py`` prints three hashes: of losses and final weights of 20 seeded steps of the demo; of
texts, steps and accepted drafts with fixed numbers of masks, quadratic and linear, greedy and sampled, in float64 and
float32; and of the acceptance lengths of ``mtp benchmark``. ``--checkpoint FILE`` decodes with a trained checkpoint, so
that both trees use the same weights and some drafts are right. Only the program's command line is used, so that any version
can be asked. One thread, since the order of sums depends on their number.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import hashlib
import io
import json
import os
import runpy
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
CONFIG, PROMPTS = ROOT / "configs" / "demo.yaml", ROOT / "src" / "mtp_lightning" / "demo" / "prompts.jsonl"
DECODINGS = [["--decoding", kind, "--num_masks", masks] for kind in ("quadratic", "linear") for masks in ("1", "4", "8")]
SAMPLING: list[list[str]] = [[], ["--temperature", "0.8", "--top_p", "0.9", "--seed", "5"]]
FIGURES = ("token_ids", "num_steps", "accepted_per_step", "acceptance_length", "finish_reason")


def mtp(*words: str) -> str:
    """Run a command of the program in this process and return what it prints."""
    printed, arguments = io.StringIO(), sys.argv
    sys.argv = ["mtp", *words]
    try:
        with contextlib.redirect_stdout(printed):
            runpy.run_module("mtp_lightning", run_name="__main__")
    finally:
        sys.argv = arguments
    return printed.getvalue()


def training_hash(folder: Path) -> str:
    """Train 20 steps in ``folder``; a hash of the logged losses and of the trained weights."""
    options = {"max_steps": 20, "log_every_n_steps": 1, "val_check_interval": 20, "limit_val_batches": 1}
    words = [word for name, value in options.items() for word in (f"--trainer.{name}", str(value))]
    mtp("fit", "--config", str(CONFIG), *words, "--trainer.callbacks.num_prompts", "3")
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
    rows = PROMPTS.read_text(encoding="utf-8").splitlines(keepends=True)
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(rows[:: len(rows) // num_prompts][:num_prompts]), encoding="utf-8")  # of every domain
    for dtype in ("float64", "float32"):
        for sampling in SAMPLING:
            for decoding in DECODINGS:
                options = ["--max_new_tokens", "48", "--batch_size", "3", "--dtype", dtype, "--json", *sampling, *decoding]
                out = mtp("generate", checkpoint, "--prompts", str(prompts), *options)
                found = [json.loads(line) for line in out.splitlines()]
                lines += [json.dumps({name: each.get(name) for name in FIGURES}) for each in found]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def benchmark_hash(checkpoint: str) -> str:
    """Run ``mtp benchmark`` with fixed numbers of masks; a hash of its acceptance lengths."""
    options = ["--num_prompts", "6", "--max_new_tokens", "48", "--dtype", "float64", "--json", "--grid"]
    out = mtp("benchmark", checkpoint, "--prompts", str(PROMPTS), "--output", "benchmark", "--overwrite", *options)
    settings = [each for each in json.loads(out)["settings"] if isinstance(each["num_masks"], int)]
    return hashlib.sha256(json.dumps(_lengths(settings), sort_keys=True).encode()).hexdigest()


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
    given = args.checkpoint and str(Path(args.checkpoint).resolve())
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.chdir(folder)
        print(f"training  {training_hash(folder)}", flush=True)
        checkpoint = given or "runs/demo/checkpoints/last.ckpt"
        print(f"decoding  {decoding_hash(checkpoint, args.num_prompts, folder)}", flush=True)
        print(f"benchmark {benchmark_hash(checkpoint)}", flush=True)


if __name__ == "__main__":
    main()
