# SPDX-License-Identifier: Apache-2.0
"""The one LightningCLI: which classes the YAML configures, and what differs from Lightning's defaults."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, TypeVar

import lightning
import peft
import torch
import transformers
import yaml
from jsonargparse import ActionConfigFile, ArgumentParser  # type: ignore[attr-defined] # documented, not in its __all__
from lightning import Callback, LightningModule, Trainer
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

import mtp_lightning
from mtp_lightning import callbacks, losses, sampler_heads  # short class names in YAML
from mtp_lightning.callbacks import ResumeExactly, RunGuards, SaveOnSignal
from mtp_lightning.callbacks.run_guards import as_text, check_monitors
from mtp_lightning.callbacks.run_summary import RunSummary
from mtp_lightning.callbacks.steps_progress_bar import StepsProgressBar
from mtp_lightning.commands.parser import CommandParser
from mtp_lightning.commands.settings import CLASSES, keys_of, with_full_key
from mtp_lightning.data import MTPDataModule
from mtp_lightning.errors import MTPError, RunError, UsageError, one_line
from mtp_lightning.evaluation.reporting import note
from mtp_lightning.evaluation.run_comparison import flat_settings
from mtp_lightning.modeling.base_source import is_out_of_memory
from mtp_lightning.paths import check_writable
from mtp_lightning.saving.checkpoint import check_settings, checkpoint_settings, read_checkpoint
from mtp_lightning.saving.checkpoint_files import run_of
from mtp_lightning.saving.load import run_checkpoint
from mtp_lightning.trainer import AtomicCheckpointIO, MetricsWriter
from mtp_lightning.trainer.earlier_run import (
    appends_metrics,
    check_folder_is_free,
    check_same_settings,
    last_checkpoint,
    results_of_run,
)
from mtp_lightning.trainer.run_errors import quiet_full_disks, run_error, unwritable_message
from mtp_lightning.trainer.wrong_settings import (
    check_training_state,
    check_validation_interval,
    setting_error,
    trainer_error,
)
from mtp_lightning.training.distributed import run_folder
from mtp_lightning.training.lightning_private import set_csv_writer
from mtp_lightning.training.module import MTPModule

AnyCallback = TypeVar("AnyCallback", bound=Callback)


LOGGED = ("seed_everything", "model", "data", "trainer")
"""The parts of a configuration that are logged, without loggers and callbacks."""
CLASS_NAMES = [*losses.__all__, *callbacks.__all__, *(name for name in vars(sampler_heads) if name.endswith("Head"))]
"""Names of this package's classes, one of which may have been misspelled."""


class ConfigurationParser(CommandParser, LightningArgumentParser):
    """Lightning's parser, with one-line errors."""


class SaveConfig(SaveConfigCallback):
    """Saves the configuration once training starts: a failed start does not replace that of an earlier run."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Nothing: here the trainer's limits have not been compared with the data, and ``mtp validate`` calls it too."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save; first delete the run that is in the folder, if ``overwrite`` says so."""
        if self.config.pop("overwrite", False):
            paths = results_of_run(trainer, run_folder(trainer))
            for path in paths if trainer.is_global_zero else ():
                path.unlink(missing_ok=True)
        super().setup(trainer, pl_module, "fit")
        for logger in trainer.loggers:
            logger.log_hyperparams(logged_settings(self.config))


def logged_settings(config: Any) -> dict[str, Any]:
    """``model.lora.rank: 32, ...`` of a parsed configuration, as loggers take them; other values are written as text."""
    parts = {name: value for name, value in config.as_dict().items() if name in LOGGED}
    settings = flat_settings(parts, without=("trainer.logger", "trainer.callbacks"))
    return {name: value if isinstance(value, bool | int | float | str) else str(value) for name, value in settings.items()}


