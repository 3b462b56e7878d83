# SPDX-License-Identifier: Apache-2.0
"""What a run of ``mtp fit`` spends its time on, measured here in a few steps."""

from __future__ import annotations

import tempfile
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import torch
import yaml
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from mtp_lightning.callbacks.decoding_callback import openings
from mtp_lightning.commands.lightning_cli import SettingsCLI
from mtp_lightning.decoding.limits import resolve_auto
from mtp_lightning.decoding.options import DecodingOptions
from mtp_lightning.evaluation.decoded_text import decode_batch
from mtp_lightning.evaluation.losslessness import autoregressive
from mtp_lightning.evaluation.reporting import note
from mtp_lightning.modeling.base_source import is_out_of_memory

MEASURED_STEPS, MEASURED_SECONDS = 8, 20.0
"""The most steps that are measured, and the time after which none begins."""
MEASURED_TOKENS = 16
"""Tokens that are decoded each way."""


class Costs(NamedTuple):
    """Seconds of what a run does."""

    step: float  # an optimizer step with its whole batch
    row: float  # a held-out row's losses
    drafted_token: float  # a token of quadratic decoding with all masks; of an untrained model, so the most that it can be
    plain_token: float  # a token of autoregressive decoding


def measured(config: dict[str, Any]) -> Costs:
    """The costs on this machine; halves the batch in the configuration until it fits in a GPU's memory."""
    while True:
        data = config["data"]
        try:
            return _measure(config)
        except Exception as error:
            if not is_out_of_memory(error) or data["batch_size"] == 1 or not torch.cuda.is_available():
                raise
            data["batch_size"] //= 2
            note(f"memory ran out: trying data.batch_size {data['batch_size']} ...")


def _measure(config: dict[str, Any]) -> Costs:
    clock, rows = _Clock(config["data"]["batch_size"]), {"max_rows": 256, "validation_fraction": 0.1}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "measured.yaml"
        path.write_text(yaml.safe_dump({**config, "data": {**config["data"], **rows}}), encoding="utf-8")
        cli = SettingsCLI(["--config", str(path)])
        kept = ("accelerator", "devices", "precision", "max_steps", "gradient_clip_val")
        trainer = Trainer(
            **{name: config["trainer"][name] for name in kept},
            callbacks=[clock],
            logger=False,
            enable_checkpointing=False,
            num_sanity_val_steps=2,  # times held-out rows
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
        )
        trainer.fit(cli.model, datamodule=cli.datamodule)
    steps, validation = ([end - begin for begin, end in pairwise(times)] for times in (clock.steps, clock.validation))
    return Costs(mean(steps[1:] or steps), validation[-1] / clock.rows, *clock.tokens)


class _Clock(Callback):
    """Times the batches of the sanity check, the steps, and at the end decoding. Of each the first is slower."""

    def __init__(self, rows: int) -> None:
        self.rows = rows  # in a batch
        self.validation: list[float] = []  # times: the beginning, and the end of each batch
        self.steps: list[float] = []
        self.tokens: list[float] = []  # seconds of a token, with drafts and without

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin with held-out rows."""
        self.validation.append(_now())

    def on_validation_batch_end(self, *_: Any) -> None:
        """Time a batch of held-out rows."""
        self.validation.append(_now())

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave out the validation that ends a run."""
        trainer.limit_val_batches = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin with steps."""
        self.steps.append(_now())

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Time a step, and show it."""
        self.steps.append(_now())
        trainer.should_stop = self.steps[-1] - self.steps[0] > MEASURED_SECONDS
        took = f"{self.steps[-1] - self.steps[-2]:.1f} s for {self.rows} row{'s' if self.rows > 1 else ''}"
        note(f"          step {trainer.global_step} of at most {MEASURED_STEPS + 1}: {took}")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Time decoding; here, because the model leaves its device right after."""
        module: Any = pl_module
        datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
        prompts = openings(datamodule.rows["train"], module.tokenizer, 1)
        # No end of the text, so that there are tokens to time.
        drafted = resolve_auto(module.model, DecodingOptions(max_new_tokens=MEASURED_TOKENS, eos_token_id=()))
        for options in (drafted, autoregressive(drafted)):
            decode_batch(module.model, prompts, replace(options, max_new_tokens=2))
            (text,), seconds = decode_batch(module.model, prompts, options)
            self.tokens.append(seconds / len(text.tokens))


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
