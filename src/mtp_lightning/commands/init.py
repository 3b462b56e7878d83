# SPDX-License-Identifier: Apache-2.0
"""``mtp init``: a configuration for ``mtp fit`` whose sizes fit the base, the data and this machine."""

from __future__ import annotations

import tempfile
import time
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml
from lightning import Trainer
from lightning.pytorch.callbacks import LambdaCallback
from transformers import AutoModelForCausalLM

from mtp_lightning.commands.lightning_cli import SettingsCLI
from mtp_lightning.data.preparing import prepare
from mtp_lightning.data.reading import open_sources
from mtp_lightning.decoding.packed_linear import has_bfloat16_products
from mtp_lightning.errors import UsageError
from mtp_lightning.evaluation.reporting import note
from mtp_lightning.files import atomic_file
from mtp_lightning.modeling.base import is_out_of_memory, load_config, load_tokenizer
from mtp_lightning.modeling.decoder import context_length
from mtp_lightning.paths import check_writable

SAMPLE_ROWS = 1000
"""Rows whose lengths are looked at."""
MEASURED_STEPS, MEASURED_SECONDS = 8, 20.0
"""The most steps that are measured, and the time after which none begins."""
VALIDATION_ROWS = 60
"""Rows to hold out, of fewer than ten times as many a tenth."""
VALIDATIONS = 5
"""Validations in a run."""
ENOUGH_STEPS = 1000
"""Steps for which a small data set is repeated, up to ``MAX_EPOCHS`` times."""
MIN_EPOCHS, MAX_EPOCHS = 3, 10
HEADER = """\
# Written by mtp init for {base_model} and {train} on {machine}.
# Train: mtp fit {output}   Resume: mtp fit {output} --ckpt_path last   All keys: mtp fit --help
"""


class Facts(NamedTuple):
    """What the sizes are chosen by."""

    parameters: int  # of the base
    context: int  # positions of the base
    has_template: bool  # True if the base has a chat template
    rows: int  # of the data
    usual_length: int  # tokens that 95 % of the rows do not exceed
    cuda: bool  # True if there is a GPU


def run_init(options: Any) -> None:
    """``mtp init --base_model M --data.train F``."""
    output, train = Path(options.output), options["data.train"]
    if output.suffix not in (".yaml", ".yml"):
        raise UsageError(f"output must be a .yaml file, got {options.output!r}.")
    if output.exists() and not options.overwrite:
        raise UsageError(f"{options.output!r} exists: choose another --output, or replace it with --overwrite.")
    check_writable(output.absolute().parent, output)
    facts = facts_of(options.base_model, options.revision, train)
    config = chosen(facts, options.base_model, options.revision, train)
    machine = torch.cuda.get_device_name() if facts.cuda else f"a CPU, {torch.get_num_threads()} threads"
    template = "chat template" if facts.has_template else "no chat template"
    note(
        f"base      {options.base_model}: {facts.parameters / 1e6:,.1f} M parameters, context {facts.context:,}, {template}"
    )
    note(f"data      {train}: {facts.rows:,} rows, 95 % of them of {facts.usual_length:,} tokens or fewer")
    note(f"machine   {machine}; measuring steps, a minute at most for a small base ...")
    seconds = measured(config)
    hours = options.hours if options.hours is not None else (12.0 if facts.cuda else 1.0)
    limit_steps(config, facts, seconds, hours)
    text = HEADER.format(base_model=options.base_model, train=train, machine=machine, output=options.output)
    with atomic_file(output) as file:
        file.write((text + yaml.safe_dump(config, sort_keys=False, width=120)).encode())
    note("\n".join(summary(config, facts, seconds, hours, options.output)))


