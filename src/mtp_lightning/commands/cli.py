# SPDX-License-Identifier: Apache-2.0
"""The program ``mtp``: one function that the console script, ``python -m mtp_lightning`` and the tests call."""

from __future__ import annotations

import logging
import os
import re
import sys
import traceback
import warnings
from importlib import import_module
from typing import Any, NamedTuple

import mtp_lightning
from mtp_lightning.errors import MTPError, UsageError, one_line


class Command(NamedTuple):
    """A command; its module is imported once its options are read, as torch and Lightning take seconds to import."""

    help: str  # text for ``mtp --help``
    module: str  # module in this package
    function: str  # function in the module, called with the options
    parser: str = ""  # function in ``options.py`` whose parser reads the options; without one they are its words


COMMANDS = {
    "base": Command("download a small chat model (SmolLM2-135M-Instruct) to train on", "base", "run_base", "base_parser"),
    "init": Command("write a configuration sized for a base, data and this machine", "init", "run_init", "init_parser"),
    "fit": Command("train", "lightning_cli", "run_trainer"),
    "validate": Command("losses, NTP figure and acceptance on the validation set", "lightning_cli", "run_trainer"),
    "test": Command("the same on the test set", "lightning_cli", "run_trainer"),
    "predict": Command("speculative generation over the test prompts, one JSON line per prompt", "predict", "run_predict"),
    "generate": Command("generate text with a trained model", "generate", "run_generate", "generate_parser"),
    "chat": Command("talk with a trained model", "chat", "run_chat", "chat_parser"),
    "data": Command("show a few rows with the role of every token, and the shares", "data", "run_data"),
    "distill": Command(
        "write the base model's own answers to prompts, to train on", "distill", "run_distill", "distill_parser"
    ),
    "serve": Command("serve a saved folder with vLLM (OpenAI-compatible)", "serve", "run_serve"),
    "export": Command("checkpoint to saved folder (safetensors and JSON)", "export", "run_export", "export_parser"),
    "benchmark": Command("find the fastest way to decode on this machine", "benchmark", "run_benchmark", "benchmark_parser"),
    "compare": Command("compare runs: settings that differ, figures, curves", "compare", "run_compare", "compare_parser"),
}


CONFIGURED = ("fit", "validate", "test", "predict", "data")
"""Commands that read a configuration."""
_SAID_AT_EVERY_START = re.compile(r"Tip: For seamless|^[GTH]PU available: False|^Seed set to|Automatic Mixed Precision")
"""What Lightning logs at every start: a tip to install a package of its makers, and settings that the user made."""
_PYTHONS_SHOW_WARNING = warnings.showwarning


def main(args: list[str] | None = None) -> None:
    """Run a command; ``args`` are the words without the program's name, by default those of ``sys.argv``.

    It exits with 2 if the command or the configuration is wrong and with 1 at any other error, after one line on standard
    error (``--debug`` or ``MTP_DEBUG=1``: the traceback); with 130 after Ctrl-C, and with 141 if the reader of standard
    output has closed it.
    """
    words = list(sys.argv[1:] if args is None else args)
    debug = "--debug" in words or os.environ.get("MTP_DEBUG", "") not in ("", "0")
    words = [word for word in words if word != "--debug"]
    # A user's own losses and heads are in the current folder; appended, so that they can't hide an installed package.
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        _run(words)
        print(end="", flush=True)
    except (KeyboardInterrupt, SystemExit) as end:
        # Lightning ends an interrupted run with a SystemExit of its own.
        if not isinstance(end, KeyboardInterrupt) and not isinstance(end.__context__, KeyboardInterrupt):
            raise
        print("\nmtp: interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains when it flushes at exit
        raise SystemExit(141) from None
    except Exception as error:
        cause = _user_fixable(error)
        if debug:
            traceback.print_exc()
        elif cause is not None:
            print(f"mtp: error: {' '.join(str(cause).split())}", file=sys.stderr)
        else:
            print(f"mtp: error: {type(error).__name__}: {one_line(error)} ({_place(error)})", file=sys.stderr)
        raise SystemExit(2 if isinstance(cause, UsageError) else 1) from None


def _run(words: list[str]) -> None:
    if not words or words[0] in ("-h", "--help"):
        print("usage: mtp COMMAND [options]\n\ncommands:")
        for name, command in COMMANDS.items():
            print(f"  {name:10} {command.help}")
        print("\nmtp COMMAND --help shows a command's options. --debug shows the traceback of an error.")
        return
    if words[0] == "--version":
        print(f"mtp {mtp_lightning.__version__}")
        return
    if words[0] not in COMMANDS:
        raise UsageError(f"unknown command {words[0]!r}: expected one of {', '.join(COMMANDS)}.")
    # Before torch is imported: its idle threads spin, and on a core that another process uses too this costs milliseconds at
    # each of hundreds of small operations per token.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    _silence_libraries()
    command, options = COMMANDS[words[0]], words[1:]
    if words[0] in CONFIGURED:
        from mtp_lightning.commands import settings  # a server's environment may lack what it needs

        options = settings.with_configurations(options)
        if topic := next((word for word in options if word in settings.HELP_WORDS), None):
            print(settings.help_text(words[0], topic), end="")
            return
        settings.check_words(words[0], options)
        options = [words[0], *settings.with_replacements(options)]
    elif command.parser:
        parsers = import_module("mtp_lightning.commands.options")
        options = getattr(parsers, command.parser)().parse_args(options)
        parsers.check(options)
    getattr(import_module(f"mtp_lightning.commands.{command.module}"), command.function)(options)


def _silence_libraries() -> None:
    """Hide what other libraries print on every start and no user can act on."""
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")  # the data is in memory already
    warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")  # of a run that is resumed
    warnings.filterwarnings("ignore", message=".*intended to run from within Python.*")  # main() passes the arguments on
    warnings.filterwarnings("ignore", message="You have overridden `on_before_batch_transfer`")  # as it should be
    warnings.filterwarnings("ignore", message="Total length of `list` across ranks is zero")  # a run without validation
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")  # Lightning's own use of torch
    warnings.showwarning = _show_warning
    for name in (
        "lightning.pytorch.utilities.rank_zero",
        "lightning.fabric.utilities.seed",
        "lightning.fabric.utilities.rank_zero",
    ):
        logging.getLogger(name).addFilter(lambda record: not _SAID_AT_EVERY_START.search(record.getMessage()))
    # bitsandbytes, of a kernel that it does without.
    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(lambda r: "gemm_4bit_forward" not in r.getMessage())
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # transformers' too, which is not imported yet


def _show_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, file: Any = None, line: str | None = None
) -> None:
    """Print this package's warnings as one line, without the place in its source."""
    if f"{os.sep}mtp_lightning{os.sep}" in filename and category is UserWarning:
        print(f"mtp: warning: {message}", file=sys.stderr)
    else:
        _PYTHONS_SHOW_WARNING(message, category, filename, lineno, file, line)


def _place(error: BaseException) -> str:
    """The line of the user's own code that raised an error, if it was raised there, and how to see more."""
    others = (os.path.dirname(mtp_lightning.__file__), sys.prefix, sys.base_prefix, "<")
    own = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(others)]
    return f"{own[-1].filename}, line {own[-1].lineno}; --debug shows all" if own else "--debug shows where"


def _user_fixable(error: BaseException) -> MTPError | None:
    """The error of this package that another library may have wrapped, or None if there is none."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, MTPError):
        cause = cause.__cause__ or cause.__context__
    return cause
