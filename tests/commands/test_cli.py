# SPDX-License-Identifier: Apache-2.0
"""The program itself: help, version, its two doors, and errors that nobody foresaw."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import error_of, leave_no_trace, mtp  # noqa: F401 - one is a fixture

import mtp_lightning
from mtp_lightning.commands import cli
from mtp_lightning.errors import RunError, UsageError


def test_help_and_version(capsys) -> None:
    for words in ([], ["--help"], ["-h"]):
        assert mtp(*words) == 0
        out = capsys.readouterr().out
        assert all(f"\n  {command} " in out for command in ("fit", "validate", "test", "predict", "generate"))
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
    expected = f"mtp: error: unknown command 'fitt': expected one of {', '.join(cli.COMMANDS)}.\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", expected)


@pytest.mark.parametrize(
    ("module", "content", "code"),
    [
        ("yaml", "raise KeyboardInterrupt", 130),  # which main imports
        ("yaml", "exec('raise KeyboardInterrupt')", 130),  # Python itself would end by the signal, though it was caught
        ("yaml", "import atexit, os; atexit.register(os.kill, os.getpid(), 2); raise KeyboardInterrupt", 130),
        ("yaml", "class A: __del__ = lambda self: exec('raise KeyboardInterrupt')\nA()\nwhile True: pass", 130),
        # Registered before the program begins, called when it has ended: there is nothing to interrupt.
        ("sitecustomize", "import atexit, os; atexit.register(os.kill, os.getpid(), 2)", 1),
    ],
    ids=["import", "code given as text", "pressed twice", "in a destructor", "at the end"],
)
@pytest.mark.parametrize("door", [["-m", "mtp_lightning"], ["-c", "import mtp_lightning.commands.cli as c; c.main()"]])
def test_ctrl_c(tmp_path: Path, door: list[str], module: str, content: str, code: int) -> None:
    """Anywhere between the call of ``main`` and the end of the process: one line and exit code 130."""
    (tmp_path / f"{module}.py").write_text(content)
    # A shell starts jobs in the background with Ctrl-C ignored, and children would inherit that.
    heed = functools.partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, *door, "data", "--config", "none.yaml"],
        env={**os.environ, "PYTHONPATH": path},
        preexec_fn=heed,
        timeout=120,
        capture_output=True,
        text=True,
    )
    lines = [line for line in done.stderr.splitlines() if line]
    assert (done.returncode, done.stdout) == (code, ""), done.stderr
    if code == 130:
        assert lines == ["mtp: interrupted"] * (2 if "os.kill" in content else 1)
    else:
        assert lines == [
            "mtp: error: configuration file 'none.yaml' does not exist. Give the path of a YAML file with --config."
        ]


def test_ctrl_c_in_a_run(capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning takes the trainer down and ends with exit code 1."""

    def interrupted(words: list[str]) -> None:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            sys.exit(1)

    monkeypatch.setattr(cli, "_run", interrupted)
    assert mtp("fit") == 130 and capsys.readouterr().err == "\nmtp: interrupted\n"


@pytest.mark.parametrize(("words", "variable"), [(["--debug"], "0"), ([], "1")])
def test_debug_shows_the_traceback(capsys, monkeypatch: pytest.MonkeyPatch, words: list[str], variable: str) -> None:
    monkeypatch.setenv("MTP_DEBUG", variable)
    assert mtp("fitt", *words) == 2
    err = capsys.readouterr().err
    assert err.startswith("Traceback (most recent call last):")
    assert err.splitlines()[-1].startswith("mtp_lightning.errors.UsageError: unknown command 'fitt'")


def test_errors_that_nobody_foresaw(capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(words: list[str]) -> None:
        try:
            raise {"own": RunError("mend it"), "usage": UsageError("say it"), "bug": KeyError("a")}[words[0]]
        except Exception as error:
            raise ValueError("first line\n  second line") from (error if words[0] != "bug" else None)

    monkeypatch.setattr(cli, "_run", fails)
    assert error_of(capsys, 1, "bug") == "ValueError: first line second line (--debug shows where)"
    assert error_of(capsys, 1, "own") == "mend it"  # another library wrapped it
    assert error_of(capsys, 2, "usage") == "say it"


def test_a_command_has_a_file_of_its_own() -> None:
    others = [command.module for command in cli.COMMANDS.values() if command.function != "run_trainer"]
    assert len(set(others)) == len(others) and "lightning_cli" not in others


@pytest.mark.parametrize("below", ["", "/cache", "/deep/cache"])
def test_a_compile_cache_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, below: str) -> None:
    """torch makes the folder while it is imported. A file stands in its place, which holds for root too."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", f"{tmp_path}/file{below}")
    for words in (["generate", "saved", "--prompt", "one"], ["fit", "--help"]):
        assert error_of(capsys, 1, *words) == (
            f"TORCHINDUCTOR_CACHE_DIR is '{tmp_path}/file{below}', a folder that can't be made: '{tmp_path}/file' is a file,"
            " not a folder. Name another folder, or unset it."
        )
    with monkeypatch.context() as context:  # some folders say that they may be written to, and then they may not
        context.setenv("TORCHINDUCTOR_CACHE_DIR", f"{tmp_path}/never")
        context.setattr(os, "makedirs", lambda *args, **kwargs: os.stat(f"{tmp_path}/missing"))
        assert "/never', a folder that can't be made: No such file or directory." in error_of(capsys, 1, "fit", "--help")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", f"{tmp_path}/new/cache")
    assert mtp("generate", "--help") == 0
