# SPDX-License-Identifier: Apache-2.0
"""The same configuration files for commands that do not train: read for their settings alone. No weights, no trainer."""

from __future__ import annotations

from typing import Any

from jsonargparse import ArgumentParser

from mtp_lightning.commands.lightning_cli import MTPCLI


class SettingsCLI(MTPCLI):
    """``MTPCLI`` up to the module and the data module, with the options of one command.

    Args:
        args: the options.
    """

    USAGE = ""

    def __init__(self, args: list[str]) -> None:
        super().__init__(args, run=False, save_config_callback=None)

    def init_parser(self, **kwargs: Any) -> Any:
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
        """Nothing: there is no trainer."""

    def add_arguments_to_parser(self, parser: ArgumentParser) -> None:
        """What a run's ``config.yaml`` has beside the settings."""
        parser.add_argument("--weights_only", type=bool | None, default=None, help="not used; a run's config.yaml has it")
