# SPDX-License-Identifier: Apache-2.0
"""The program run in-process, and what it needs on disk: a tiny base with its tokenizer."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_base
from transformers import PreTrainedTokenizerFast

from mtp_lightning.commands.cli import main
from mtp_lightning.commands.lightning_cli import MTPCLI


def mtp(*words: object) -> int:
    """Run the program; returns its exit code."""
    try:
        main([str(word) for word in words])
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def error_of(capsys: pytest.CaptureFixture[str], code: int, *words: object) -> str:
    """The error line of a command that must fail with the exit code and print nothing to standard output."""
    capsys.readouterr()
    exit_code = mtp(*words)
    out, err = capsys.readouterr()
    last = err.splitlines()[-1] if err else ""
    assert (exit_code, out) == (code, ""), last
    assert last.startswith("mtp: error: ") and "Traceback" not in err
    return last.removeprefix("mtp: error: ")


def save_base(
    folder: Path, architecture: str, tokenizer: PreTrainedTokenizerFast, dtype: torch.dtype, **options: Any
) -> None:
    """A tiny random base and its tokenizer."""
    tokenizer.save_pretrained(folder)
    tiny_base(architecture, dtype, vocab_size=len(tokenizer), **options).save_pretrained(folder)


def write_rows(path: Path, rows: Sequence[Any]) -> None:
    """JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read_metrics(folder: Path) -> list[dict[str, str]]:
    """The lines of a run's metrics.csv, without what a line has no value for."""
    with (folder / "metrics.csv").open(newline="") as file:
        return [{name: value for name, value in line.items() if value} for line in csv.DictReader(file)]


class ParseOnly(MTPCLI):
    """``mtp fit`` up to the parsed configuration; no class is instantiated.

    Attributes:
        settings: the configuration.
    """

    def __init__(self, *words: object) -> None:
        super().__init__(["fit", *map(str, words)])
        self.settings = self.config.fit

    def instantiate_classes(self) -> None:
        """Nothing."""

    def after_instantiate_classes(self) -> None:
        """Nothing."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Nothing."""