def with_own_loggers(loggers: list[Any], folder: Any) -> list[Any]:
    """The given loggers after the run's own; the first one's folder is the run's: ``default_root_dir`` where that is set.

    Its own are CSV and TensorBoard loggers, unless one of them is given. Without ``default_root_dir`` the folder is
    ``lightning_logs``: Lightning itself takes a new one at each start.
    """
    given = [logger for logger in loggers if isinstance(logger, CSVLogger | TensorBoardLogger)]
    if given and not folder:
        return loggers
    there = [logger for logger in given if os.path.abspath(logger.log_dir) == os.path.abspath(folder)]
    if there:
        return there + [logger for logger in loggers if logger not in there]
    kinds = [CSVLogger] if given else [CSVLogger, TensorBoardLogger]
    return [*(kind(Path(folder or "lightning_logs"), name="", version="") for kind in kinds), *loggers]


class MTPCLI(LightningCLI):
    """LightningCLI over ``MTPModule`` and ``MTPDataModule``."""

    def __init__(self, args: list[str], **kwargs: Any) -> None:
        super().__init__(
            MTPModule,
            MTPDataModule,
            args=args,
            seed_everything_default=0,
            trainer_defaults={
                "callbacks": [RunGuards(), ResumeExactly(), SaveOnSignal(), RunSummary()],
                "enable_model_summary": False,  # RunSummary says it in fewer lines
            },
            auto_configure_optimizers=False,
            **{"save_config_callback": SaveConfig, "save_config_kwargs": {"overwrite": True}, **kwargs},
        )

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """A parser with one-line errors; help is in ``settings.py``."""
        # Comments at the head of a run's config.yaml.
        packages = (mtp_lightning, torch, transformers, peft, lightning)
        header = [f"{package.__name__}=={package.__version__}" for package in packages]
        parser = ConfigurationParser(**{"dump_header": header, **kwargs})
        parser.add_argument("-c", "--config", action=ActionConfigFile)
        return parser

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Lightning's; an error about a class names the key that it is given at."""
        try:
            super().parse_arguments(parser, args)
        except UsageError as error:
            raise UsageError(with_full_key(str(error), args, CLASS_NAMES)) from error

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        """Lightning's, with our options."""
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand == "fit":
            parser.add_argument("--overwrite", action="store_true")
        return parser

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Lightning's subcommands without predict, which is a command of its own."""
        return {name: skipped for name, skipped in LightningCLI.subcommands().items() if name != "predict"}

    def _parse_ckpt_path(self) -> None:
        """Nothing: settings stored in a checkpoint must not override the YAML and the command line."""

    def _set_seed(self) -> None:
        """Lightning's; an error names the key."""
        try:
            super()._set_seed()
        except ValueError as error:
            raise UsageError(f"seed_everything: {one_line(error)}.") from error

    def before_instantiate_classes(self) -> None:
        """Refuse a folder that can't be written, and ``null`` where a class needs a value: the parser accepts it."""
        config = self.config if self.subcommand is None else self.config[self.subcommand]
        if self.subcommand == "fit" and (folder := config.get("trainer.default_root_dir")) and "://" not in str(folder):
            check_writable(Path(folder), f"trainer.default_root_dir {folder}")
        for group in set(CLASSES) - {"trainer"}:  # Lightning checks its own
            for name, key in keys_of(group).items():
                if config.get(f"{group}.{name}", 0) is None and "None" not in key.kind:
                    raise UsageError(f"{group}.{name} must have a value, got null. Change it or leave it out.")

    def instantiate_classes(self) -> None:
        """Lightning's, with a one-line error if a class needs a package that is not installed."""
        try:
            super().instantiate_classes()
        except ValueError as error:
            missing = re.search(r"class_path '([\w.]+)': Requirement '([^']+)' not met", " ".join(str(error).split()))
            if missing is None:
                raise
            raise UsageError(f"{missing[1]} needs {missing[2]}, which is not installed.") from error

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The trainer, with one-line errors and the run's own loggers."""
        given = self._get(self.config_init, "trainer", default={})
        loggers = given.get("logger")
        loggers = [] if loggers in (None, True) else loggers if isinstance(loggers, list) else [loggers]
        if False not in loggers:
            kwargs["logger"] = with_own_loggers(loggers, given.get("default_root_dir"))
        if given.get("val_check_interval") == 0:
            raise UsageError("trainer.val_check_interval must be above 0, got 0.")
        # Below 0 it would reverse the gradient; NaN is refused too.
        if (clip := given.get("gradient_clip_val")) is not None and not clip >= 0:
            raise UsageError(f"trainer.gradient_clip_val must be 0 or more, or null, got {clip}.")
        callbacks = given.get("callbacks") or []
        callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
        silent = given.get("enable_progress_bar") is False or given.get("barebones")
        if not silent and not any(isinstance(callback, ProgressBar) for callback in callbacks):
            kwargs["callbacks"] = [*callbacks, StepsProgressBar()]
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except UsageError:
            raise
        except Exception as error:
            if (known := trainer_error(error)) is None:
                raise
            raise known from error
        check_validation_interval(trainer, given.get("val_check_interval"))
        return trainer

    def after_instantiate_classes(self) -> None:
        """Check the checkpoint before data and weights are loaded, and prepare what the run writes."""
        self._run_folder = run_folder(self.trainer)  # a collective call, made by all processes
        asked, path, append = self._get(self.config, "ckpt_path"), self._checkpoint_path(), self.subcommand != "fit"
        if self.subcommand == "fit":
            check_monitors(self.trainer, self.model)
        if path:
            append = self._check_checkpoint(path)
            self.model.init_from = None  # the checkpoint's weights would replace those
        elif self.subcommand == "fit" and asked is None and not self._get(self.config, "overwrite"):
            check_folder_is_free(self.trainer, self._run_folder)
        if self.subcommand != "fit" and not getattr(self.trainer, "fast_dev_run", False):
            self._keep_results_apart()
        for logger in self.trainer.loggers:
            if isinstance(logger, CSVLogger):
                try:
                    set_csv_writer(logger, MetricsWriter(logger.log_dir, append))
                except OSError as error:
                    raise RunError(unwritable_message(Path(logger.log_dir)) or one_line(error)) from error
        if type(self.trainer.strategy.checkpoint_io) is TorchCheckpointIO:  # Lightning's default, not one that a user named
            self.trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        for guards in self.callbacks_of(RunGuards):
            guards.configuration = as_text(self.config[self.subcommand]) | {"ckpt_path": str(path)}

    def _keep_results_apart(self) -> None:
        """Write what ``mtp validate`` or ``mtp test`` measures to a folder below the run's, whose files stay as they are."""
        others = [logger for logger in self.trainer.loggers if not isinstance(logger, CSVLogger | TensorBoardLogger)]
        self.trainer.loggers = [CSVLogger(self._run_folder / str(self.subcommand), name="", version=""), *others]

    def _checkpoint_path(self) -> str | None:
        """``ckpt_path``, with ``last`` and, but in ``fit``, a folder or nothing replaced by the file that it stands for."""
        path: str | None = self._get(self.config, "ckpt_path")
        may_begin = path == "auto" and self.subcommand == "fit"
        if path in ("", "best", "hpc", "registry"):  # Lightning's words, which need a trainer that has trained
            words = "last or auto" if self.subcommand == "fit" else "the folder of a run, or last"
            raise UsageError(f"ckpt_path must be the path of a .ckpt file, {words}, got {path!r}.")
        if path == "last" or may_begin:
            path = last_checkpoint(self.trainer, self._run_folder, may_begin)
        elif self.subcommand != "fit":
            path = self._evaluated(path)
        for config in (self.config, self.config_init):
            config[self.subcommand].ckpt_path = path
        return path

    def _evaluated(self, path: str | None) -> str | None:
        """The checkpoint to evaluate: a file as it is, of a run's folder the best; by default of the configuration's run.

        None if that has no checkpoint and the configuration names other weights (``model.init_from``), or with
        ``fast_dev_run``; otherwise a UsageError: an untrained model has no figures.
        """
        if path is not None:
            return str(run_checkpoint(Path(path)) or path)
        try:
            best = run_checkpoint(self._run_folder)
        except RunError:  # a run without a checkpoint yet
            best = None
        if best is None and self.model.init_from is None and not getattr(self.trainer, "fast_dev_run", False):
            folder = str(self._run_folder / "checkpoints")
            raise UsageError(
                f"--ckpt_path is needed: no checkpoint is in {folder!r}. Give a .ckpt file or the folder of a run, or set"
                " model.init_from to a saved adapter."
            )
        if self.trainer.is_global_zero:
            note(f"weights   {best or self.model.init_from or 'untrained'}")
        return None if best is None else str(best)

    def _check_checkpoint(self, path: str) -> bool:
        """Refuse a checkpoint that does not fit; returns whether metrics.csv is continued."""
        checkpoint = read_checkpoint(path)
        check_settings(checkpoint, checkpoint_settings(self.model), self.model.full_config)
        check_training_state(path, checkpoint, self.subcommand or "")
        for callback in self.callbacks_of(ResumeExactly):
            callback.run = run_of(checkpoint)
        if self.subcommand == "fit":
            overwrite = bool(self._get(self.config, "overwrite"))
            appends = appends_metrics(self.trainer, self._run_folder, path, checkpoint, overwrite)
            folder = self._run_folder if appends else None
            check_same_settings(self.trainer, folder, path, checkpoint, self._settings())
            return appends
        if loops := checkpoint.get("loops"):
            self.trainer.fit_loop.load_state_dict(loops["fit_loop"])  # figures are logged at the checkpoint's step
        return True

    def _settings(self) -> dict[str, Any]:
        """The configuration of ``mtp fit``, as it is saved."""
        return dict(yaml.safe_load(self._parser("fit").dump(self.config.fit, skip_none=False)))

    def callbacks_of(self, callback_class: type[AnyCallback]) -> list[AnyCallback]:
        """The trainer's callbacks of a class."""
        trainer: Any = self.trainer
        return [callback for callback in trainer.callbacks if isinstance(callback, callback_class)]

    def _run_subcommand(self, subcommand: str) -> None:
        """Run, with a one-line error for what may happen to any long run."""
        try:
            super()._run_subcommand(subcommand)
        except MTPError:
            raise
        except Exception as error:
            if is_out_of_memory(error):
                guards = next(iter(self.callbacks_of(RunGuards)), RunGuards())
                raise RunError(guards.out_of_memory(self.trainer, one_line(error, 200))) from error
            known: MTPError | None = run_error(error, resumes=subcommand == "fit") or setting_error(error, self._run_folder)
            if known is None:
                raise
            raise known from error
        if subcommand != "fit" and self.trainer.is_global_zero and not getattr(self.trainer, "fast_dev_run", False):
            note(f"results: {self._run_folder / subcommand}")


class SettingsCLI(MTPCLI):
    """``MTPCLI`` up to the module and the data module, for a command that does not train: no weights, no trainer."""

    def __init__(self, args: list[str]) -> None:
        super().__init__(args, run=False, save_config_callback=None)

    def instantiate_classes(self) -> None:
        """Build the module and the data module; a trainer would want the devices that are named."""
        config = self.config.clone()
        config.pop("trainer", None)  # its loggers and callbacks may need packages that only training has
        instances = self.parser.instantiate_classes(config)
        self.model, self.datamodule = self._get(instances, "model"), self._get(instances, "data")

    def after_instantiate_classes(self) -> None:
        """Nothing: there is no trainer."""

    def add_arguments_to_parser(self, parser: ArgumentParser) -> None:
        """Keys of a run's ``config.yaml`` in addition to the settings."""
        parser.add_argument("--weights_only", type=bool | None, default=None)


def run_trainer(words: list[str]) -> None:
    """``mtp fit | validate | test``, with the command as the first word."""
    quiet_full_disks()
    MTPCLI(words)
