# SPDX-License-Identifier: Apache-2.0
"""The one LightningCLI: which classes the YAML configures, and what differs from Lightning's defaults."""

from __future__ import annotations

import inspect
import os
import re
import sys
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, cast

from jsonargparse import ActionConfigFile  # type: ignore[attr-defined] # not in its __all__, though documented
from lightning import Callback, LightningModule, Trainer
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

import mtp_lightning.callbacks
import mtp_lightning.losses
import mtp_lightning.sampler_heads  # noqa: F401 - short class names in YAML
from mtp_lightning.callbacks import ResumeExactly, RunGuards, SaveOnSignal
from mtp_lightning.callbacks.run_guards import as_text, explain, unwritable
from mtp_lightning.callbacks.steps_progress_bar import StepsProgressBar
from mtp_lightning.callbacks.together import checkpoint_folders, run_folder
from mtp_lightning.checkpoint import check_settings, checkpoint_settings, part_settings, read_checkpoint
from mtp_lightning.checkpoint_files import newest_checkpoint, read_run_id, run_of
from mtp_lightning.commands import DecodingArguments, print_generations
from mtp_lightning.data import MTPDataModule
from mtp_lightning.errors import MTPError, RunError, UsageError, one_line
from mtp_lightning.gated_lora import LoRA
from mtp_lightning.module import MTPModule
from mtp_lightning.parser_messages import clear_message
from mtp_lightning.prompts import read_prompts
from mtp_lightning.trainer import BesideCheckpointIO, MetricsWriter
from mtp_lightning.trainer.wrong_settings import check_clock, check_nulls, check_states, not_made, wrong_setting

AnyCallback = TypeVar("AnyCallback", bound=Callback)


class ConfigurationParser(LightningArgumentParser):
    """A parser whose errors are raised for ``main`` to print as one line, without the usage text."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **{"allow_abbrev": False, **options})

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise what is wrong with the command line or the configuration."""
        known = known_keys()
        if any(action.dest == "config" for action in self._actions):  # else of a class that the configuration names
            known += [action.dest for action in self._actions if "." not in action.dest and action.dest != "help"]
        raise UsageError(clear_message(str(message), known)) from ex


GROUPS: dict[str, type] = {"model": MTPModule, "model.lora": LoRA, "data": MTPDataModule, "trainer": Trainer}
"""Classes whose arguments are keys of every configuration."""


def known_keys() -> list[str]:
    """The keys of a configuration that belong to no class named in it."""
    names = [f"{group}.{name}" for group, kind in GROUPS.items() for name in inspect.signature(kind).parameters]
    return names


class SaveConfig(SaveConfigCallback):
    """Saves the configuration of a training run, once all that it names was loaded and fits together."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Nothing yet: what a failed start or ``mtp validate`` was given must not replace a run's configuration."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save: by now Lightning has compared the trainer's limits with the data, too."""
        super().setup(trainer, pl_module, "fit")


