# SPDX-License-Identifier: Apache-2.0
"""``mtp predict``: speculative generation over the test prompts, with the configuration of the run."""

from __future__ import annotations

from pathlib import Path

from jsonargparse import ArgumentParser

from mtp_lightning.commands.arguments import DecodingArguments
from mtp_lightning.commands.generate import print_generations
from mtp_lightning.commands.lightning_cli import SettingsCLI
from mtp_lightning.errors import UsageError
from mtp_lightning.model import MTPModel
from mtp_lightning.saving.checkpoint import check_settings, checkpoint_parts, part_settings, read_checkpoint
from mtp_lightning.saving.checkpoint_files import SETTINGS
from mtp_lightning.saving.load import build_network, run_checkpoint
from mtp_lightning.text.prompt_source import check_source
from mtp_lightning.text.prompts import read_prompts


class PredictCLI(SettingsCLI):
    """The configuration files of training with the options of decoding."""

    def load_model(self, args: list[str], arguments: DecodingArguments) -> MTPModel:
        """Load the checkpoint, checked against the settings that the user named; defaults do not count."""
        checkpoint = read_checkpoint(self.config.ckpt_path)
        expected = {**checkpoint[SETTINGS], "lora": dict(checkpoint[SETTINGS]["lora"])}
        named = self.parser.parse_args(args, defaults=False).get("model") or {}
        for name, value in part_settings(self.model).items():
            if name == "lora":
                expected["lora"] |= {key: value[key] for key in value if key in (named.get("lora") or {})}
            elif name in named:
                expected[name] = value
        check_settings(checkpoint, expected, self.model.full_config)
        return build_network(
            MTPModel,
            checkpoint_parts(checkpoint, self.config.ckpt_path),
            base_model=arguments.base_model or self.config.model.base_model,
            revision=arguments.revision or self.config.model.revision,
            dtype=arguments.dtype or self.config.model.dtype,
            device=arguments.chosen_device(),
            attention=self.config.model.attention,
            quantization=self.config.model.quantization,
        )

    def add_arguments_to_parser(self, parser: ArgumentParser) -> None:
        """Options in addition to the configuration."""
        super().add_arguments_to_parser(parser)
        parser.add_argument("--ckpt_path", type=str, required=True)
        parser.add_argument("--prompts", type=str, default=None)
        parser.add_argument("--json", action="store_true")
        DecodingArguments.add_to(parser)


def run_predict(words: list[str]) -> None:
    """``mtp predict``: decode the test prompts with a checkpoint, one JSON line per prompt."""
    args = words[1:]
    cli = PredictCLI(args)
    config = cli.config
    if config.ckpt_path == "last":
        raise UsageError("--ckpt_path must be a .ckpt file or the folder of a run, got 'last'.")
    config.ckpt_path = str(run_checkpoint(Path(config.ckpt_path)) or config.ckpt_path)
    arguments = DecodingArguments.from_config(config)
    source = config.prompts or config.data.test
    if not isinstance(source, str) or not source:
        raise UsageError("mtp predict needs prompts: give --prompts FILE or set data.test to one file of prompts.")
    check_source(source)
    model = cli.load_model(args, arguments)
    prompts = read_prompts(source, model.tokenizer, context=model.context, raw=arguments.raw)
    print_generations(model, prompts, arguments, as_json=True)
