# SPDX-License-Identifier: Apache-2.0
"""Training runs that are compared with each other: a row of figures a run, appended to a file of JSON lines.

A run is ``mtp fit`` of a configuration with a few options of the command line. A run that has its row is not repeated.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning import Callback, LightningModule, Trainer

from mtp_lightning.commands.lightning_cli import MTPCLI
from mtp_lightning.decoding.options import DecodingOptions
from mtp_lightning.evaluation.acceptance import evaluate_prompts, summarise
from mtp_lightning.text.prompts import read_prompts

QUIET = """{
  logger: false, enable_checkpointing: false, enable_progress_bar: false, enable_model_summary: false,
  num_sanity_val_steps: 0, default_root_dir: runs/recipe_runs, precision: 32-true,
  callbacks: [{class_path: recipe_runs.Recorder}]
}"""

ADAMW = "{class_path: torch.optim.AdamW, init_args: {lr: 0.003, betas: [0.9, 0.98], weight_decay: 0.01}}"
"""The optimizer of runs whose options name none."""


class Run(NamedTuple):
    """One training run."""

    name: str  # what the rows of all its seeds share
    seed: int
    steps: int  # optimizer steps
    options: tuple[str, ...]  # words for ``mtp fit``, after the configuration
    validations: int = 1  # evenly spaced, the last at the end


class Recorder(Callback):
    """Counts positions and CPU seconds of training, without its validations, and keeps what each validation found."""

    def __init__(self) -> None:
        self.ntp = self.mtp = 0  # positions computed, with padding
        self.seconds = 0.0  # CPU time of this process, all threads
        self.history: list[dict[str, float]] = []
        self._began = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._began = time.process_time()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count a batch."""
        self.ntp += batch.input_ids.numel()
        self.mtp += batch.mtp_labels.numel()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock."""
        self.seconds += time.process_time() - self._began

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the figures and restart it."""
        figures = {name.removeprefix("val/"): v.item() for name, v in trainer.callback_metrics.items() if "val/" in name}
        self.history.append({"step": trainer.global_step, "cpu_seconds": round(self.seconds, 1), **figures})
        self._began = time.process_time()


def train(config: str, run: Run) -> tuple[Any, dict[str, Any]]:
    """The trained module and the row so far."""
    words = ["fit", "--config", config, f"--trainer={QUIET}", f"--trainer.max_steps={run.steps}", "--overwrite"]
    words += [f"--trainer.val_check_interval={max(1, run.steps // run.validations)}"]
    words += [f"--seed_everything={run.seed}", f"--data.seed={run.seed}"]
    words += [f"--model.optimizer={ADAMW}", *run.options]
    cli = MTPCLI(words)
    (recorder,) = cli.callbacks_of(Recorder)
    row = {
        "name": run.name,
        "seed": run.seed,
        "steps": run.steps,
        "options": list(run.options),
        "ntp_positions": recorder.ntp,
        "mtp_positions": recorder.mtp,
        "cpu_seconds": round(recorder.seconds, 1),
        "threads": torch.get_num_threads(),
        "commit": commit(),
        "trained_parameters": sum(p.numel() for _, p in cli.model.model.trained_parameters()),
        "history": [{name: round(value, 5) for name, value in each.items()} for each in recorder.history],
    }
    return cli.model, row


def commit() -> str:
    """The checked-out commit, or an empty string."""
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return found.stdout.strip()


def decoded(module: Any, source: str, count: int, **options: Any) -> dict[str, Any]:
    """Acceptance of decoding held-out prompts with all masks, unless the options say otherwise."""
    model = module.model.eval()
    settings = DecodingOptions(**{"num_masks": module.num_masks, "draft_candidates": "all", **options})
    summary = summarise(evaluate_prompts(model, read_prompts(source, module.tokenizer, count), settings))
    overall = summary["overall"]
    return {
        "acceptance_length": round(overall["acceptance_length"], 4),
        "not_repeating": overall["non_repeating"],
        "domains": {name: round(figures["acceptance_length"], 4) for name, figures in summary["domains"].items()},
    }


def run_all(path: Path, runs: Iterable[Run], measure: Callable[[Run], dict[str, Any]]) -> list[dict[str, Any]]:
    """Run what has no row in the file yet, and append its row; all rows of these runs, in their order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    wanted, rows = list(runs), {key(row): row for row in read_rows(path)}
    for number, run in enumerate(wanted, 1):
        if key(run._asdict()) in rows:
            continue
        print(f"[{number} of {len(wanted)}] {run.name}, seed {run.seed}, {run.steps} steps", file=sys.stderr, flush=True)
        row = measure(run)
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        rows[key(row)] = row
    return [rows[key(run._asdict())] for run in wanted]


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    """What identifies a run in its file."""
    return row["name"], row["seed"], row["steps"], tuple(row["options"])


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file, none if it is missing."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation (of the sample; 0 for one value)."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0
