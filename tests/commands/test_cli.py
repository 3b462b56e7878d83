# SPDX-License-Identifier: Apache-2.0
"""The program itself: help, version, exit codes, and how errors are shown."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from command_line import error_of, mtp

import mtp_lightning
from mtp_lightning.commands import cli
from mtp_lightning.errors import RunError, UsageError


def test_help_and_version(capsys) -> None:
    for words in ([], ["--help"], ["-h"]):
        assert mtp(*words) == 0
        out = capsys.readouterr().out
        assert all(f"\n  {command} " in out for command in cli.COMMANDS)
    assert mtp("--version") == 0 and capsys.readouterr().out == f"mtp {mtp_lightning.__version__}\n"
    for command, option in (
        ("fit", "--model.lora.rank"),
        ("predict", "--num_masks"),
        ("data", "--split"),
        ("generate", "--stop"),
    ):
        assert mtp(command, "--help") == 0
        out = capsys.readouterr().out
        assert option in out and out.startswith(f"usage: mtp {command} ")
        assert command == "generate" or out.splitlines()[0].endswith(" [options]")


def test_python_m_is_the_same_program() -> None:
    done = subprocess.run([sys.executable, "-m", "mtp_lightning", "fitt"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("mtp: error: unknown command 'fitt'") and done.stderr.count("\n") == 1


def test_ctrl_c(capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning catches it, takes the trainer down and exits with code 1."""

    def interrupted(words: list[str]) -> None:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            if words == ["fit"]:
                sys.exit(1)
            raise

    monkeypatch.setattr(cli, "_run", interrupted)
    for command in ("fit", "generate"):
        assert mtp(command) == 130 and capsys.readouterr().err == "\nmtp: interrupted\n"


def test_a_reader_that_has_closed_the_pipe() -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-m", "mtp_lightning", "--help"], stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.parametrize(("words", "variable"), [(["--debug"], "0"), ([], "1")])
def test_debug_shows_the_traceback(capsys, monkeypatch: pytest.MonkeyPatch, words: list[str], variable: str) -> None:
    monkeypatch.setenv("MTP_DEBUG", variable)
    assert mtp("fitt", *words) == 2
    err = capsys.readouterr().err
    assert err.startswith("Traceback (most recent call last):")
    assert err.splitlines()[-1].startswith("mtp_lightning.errors.UsageError: unknown command 'fitt'")


def test_unforeseen_errors(capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(words: list[str]) -> None:
        try:
            raise {"run": RunError("fix it"), "usage": UsageError("say it"), "bug": KeyError("a")}[words[0]]
        except Exception as error:
            raise ValueError("first line\n  second line") from (error if words[0] != "bug" else None)

    monkeypatch.setattr(cli, "_run", fails)
    bug = error_of(capsys, 1, "bug")
    assert bug.startswith("ValueError: first line second line (") and __file__ in bug  # where the user's own code failed
    assert error_of(capsys, 1, "run") == "fix it"  # another library wrapped it
    assert error_of(capsys, 2, "usage") == "say it"
