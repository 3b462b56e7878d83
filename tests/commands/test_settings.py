# SPDX-License-Identifier: Apache-2.0
"""The keys read from the source of classes are those of the parser, and nothing heavy is imported for help or a typo."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from command_line import error_of, mtp

from mtp_lightning.commands import settings
from mtp_lightning.commands.lightning_cli import MTPCLI
from mtp_lightning.errors import UsageError


@pytest.mark.parametrize("command", ["fit", "validate", "test"])
def test_the_keys_are_those_of_the_parser(command: str) -> None:
    class Stopped(Exception):
        """The parser is made."""

    class OnlyParser(MTPCLI):
        """Stops where the parser is made."""

        def parse_arguments(self, parser: object, args: object) -> None:
            """Keep the parser."""
            raise Stopped(self._parser(command))

    with pytest.raises(Stopped) as stopped:
        OnlyParser([command])
    names = {name for action in stopped.value.args[0]._actions for name in action.option_strings}
    found = {name.lstrip("-").removesuffix(".help").removesuffix("+") for name in names if name.startswith("--")}
    groups = {f"{group}.{key}" for group in settings.CLASSES for key in settings.keys_of(group)}
    assert found - set(settings.CLASSES) == (groups | {*settings.COMMON, *settings.OPTIONS[command]}) - {"model.lora"}


def test_help_and_typos_import_nothing_heavy() -> None:
    code = """
import sys
from mtp_lightning.commands.cli import main
for line in ("fit --help", "data --help", "chat --help", "distill --help", "serve --help", "fit --data.train_file x"):
    words = line.split()
    try:
        main(words)
    except SystemExit as end:
        assert (end.code or 0) == 2 * (words[-1] == "x"), (words, end.code)
    assert not {"torch", "transformers", "lightning", "datasets"} & set(sys.modules), words
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_typo_is_named_with_the_nearest_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    for words, near in (
        (["--model.num_mask", "3"], "--model.num_masks"),
        (["--trainer.maxsteps=3"], "--trainer.max_steps"),
        (["--model.lora.rnk", "3"], "--model.lora.rank"),
        (["--ckptpath", "last"], "--ckpt_path"),
    ):
        message = error_of(capsys, 2, "fit", *words)
        assert words[0].partition("=")[0] in message and near in message
    Path("my.yaml").write_text("model: {base_model: base, lora: {rnk: 3}}\n")
    for words in (["my.yaml"], ["--config", "my.yaml"], ["--config=my.yaml"]):
        message = error_of(capsys, 2, "fit", *words)
        assert "my.yaml" in message and "model.lora.rnk" in message and "model.lora.rank" in message
    Path("my.yaml").write_text("model: {base_model: base}\ntrainer: {callbacks+: []}\n")
    settings.check_words("fit", ["-c", "my.yaml", "--model.losses.mine.class_path", "x", "--trainer.callbacks+=y"])
    with pytest.raises(UsageError, match="--numm_masks"):
        settings.check_words("predict", ["--num_masks", "2", "--numm_masks", "2"])


def test_files_named_first_are_configurations() -> None:
    assert settings.with_configurations(["a.yaml", "b.yml", "--x", "c.yaml"]) == [
        "--config", "a.yaml", "--config", "b.yml", "--x", "c.yaml"
    ]  # fmt: skip
    assert settings.with_configurations(["--config", "a.yaml"]) == ["--config", "a.yaml"]
    for given, replaced in (
        (["--data.validation_fraction=0.1"], ["--data.validation", "null"]),
        (["--data.validation", "F"], ["--data.validation_fraction", "0"]),
        (["--data.validation", "F", "--data.validation_fraction", "0.1"], []),
        (["--data.validation_fraction", "0"], []),
        (["--data.validation=null"], []),
    ):
        assert settings.with_replacements(given) == given + replaced
    assert mtp("fit", "none.yaml") == 1
