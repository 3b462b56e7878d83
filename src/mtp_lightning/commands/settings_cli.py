# SPDX-License-Identifier: Apache-2.0
"""The configuration files of training, read for their settings alone by commands that do not train."""

from __future__ import annotations

from jsonargparse import ArgumentParser

from mtp_lightning.commands.lightning_cli import MTPCLI


class SettingsCLI(MTPCLI):
    """``MTPCLI`` up to the module and the data module, with the options of one command: no weights, no trainer."""

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
        parser.add_argument("--weights_only", type=bool | None, default=None, help="not used; a run's config.yaml has it")
