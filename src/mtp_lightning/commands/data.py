# SPDX-License-Identifier: Apache-2.0
"""``mtp data``: a few rows with the role of every token, what became of all rows, and what an optimizer step holds."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from typing import Literal

from jsonargparse import ArgumentParser
from jsonargparse.typing import PositiveInt
from rich.console import Console

from mtp_lightning.commands.lightning_cli import SettingsCLI
from mtp_lightning.data.display import show_rows, show_steps
from mtp_lightning.data.preparing import Report
from mtp_lightning.training.module import MTPModule


class DataCLI(SettingsCLI):
    """The configuration files of training with the options of this command."""

    def add_arguments_to_parser(self, parser: ArgumentParser) -> None:
        """Options in addition to the configuration."""
        super().add_arguments_to_parser(parser)
        parser.add_argument("--ckpt_path", type=str | None, default=None)
        parser.add_argument("--split", type=Literal["train", "validation", "test"], default="train")
        parser.add_argument("--rows", type=PositiveInt, default=3)
        parser.add_argument("--steps", type=PositiveInt, default=10)


def run_data(words: list[str]) -> None:
    """``mtp data``: show a few rows with the role of every token, what became of all rows, and what a step holds."""
    cli = DataCLI(words[1:])
    config, data = cli.config, cli.datamodule
    accumulate = config.trainer.accumulate_grad_batches if config.split == "train" else 1
    world_size = config.trainer.num_nodes * _num_devices(config.trainer.devices)
    data.trainer = _TrainerStub(cli.model, world_size, accumulate)
    data.setup({"train": "fit", "validation": "validate", "test": "test"}[config.split])
    loaders = {"train": data.train_dataloader, "validation": data.val_dataloader, "test": data.test_dataloader}
    loader = loaders[config.split]()
    batches = iter(loader)
    steps = [step for _ in range(config.steps) if (step := list(islice(batches, accumulate)))]
    console = Console(highlight=False)
    show_rows([batch for step in steps for batch in step], cli.model.tokenizer, console, config.rows)
    report = Report(**data.report[config.split])  # of a stream: what became of the rows read up to here
    console.print(f"\ndata.{config.split}: {report}", markup=False, soft_wrap=not console.is_terminal)
    show_steps(steps, world_size, -(-len(loader) // accumulate), console)


def _num_devices(devices: int | str | list[int]) -> int:
    """Number of processes of a node; of ``auto``, which asks the machine that trains, 1."""
    if isinstance(devices, list):
        return len(devices)
    return int(devices) if str(devices).isdigit() else 1


@dataclass
class _TrainerStub:
    """What the data module reads of a trainer, for rank 0."""

    lightning_module: MTPModule
    world_size: int
    accumulate_grad_batches: int
    global_rank: int = 0
    is_global_zero: bool = False  # the report is printed here, below the rows
    distributed_sampler_kwargs: dict[str, int] | None = None
    limit_train_batches: float = 1.0
    overfit_batches: float = 0.0
    current_epoch: int = 0
