# SPDX-License-Identifier: Apache-2.0
"""The one LightningCLI: which classes the YAML configures, and what differs from Lightning's defaults."""

from __future__ import annotations

from typing import Any, NoReturn

from jsonargparse import ActionConfigFile  # type: ignore[attr-defined] # not in its __all__, though documented
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

import mtp_lightning.callbacks
import mtp_lightning.losses
import mtp_lightning.sampler_heads  # noqa: F401 - short class names in YAML
from mtp_lightning.checkpoint import read_checkpoint
from mtp_lightning.commands import DecodingArguments, print_generations
from mtp_lightning.data import MTPDataModule
from mtp_lightning.errors import UsageError
from mtp_lightning.module import MTPModule
from mtp_lightning.prompts import read_prompts


class OneLineParser(LightningArgumentParser):
    """A parser whose errors are raised for ``main`` to print as one line, without the usage text."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise what is wrong with the command line or the configuration."""
        raise UsageError(" ".join(str(message).split())) from ex


class MTPCLI(LightningCLI):
    """LightningCLI over ``MTPModule`` and ``MTPDataModule``."""

    def __init__(self, args: list[str], **options: Any) -> None:
        super().__init__(
            MTPModule,
            MTPDataModule,
            args=args,
            seed_everything_default=0,
            auto_configure_optimizers=False,
            save_config_kwargs={"overwrite": True},
            **options,
        )

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Lightning's parser, with one-line errors."""
        parser = OneLineParser(**kwargs)
        parser.add_argument("-c", "--config", action=ActionConfigFile, help="a YAML file; give several to add to the first")
        return parser

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Lightning's commands but predict, which is ours."""
        return {name: skipped for name, skipped in LightningCLI.subcommands().items() if name != "predict"}

    def _parse_ckpt_path(self) -> None:
        """Nothing: settings stored in a checkpoint must not override the YAML and the command line."""

    def before_instantiate_classes(self) -> None:
        """Look at the checkpoint before anything is loaded."""
        config = self.config.get(self.config.get("subcommand"), self.config)
        path = config.get("ckpt_path")
        if path and path not in ("best", "last", "hpc", "registry"):
            read_checkpoint(path)


def run_trainer(args: list[str]) -> None:
    """``mtp fit | validate | test``.

    Args:
        args: the command and its options.
    """
    MTPCLI(args)


class PredictCLI(MTPCLI):
    """The same configuration files, read for their settings alone, with the options of decoding."""

    def instantiate_classes(self) -> None:
        """Nothing: no trainer and no data module take part in decoding."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Options of predict beside the configuration."""
        parser.add_argument("--ckpt_path", type=str, required=True, help="checkpoint that mtp fit wrote")
        parser.add_argument("--prompts", type=str | None, default=None, help="prompts file; not given: data.test")
        parser.add_class_arguments(DecodingArguments, None)


def run_predict(args: list[str]) -> None:
    """``mtp predict``: decode the test prompts with a checkpoint, one JSON line a prompt.

    Args:
        args: options.

    Raises:
        UsageError: no prompts are named.
    """
    from mtp_lightning.checkpoint import load_model

    cli = PredictCLI(args, run=False, save_config_callback=None)
    config = cli.config
    arguments = DecodingArguments(**{name: config[name] for name in DecodingArguments.__dataclass_fields__})
    source = config.prompts or config.data.test
    if not isinstance(source, str):
        raise UsageError("mtp predict needs prompts: give --prompts FILE or set data.test to one file of prompts.")
    model = load_model(
        config.ckpt_path,
        arguments.base_model or config.model.base_model,
        arguments.revision or config.model.revision,
        arguments.dtype or config.model.dtype,
        arguments.device,
    )
    print_generations(model, read_prompts(source, model.tokenizer), arguments, as_json=True)
