# SPDX-License-Identifier: Apache-2.0
"""``mtp predict``: speculative generation over the test prompts, with the configuration of the run."""

from __future__ import annotations

from typing import Any

from jsonargparse import ArgumentParser

from mtp_lightning.commands.arguments import DecodingArguments
from mtp_lightning.commands.generate import print_generations
from mtp_lightning.commands.settings_cli import SettingsCLI
from mtp_lightning.errors import UsageError
from mtp_lightning.model import MTPModel
from mtp_lightning.saving.checkpoint import load_model, part_settings
from mtp_lightning.text.prompts import read_prompts


class PredictCLI(SettingsCLI):
    """The same configuration files, read for their settings alone, with the options of decoding."""

    USAGE = "mtp predict --config F [--config G ...] --ckpt_path C [--prompts P] [options]"

    def named_parts(self, args: list[str]) -> dict[str, Any]:
        """``part_settings`` as far as the options and the configuration name them: defaults are not a user's words."""
        given = self.parser.parse_args(args, defaults=False).get("model") or {}
        own, lora = part_settings(self.model), given.get("lora") or {}
        named = {name: value for name, value in own.items() if name in given}
        return {**named, "lora": {name: value for name, value in own["lora"].items() if name in lora}}

    def add_arguments_to_parser(self, parser: ArgumentParser) -> None:
        """Options of predict beside the configuration."""
        super().add_arguments_to_parser(parser)
        parser.add_argument("--ckpt_path", type=str, required=True, help="path of a checkpoint that mtp fit wrote")
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
    cli = PredictCLI(args)
    config = cli.config
    if config.ckpt_path == "last":
        raise UsageError("mtp predict needs the path of a .ckpt file, got 'last'. Change --ckpt_path.")
    arguments = DecodingArguments(**{name: config[name] for name in DecodingArguments.__dataclass_fields__})
    source = config.prompts or config.data.test
    if not isinstance(source, str) or not source:
        raise UsageError("mtp predict needs prompts: give --prompts FILE or set data.test to one file of prompts.")
    model = load_model(
        MTPModel,
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
