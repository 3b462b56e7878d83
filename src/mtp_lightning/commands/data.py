# SPDX-License-Identifier: Apache-2.0
"""``mtp data``: a few rows with the role of every token, and what an optimizer step holds."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from typing import Literal

from jsonargparse import ArgumentParser
from rich.console import Console

from mtp_lightning.commands.settings_cli import SettingsCLI
from mtp_lightning.data.display import show_rows, show_steps
from mtp_lightning.errors import UsageError
from mtp_lightning.training.module import MTPModule


class DataCLI(SettingsCLI):
    """The same configuration files, of which the data and what it asks the model for are made: no weights, no trainer."""

    USAGE = "mtp data --config F [--config G ...] [--split S] [--rows N] [--steps N] [options]"

    def add_arguments_to_parser(self, parser: ArgumentParser) -> None:
        """Options of data beside the configuration."""
        super().add_arguments_to_parser(parser)
        parser.add_argument("--ckpt_path", type=str | None, default=None, help="not used; a run's config.yaml has it")
        parser.add_argument("--split", type=Literal["train", "validation", "test"], default="train", help="which data")
        parser.add_argument("--rows", type=int, default=3, help="show so many rows")
        parser.add_argument("--steps", type=int, default=10, help="count what so many optimizer steps hold")


def run_data(args: list[str]) -> None:
    """``mtp data``: show a few rows with the role of every token, and what a step holds.

    Args:
        args: options.

    Raises:
        UsageError: a number is wrong.
    """
    cli = DataCLI(args)
    config, data = cli.config, cli.datamodule
    for name in ("rows", "steps"):
        if config[name] < 1:
            raise UsageError(f"{name} must be 1 or more, got {config[name]}. Change --{name}.")
    training = config.split == "train"
    devices, nodes = config.trainer.devices, config.trainer.num_nodes
    named = isinstance(devices, list) or str(devices) in ("auto", "-1") or "," in str(devices)
    for name, value in (
        ("devices", 1 if named else int(devices) if str(devices).isdigit() else 0),
        ("num_nodes", nodes),
        ("accumulate_grad_batches", config.trainer.accumulate_grad_batches),
    ):
        if not value or value < 1:
            raise UsageError(f"trainer.{name} must be 1 or more, got {config.trainer[name]}. Change trainer.{name}.")
    world = nodes * (len(devices) if isinstance(devices, list) else int(devices) if str(devices).isdigit() else 1)
    accumulate = config.trainer.accumulate_grad_batches if training else 1
    data.trainer = _Alone(cli.model, world, accumulate)
    data.setup({"train": "fit", "validation": "validate", "test": "test"}[config.split])
    loaders = {"train": data.train_dataloader, "validation": data.val_dataloader, "test": data.test_dataloader}
    loader = loaders[config.split]()
    batches = iter(loader)
    steps = [step for _ in range(config.steps) if (step := list(islice(batches, accumulate)))]
    console = Console(highlight=False)
    show_rows([batch for step in steps for batch in step], cli.model.tokenizer, console, config.rows)
    show_steps(steps, world, -(-len(loader) // accumulate), console)


@dataclass
class _Alone:
    """What the data module asks of a trainer, as rank 0 of so many."""

    lightning_module: MTPModule
    world_size: int
    accumulate_grad_batches: int
    global_rank: int = 0
    is_global_zero: bool = True
    distributed_sampler_kwargs: dict[str, int] | None = None
    limit_train_batches: float = 1.0
    overfit_batches: float = 0.0
    current_epoch: int = 0