def facts_of(base_model: str, revision: str | None, train: str) -> Facts:
    """Look at the base's configuration, the tokenizer, and a sample of the rows; no weights are read."""
    full = load_config(base_model, revision)
    context, tokenizer = context_length(full.get_text_config(decoder=True)), load_tokenizer(base_model, revision)
    with torch.device("meta"):
        parameters = AutoModelForCausalLM.from_config(full).num_parameters()
    count = sum(part.count() for parts in open_sources([train], "data.train").values() for part in parts)
    sample = prepare(train, tokenizer, max_length=context, max_rows=SAMPLE_ROWS)[0]
    note(f"data.train, a sample: {sample.report}")
    usual = int(np.quantile(sample.rows.lengths, 0.95))
    return Facts(parameters, context, bool(tokenizer.chat_template), count, usual, torch.cuda.is_available())


def chosen(facts: Facts, base_model: str, revision: str | None, train: str) -> dict[str, Any]:
    """The configuration, but for the number of steps."""
    small = facts.parameters < 1_000_000_000
    bfloat16 = facts.cuda or has_bfloat16_products()
    longest = min(facts.context, 2048 if facts.cuda else 512)
    length = min(longest, 64 * max(1, -(-facts.usual_length // 64)))
    rows = max(1, min(8, (8192 if facts.cuda and small else 1024) // length))
    losses = {name: {"class_path": "AnchorDistillation", "init_args": {"head": name}} for name in ("base", "sampler")}
    return {
        "seed_everything": 0,
        "model": {
            "base_model": base_model,
            **({"revision": revision} if revision else {}),
            "dtype": "bfloat16" if bfloat16 else "float32",
            **({} if small else {"gradient_checkpointing": True}),
            "num_masks": 8 if facts.cuda else 4,
            "lora": {"rank": 32 if small else 64 if facts.parameters < 3_000_000_000 else 128},
            "sampler_head": {
                "class_path": "GRUSamplerHead",
                "init_args": {"hidden_size": 1.0 if small else 0.5, "read_hidden": small, "normalize": True},
            },
            "losses": {**losses, "lcm": {"class_path": "LatentConsistency"}},
            "optimizer": {
                "class_path": "mtp_lightning.training.MuonAdamW",
                "init_args": {"lr": 2e-3 if small else 2e-4, "muon_lr": 1e-2 if small else 1e-3},
            },
            "lr_scheduler": {
                "class_path": "mtp_lightning.schedules.WarmupCosine",
                "init_args": {"warmup_steps": 20, "floor": 0.1},
            },
        },
        "data": {
            "train": train,
            "validation_fraction": float(f"{min(0.1, VALIDATION_ROWS / max(1, facts.rows)):.2g}"),
            "eval_max_rows": 200,
            "max_length": length,
            "batch_size": rows,
            "max_blocks_per_row": max(8, length // 8),
        },
        "trainer": {
            "accelerator": "auto",
            "devices": 1,
            "precision": "bf16-mixed" if bfloat16 else "32-true",
            "max_steps": MEASURED_STEPS + 1,
            "gradient_clip_val": 1.0,
            "check_val_every_n_epoch": None,
            "log_every_n_steps": 10,
            "default_root_dir": f"runs/{Path(base_model).name.removesuffix('.gguf')}",
            "callbacks+": _callbacks(facts),
        },
    }


def _callbacks(facts: Facts) -> list[dict[str, Any]]:
    """The best checkpoint, the last one, and the evaluation by decoding."""
    best = {"monitor": "val/forced_acceptance_length", "mode": "max", "filename": "best", "enable_version_counter": False}
    evaluation = {
        "prompts": "package://demo/chat_prompts.jsonl",
        "num_prompts": 12,
        "max_new_tokens": 96,
        "num_speed_pairs": 4,
    }
    # Steps that a CPU can afford; a GPU is measured by the paper's protocol.
    evaluation |= {} if facts.cuda else {"num_lossless": 1}
    return [
        {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": best},
        {"class_path": "mtp_lightning.callbacks.LastCheckpoint", "init_args": {"every_n_steps": 50}},
        {"class_path": "mtp_lightning.callbacks.AcceptanceEvaluation", "init_args": evaluation},
    ]


def measured(config: dict[str, Any]) -> float:
    """Seconds of a training step, the first apart; halves the batch in the configuration until it fits in a GPU's memory.

    On a CPU steps of one row are measured: their time grows with the number of rows, and a whole batch may take minutes.
    """
    while True:
        data = config["data"]
        try:
            if torch.cuda.is_available():
                return _measure(config)
            return data["batch_size"] * _measure({**config, "data": {**data, "batch_size": 1}})
        except Exception as error:
            if not is_out_of_memory(error) or data["batch_size"] == 1 or not torch.cuda.is_available():
                raise
            data["batch_size"] //= 2
            note(f"memory ran out: trying data.batch_size {data['batch_size']} ...")


def _measure(config: dict[str, Any]) -> float:
    times: list[float] = []

    def take_time(trainer: Trainer, *_: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter())
        trainer.should_stop = times[-1] - times[0] > MEASURED_SECONDS
        if trainer.global_step:
            rows = config["data"]["batch_size"]
            took = f"{times[-1] - times[-2]:.1f} s for {rows} row{'s' if rows > 1 else ''}"
            note(f"          step {trainer.global_step} of at most {MEASURED_STEPS + 1}: {took}")

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "measured.yaml"
        few = {"max_rows": 256, "validation_fraction": 0.0}
        path.write_text(yaml.safe_dump({**config, "data": {**config["data"], **few}}), encoding="utf-8")
        cli = SettingsCLI(["--config", str(path)])
        kept = ("accelerator", "devices", "precision", "max_steps", "gradient_clip_val")
        trainer = Trainer(
            **{name: config["trainer"][name] for name in kept},
            callbacks=[LambdaCallback(on_train_start=take_time, on_train_batch_end=take_time)],
            logger=False,
            enable_checkpointing=False,
            limit_val_batches=0,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
        )
        trainer.fit(cli.model, datamodule=cli.datamodule)
    seconds = [end - begin for begin, end in pairwise(times)]
    return mean(seconds[1:] or seconds)


def steps_of_epoch(config: dict[str, Any], facts: Facts) -> int:
    """Optimizer steps in which every row of the data is trained on once."""
    rows = round(facts.rows * (1 - config["data"]["validation_fraction"]))
    return max(1, -(-rows // config["data"]["batch_size"]))


def limit_steps(config: dict[str, Any], facts: Facts, seconds: float, hours: float) -> None:
    """Set steps, epochs, warm-up and the interval of validations: what comes first, enough epochs or the hours."""
    trainer, an_epoch = config["trainer"], steps_of_epoch(config, facts)
    epochs = min(MAX_EPOCHS, max(MIN_EPOCHS, -(-ENOUGH_STEPS // an_epoch)))
    steps = max(VALIDATIONS, min(an_epoch * epochs, int(hours * 3600 / seconds)))
    trainer |= {"max_steps": steps, "max_epochs": epochs, "val_check_interval": max(1, steps // VALIDATIONS)}
    config["model"]["lr_scheduler"]["init_args"]["warmup_steps"] = max(1, min(500, steps // 20))


def summary(config: dict[str, Any], facts: Facts, seconds: float, hours: float, output: str) -> list[str]:
    """What was chosen, how long it takes, and what to expect."""
    trainer, data, model = config["trainer"], config["data"], config["model"]
    steps, an_epoch = trainer["max_steps"], steps_of_epoch(config, facts)
    limited = f" (limited by --hours {hours:g})" if steps < an_epoch * trainer["max_epochs"] else ""
    masks = data["batch_size"] * data["max_blocks_per_row"] * model["num_masks"]
    return [
        f"chosen    LoRA rank {model['lora']['rank']}, {data['batch_size']} rows of up to {data['max_length']} tokens and"
        f" {masks:,} masks a step, {round(facts.rows * data['validation_fraction']):,} rows held out",
        f"time      {seconds:.1f} s a step: {steps:,} steps ({steps / an_epoch:.1f} epochs) take about"
        f" {timedelta(seconds=round(seconds * steps))} here{limited}, and {VALIDATIONS} validations in addition",
        "expect    the forced acceptance length to leave 1 within 100 steps and to rise with every validation. For"
        " orientation:\n          SmolLM2-135M had 1.53 of 3.08 after 200 steps of 512 masks",
        f"wrote {output}. Next: mtp fit {output}",
    ]
