# SPDX-License-Identifier: Apache-2.0
"""The program ``mtp``: one function that the console script, ``python -m mtp_lightning`` and the tests call."""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from typing import Any

from mtp_lightning.errors import MTPError, RunError, UsageError

COMMANDS = {
    "fit": "train",
    "validate": "losses, NTP figure and acceptance on the validation set",
    "test": "the same on the test set",
    "predict": "speculative generation over the test prompts, one JSON line a prompt",
    "generate": "generate text with a trained model",
    "chat": "talk with a trained model",
    "benchmark": "tokens a step by domain and number of masks, speed-up, losslessness",
    "export": "checkpoint to saved folder (safetensors and JSON)",
}


def main(args: list[str] | None = None) -> None:
    """Run a command.

    Args:
        args: command line without the program's name; None: ``sys.argv``.

    Raises:
        SystemExit: with 2 where the command or the configuration is wrong, 1 at any other error; one line on standard
            error says what to change. ``--debug`` or ``MTP_DEBUG=1`` shows the traceback. With 130 after Ctrl-C.
    """
    words = list(sys.argv[1:] if args is None else args)
    debug = "--debug" in words or os.environ.get("MTP_DEBUG", "") not in ("", "0")
    words = [word for word in words if word != "--debug"]
    # A user's own losses and heads lie in the current folder; appended, so that they can't hide an installed package.
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        _run(words)
    except KeyboardInterrupt:
        # What was said is on standard output already: every piece is written at once.
        print("\nmtp: interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except Exception as error:
        if debug:
            traceback.print_exc()
        else:
            print(f"mtp: error: {_one_line(error)}", file=sys.stderr)
        raise SystemExit(2 if isinstance(_cause(error), UsageError) else 1) from None


def _run(words: list[str]) -> None:
    if not words or words[0] in ("-h", "--help"):
        print("usage: mtp COMMAND [options]\n\ncommands:")
        for name, text in COMMANDS.items():
            print(f"  {name:10} {text}")
        print("\nmtp COMMAND --help shows a command's options. --debug shows the traceback of an error.")
        return
    if words[0] == "--version":
        from mtp_lightning import __version__

        print(f"mtp {__version__}")
        return
    if words[0] not in COMMANDS:
        raise UsageError(f"unknown command {words[0]!r}: expected one of {', '.join(COMMANDS)}.")
    _missing_files(words)
    _quiet()
    if words[0] in ("fit", "validate", "test"):
        from mtp_lightning.lightning_cli import run_trainer

        run_trainer(words)
    elif words[0] == "predict":
        from mtp_lightning.lightning_cli import run_predict

        run_predict(words[1:])
    elif words[0] == "chat":
        from mtp_lightning.chat_command import run_chat

        run_chat(words[1:])
    elif words[0] == "benchmark":
        from mtp_lightning.benchmark_command import run_benchmark

        run_benchmark(words[1:])
    elif words[0] == "export":
        from mtp_lightning.export_command import run_export

        run_export(words[1:])
    else:
        from mtp_lightning.commands import run_generate

        run_generate(words[1:])


def _quiet() -> None:
    """Silence what other libraries say on every start and no user can act on."""
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")  # the data is in memory already
    warnings.filterwarnings("ignore", message=".*intended to run from within Python.*")  # main() passes the arguments on
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")  # Lightning's own use of torch
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from transformers.utils import logging

    logging.disable_progress_bar()


def _missing_files(words: list[str]) -> None:
    for word, value in zip(words, [*words[1:], ""], strict=True):
        name, _, given = word.partition("=")
        path = given or value
        if name in ("--config", "-c") and path and not os.path.isfile(path):
            raise RunError(f"configuration file {path!r} does not exist. Give the path of a YAML file with --config.")


def _cause(error: BaseException) -> BaseException:
    """The error of ours that another library wrapped, or the error itself."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, MTPError):
            return seen
        seen = seen.__cause__ or seen.__context__
    return error


def _one_line(error: BaseException) -> str:
    found = _cause(error)
    text: Any = str(found) if isinstance(found, MTPError) else f"{type(found).__name__}: {found}"
    return " ".join(text.split()) + ("" if isinstance(found, MTPError) else " (--debug shows where)")
