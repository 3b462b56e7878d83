# SPDX-License-Identifier: Apache-2.0
"""The program ``mtp``: one function that the console script, ``python -m mtp_lightning`` and the tests call.

What takes long to import is imported in functions: Ctrl-C before ``main`` is called would show a traceback.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
import warnings
from _thread import interrupt_main
from importlib import import_module
from threading import current_thread, main_thread
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from mtp_lightning.errors import MTPError, RunError, UsageError

if TYPE_CHECKING:
    import logging
    from sys import UnraisableHookArgs
    from types import FrameType


class Command(NamedTuple):
    """A command, imported when it is called.

    Attributes:
        help: what ``mtp --help`` says.
        module: where its function is, in this folder.
        function: takes the options.
    """

    help: str
    module: str
    function: str


COMMANDS = {
    "fit": Command("train", "lightning_cli", "run_trainer"),
    "validate": Command("losses, NTP figure and acceptance on the validation set", "lightning_cli", "run_trainer"),
    "test": Command("the same on the test set", "lightning_cli", "run_trainer"),
    "predict": Command("speculative generation over the test prompts, one JSON line a prompt", "predict", "run_predict"),
    "generate": Command("generate text with a trained model", "generate", "run_generate"),
    "chat": Command("talk with a trained model", "chat", "run_chat"),
    "data": Command("show a few rows with the role of every token, and the shares", "data", "run_data"),
    "distill": Command("write the base model's own answers to prompts, to train on", "distill", "run_distill"),
    "export": Command("checkpoint to saved folder (safetensors and JSON)", "export", "run_export"),
    "benchmark": Command(
        "tokens a step by domain and number of masks, speed-up, losslessness", "benchmark", "run_benchmark"
    ),
}


def main(args: list[str] | None = None) -> None:
    """Run a command.

    Args:
        args: command line without the program's name; None: ``sys.argv``.

    Raises:
        SystemExit: with 2 where the command or the configuration is wrong, 1 at any other error; one line on standard
            error says what to change. ``--debug`` or ``MTP_DEBUG=1`` shows the traceback. With 130 after Ctrl-C, 141 when
            the reader of standard output has gone.
    """
    words = list(sys.argv[1:] if args is None else args)
    # In a process of its own; not where Ctrl-C is ignored, as a shell has it for what it starts in the background.
    heeds = (
        args is None
        and current_thread() is main_thread()  # no other may set handlers
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    )
    if heeds:
        # Called last of all: what Python takes down after that no handler is asked about.
        atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)
        sys.unraisablehook = _raise_again
    debug = "--debug" in words or os.environ.get("MTP_DEBUG", "") not in ("", "0")
    words = [word for word in words if word != "--debug"]
    # A user's own losses and heads lie in the current folder; appended, so that they can't hide an installed package.
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        _run(words)
        print(end="", flush=True)
    except KeyboardInterrupt:
        _interrupted(heeds)
    except SystemExit as end:
        if not isinstance(end.__context__, KeyboardInterrupt):  # else Lightning's own end, with exit code 1
            raise
        _interrupted(heeds)
    except BrokenPipeError:
        # The reader has enough, as `| head` does. Python would complain when it flushes what is left.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None
    except Exception as error:
        if debug:
            import traceback

            traceback.print_exc()
        else:
            print(f"mtp: error: {_one_line(error)}", file=sys.stderr)
        raise SystemExit(2 if isinstance(_cause(error), UsageError) else 1) from None
    finally:
        if heeds:
            signal.signal(signal.SIGINT, _leave)


def _interrupted(heeds: bool) -> NoReturn:
    """End after Ctrl-C. What was said is on standard output already: every piece is written at once."""
    if heeds:
        signal.signal(signal.SIGINT, _leave)  # pressed again
    # Python notes a KeyboardInterrupt that leaves code given as text, as namedtuple's is, and under -m ends by the signal
    # itself, caught or not. Other such code takes the note back.
    exec("")
    print("\nmtp: interrupted", file=sys.stderr)
    raise SystemExit(130) from None


def _raise_again(unraisable: UnraisableHookArgs) -> None:
    """Have a KeyboardInterrupt that met a destructor, where Python drops all errors, come once more, outside of it."""
    if issubclass(unraisable.exc_type, KeyboardInterrupt):
        from threading import Timer

        Timer(0.01, interrupt_main).start()
    else:
        sys.__unraisablehook__(unraisable)


def _leave(number: int, frame: FrameType | None) -> None:
    """Answer to Ctrl-C when the command is done: leave at once, without the traceback of whatever is being taken down."""
    os.write(2, b"\nmtp: interrupted\n")
    os._exit(130)


def _run(words: list[str]) -> None:
    if not words or words[0] in ("-h", "--help"):
        print("usage: mtp COMMAND [options]\n\ncommands:")
        for name, command in COMMANDS.items():
            print(f"  {name:10} {command.help}")
        print("\nmtp COMMAND --help shows a command's options. --debug shows the traceback of an error.")
        return
    if words[0] == "--version":
        from mtp_lightning import __version__

        print(f"mtp {__version__}")
        return
    if words[0] not in COMMANDS:
        raise UsageError(f"unknown command {words[0]!r}: expected one of {', '.join(COMMANDS)}.")
    _check_configurations(words)
    _check_compile_cache()
    # Before torch is imported: its threads would spin, milliseconds at each of hundreds of small operations a token, for one
    # that another process keeps from its core. Decoding a small model beside a busy process took many times as long.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    _quiet()
    command = COMMANDS[words[0]]
    getattr(import_module(f"mtp_lightning.commands.{command.module}"), command.function)(
        words if command.function == "run_trainer" else words[1:]  # Lightning's own subcommands
    )


def _quiet() -> None:
    """Silence what other libraries say on every start and no user can act on."""
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")  # the data is in memory already
    warnings.filterwarnings("ignore", message=".*intended to run from within Python.*")  # main() passes the arguments on
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")  # Lightning's own use of torch
    show = warnings.showwarning

    def show_shortly(message: Warning | str, category: type[Warning], filename: str, *place: Any) -> None:
        """Warnings of this package as one line, without the place in its source."""
        if f"{os.sep}mtp_lightning{os.sep}" in filename and category is UserWarning:
            print(f"mtp: warning: {message}", file=sys.stderr)
        else:
            show(message, category, filename, *place)

    if show.__name__ != show_shortly.__name__:
        warnings.showwarning = show_shortly  # type: ignore[assignment] # typeshed names the arguments one by one
    import logging

    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_no_advertisement)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()


def _no_advertisement(record: logging.LogRecord) -> bool:
    """Whether a line of Lightning's is no tip to install another package of its makers."""
    return "Tip: For seamless" not in record.getMessage()


def _check_configurations(words: list[str]) -> None:
    from mtp_lightning.commands.configuration_file import check_configuration

    for word, value in zip(words, [*words[1:], ""], strict=True):
        name, _, given = word.partition("=")
        path = given or value
        if name in ("--config", "-c") and path:
            check_configuration(path)


def _check_compile_cache() -> None:
    """Refuse a folder that torch would fail to make while it is imported."""
    name = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    if not name or os.path.isdir(name):
        return
    from pathlib import Path

    from mtp_lightning.paths import why_unwritable

    reason = why_unwritable(Path(name).absolute())
    if reason is None:
        try:
            os.makedirs(name, exist_ok=True)  # as torch will: under /proc only trying tells
        except OSError as error:
            reason = error.strerror
    if reason is not None:
        raise RunError(
            f"TORCHINDUCTOR_CACHE_DIR is {name!r}, a folder that can't be made: {reason}. Name another folder, or unset it."
        )


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