class MTPCLI(LightningCLI):
    """LightningCLI over ``MTPModule`` and ``MTPDataModule``."""

    def __init__(self, args: list[str], **options: Any) -> None:
        super().__init__(
            MTPModule,
            MTPDataModule,
            args=args,
            seed_everything_default=0,
            trainer_defaults={"callbacks": [RunGuards(), ResumeExactly(), SaveOnSignal()]},
            auto_configure_optimizers=False,
            **{"save_config_callback": SaveConfig, "save_config_kwargs": {"overwrite": True}, **options},
        )

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Lightning's parser, with one-line errors."""
        parser = ConfigurationParser(**kwargs)
        parser.add_argument("-c", "--config", action=ActionConfigFile, help="a YAML file; give several to add to the first")
        return parser

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        """Lightning's, with a usage line instead of a page of options."""
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        parser.usage = f"mtp {subcommand} --config F [--config G ...] [--ckpt_path C] [options]"
        return parser

    def _set_seed(self) -> None:
        """Seed everything, with a one-line error."""
        seed = self._get(self.config, "seed_everything")
        if not isinstance(seed, bool) and isinstance(seed, int) and not 0 <= seed < 2**32:
            raise UsageError(f"seed_everything must be from 0 to {2**32 - 1}, got {seed}. Change seed_everything.")
        super()._set_seed()

    def before_instantiate_classes(self) -> None:
        """Refuse what no class can be made of."""
        check_nulls(self.config if self.subcommand is None else self.config[self.subcommand], GROUPS)

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Lightning's commands but predict, which is ours."""
        return {name: skipped for name, skipped in LightningCLI.subcommands().items() if name != "predict"}

    def _parse_ckpt_path(self) -> None:
        """Nothing: settings stored in a checkpoint must not override the YAML and the command line."""

    def instantiate_classes(self) -> None:
        """What the configuration names, with one line where a class of it needs a package that is not there."""
        try:
            super().instantiate_classes()
        except ValueError as error:
            missing = re.search(r"class_path '([\w.]+)': Requirement '([^']+)' not met", " ".join(str(error).split()))
            if missing is None:
                raise
            raise UsageError(
                f"{missing[1]} needs {missing[2]}, which is not installed. Run pip install '{missing[2]}', or leave it out"
                " of the configuration."
            ) from error

    def after_fit(self) -> None:
        """Say where the result lies."""
        best = [getattr(each, "best_model_path", "") for each in self.trainer.checkpoint_callbacks]
        if any(best) and self.trainer.is_global_zero:
            path = os.path.relpath(next(filter(None, best)))
            print(f"\nbest checkpoint: {path}\ntry it: mtp generate {path} --prompt TEXT", flush=True)

    def after_instantiate_classes(self) -> None:
        """Look at the checkpoint before data and weights are loaded, and keep the figures that a run has logged."""
        path, append = self._get(self.config, "ckpt_path"), self.subcommand != "fit"
        self._folder = run_folder(self.trainer)  # asked for while all processes do
        if path in ("", "best", "hpc", "registry"):  # Lightning's own words for what another command does not have
            raise UsageError(f"ckpt_path must be the path of a .ckpt file, or last, got {path!r}. Change --ckpt_path.")
        if path == "last":
            path = self._last_checkpoint()
        if path:
            checkpoint = read_checkpoint(path)
            check_settings(checkpoint, checkpoint_settings(self.model))
            check_states(path, checkpoint, self.subcommand or "")
            append = self._figures_are_its_own(checkpoint)
            for each in self.callbacks_of(ResumeExactly):
                each.run = run_of(checkpoint)
            if self.subcommand != "fit" and (loops := checkpoint.get("loops")):
                self.trainer.fit_loop.load_state_dict(loops["fit_loop"])  # figures are logged at the checkpoint's step
        elif self.subcommand == "fit":
            self._say_what_is_replaced()
        for logger in self.trainer.loggers:
            if isinstance(logger, CSVLogger):
                try:
                    logger._experiment = MetricsWriter(logger.log_dir, append)
                except OSError as error:
                    raise RunError(unwritable(Path(logger.log_dir)) or one_line(error)) from error
        if type(self.trainer.strategy.checkpoint_io) is TorchCheckpointIO:  # one that the user named stays
            self.trainer.strategy.checkpoint_io = BesideCheckpointIO()
        for guards in self.callbacks_of(RunGuards):
            guards.configuration = as_text(self.config[self.subcommand]) | {"ckpt_path": str(path)}

    def callbacks_of(self, kind: type[AnyCallback]) -> list[AnyCallback]:
        """The trainer's callbacks of a kind."""
        trainer: Any = self.trainer
        return [each for each in trainer.callbacks if isinstance(each, kind)]

    def _say_what_is_replaced(self) -> None:
        """Say so where a new run begins in the folder of an earlier one."""
        folders = dict.fromkeys(checkpoint_folders(self.trainer))
        there = [path for folder in folders for path in sorted(folder.glob("*.ckpt"))]
        if there and not getattr(self.trainer, "fast_dev_run", False):
            names = ", ".join(str(path) for path in there[:3]) + (", ..." if len(there) > 3 else "")
            self._say(
                f"checkpoints of an earlier run are there ({names}), and this one begins at step 0: its own will"
                " replace those of the same name. To go on from an earlier one stop this run and name the file with"
                " --ckpt_path."
            )

    def _figures_are_its_own(self, checkpoint: dict[str, Any]) -> bool:
        """Whether the folder's figures are added to: not where training goes on in the folder of another run."""
        owner = read_run_id(self._folder)
        if self.subcommand != "fit" or owner is None or owner == run_of(checkpoint):
            return True
        if not getattr(self.trainer, "fast_dev_run", False):
            self._say(
                f"{str(self._folder)!r} has figures of another run than the checkpoint's: metrics.csv begins"
                f" anew, after step {checkpoint['global_step']}."
            )
        return False

    def _say(self, message: str) -> None:
        """Tell the user, once for all processes."""
        if self.trainer.is_global_zero:
            print(f"mtp: {message}", file=sys.stderr)

    def _last_checkpoint(self) -> str | None:
        """The newest complete checkpoint of the run's folder, put in the place of ``last``."""
        folders = checkpoint_folders(self.trainer)
        run = read_run_id(self._folder)
        found = newest_checkpoint(folders, run, self._say)
        if found is None:
            missing = f"no complete checkpoint of this run in {str(folders[-1])!r}"
            if self.subcommand != "fit":
                raise RunError(f"{missing}. Give the path of a .ckpt file with --ckpt_path.")
            self._say(f"{missing}: training begins at step 0.")
        path = None if found is None else str(found)
        for config in (self.config, self.config_init):
            config[self.subcommand].ckpt_path = path
        return path

    def _run_subcommand(self, subcommand: str) -> None:
        """Run, with a sentence for what may happen to any long run."""
        try:
            super()._run_subcommand(subcommand)
        except MTPError:
            raise
        except Exception as error:
            known: MTPError | None = explain(error, next(iter(self.callbacks_of(RunGuards)), None), self.trainer)
            if known is None:
                known = wrong_setting(error, self._folder)
            if known is None:
                raise
            raise known from error

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The trainer, with one-line errors; where no logger is named, with CSV and TensorBoard in one folder."""
        named = self._get(self.config_init, "trainer", default={})
        if named.get("logger") in (None, True):  # Lightning's own would begin a new folder at each start
            folder = Path(named.get("default_root_dir") or ".") / "lightning_logs"
            kwargs["logger"] = [kind(folder, name="", version="") for kind in (CSVLogger, TensorBoardLogger)]
        if named.get("val_check_interval") == 0:
            raise UsageError("trainer.val_check_interval must be above 0, got 0. Change trainer.val_check_interval.")
        callbacks = named.get("callbacks") or []
        callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
        silent = named.get("enable_progress_bar") is False or named.get("barebones")
        if not silent and not any(isinstance(each, ProgressBar) for each in callbacks):
            kwargs["callbacks"] = [*callbacks, StepsProgressBar()]
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except UsageError:
            raise
        except Exception as error:
            known = not_made(error)
            if known is None:
                raise
            raise known from error
        check_clock(trainer, named.get("val_check_interval"))
        return trainer


def run_trainer(args: list[str]) -> None:
    """``mtp fit | validate | test``.

    Args:
        args: the command and its options.
    """
    MTPCLI(args)


class PredictCLI(MTPCLI):
    """The same configuration files, read for their settings alone, with the options of decoding."""

    USAGE = "mtp predict --config F [--config G ...] --ckpt_path C [--prompts P] [options]"

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """The parser, with a usage line instead of a page of options."""
        parser = super().init_parser(**kwargs)
        parser.usage = self.USAGE
        return parser

    def instantiate_classes(self) -> None:
        """The module and the data module; no weights, and no trainer, which would want the devices that are named."""
        config = self.config.clone()
        config.pop("trainer", None)  # its loggers and callbacks may need packages that only training has
        made = self.parser.instantiate_classes(config)
        self.model, self.datamodule = self._get(made, "model"), self._get(made, "data")

    def after_instantiate_classes(self) -> None:
        """Nothing: there is no trainer; decoding itself reads the checkpoint."""

    def named_parts(self, args: list[str]) -> dict[str, Any]:
        """``part_settings`` as far as the options and the configuration name them: defaults are not a user's words."""
        given = self.parser.parse_args(args, defaults=False).get("model") or {}
        own, lora = part_settings(self.model), given.get("lora") or {}
        named = {name: value for name, value in own.items() if name in given}
        return {**named, "lora": {name: value for name, value in own["lora"].items() if name in lora}}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Options of predict beside the configuration."""
        parser.add_argument("--ckpt_path", type=str, required=True, help="path of a checkpoint that mtp fit wrote")
        parser.add_argument("--weights_only", type=bool | None, default=None, help="not used; a run's config.yaml has it")
        parser.add_argument("--prompts", type=str, default=None, help="prompts file; not given: data.test")
        parser.add_argument("--json", action="store_true", help="one JSON line a prompt, which is what this command prints")
        parser.add_class_arguments(DecodingArguments, None)


def run_predict(args: list[str]) -> None:
    """``mtp predict``: decode the test prompts with a checkpoint, one JSON line a prompt.

    Args:
        args: options.

    Raises:
        UsageError: no prompts are named, or no checkpoint file.
    """
    from mtp_lightning.checkpoint import load_model

    cli = PredictCLI(args, run=False, save_config_callback=None)
    config = cli.config
    if config.ckpt_path == "last":
        raise UsageError("mtp predict needs the path of a .ckpt file, got 'last'. Change --ckpt_path.")
    arguments = DecodingArguments(**{name: config[name] for name in DecodingArguments.__dataclass_fields__})
    source = config.prompts or config.data.test
    if not isinstance(source, str) or not source:
        raise UsageError("mtp predict needs prompts: give --prompts FILE or set data.test to one file of prompts.")
    model = load_model(
        config.ckpt_path,
        arguments.base_model or config.model.base_model,
        arguments.revision or config.model.revision,
        arguments.dtype or config.model.dtype,
        arguments.chosen_device(),
        config.model.attention,
        config.model.quantization,
        named=cli.named_parts(args),
    )
    print_generations(model, read_prompts(source, model.tokenizer, context=model.context), arguments, as_json=True)


class DataCLI(PredictCLI):
    """The same configuration files, of which the data and what it asks the model for are made: no weights, no trainer."""

    USAGE = "mtp data --config F [--config G ...] [--split S] [--rows N] [--steps N] [options]"

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Options of data beside the configuration."""
        parser.add_argument("--ckpt_path", type=str | None, default=None, help="not used; a run's config.yaml has it")
        parser.add_argument("--weights_only", type=bool | None, default=None, help="not used; a run's config.yaml has it")
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
    from rich.console import Console

    from mtp_lightning.data.display import show_rows, show_steps

    cli = DataCLI(args, run=False, save_config_callback=None)
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
    data.trainer = cast("Trainer", _Alone(cli.model, world, accumulate))
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
