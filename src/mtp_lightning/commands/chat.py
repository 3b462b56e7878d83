# SPDX-License-Identifier: Apache-2.0
"""``mtp chat``: a conversation in the terminal. Answers go to standard output, all else to standard error."""

from __future__ import annotations

import contextlib
import importlib
import sys
from pathlib import Path
from typing import Any

from mtp_lightning.commands.arguments import DecodingArguments
from mtp_lightning.commands.parser import CommandParser
from mtp_lightning.decoding.limits import resolve_num_masks
from mtp_lightning.errors import MTPError, RunError, UsageError, one_line, os_reason
from mtp_lightning.model import MTPModel
from mtp_lightning.paths import resolve
from mtp_lightning.text.chat import PLAIN_STOP, PLAIN_TEMPLATE, Conversation
from mtp_lightning.text.prompts import render_messages

MAX_NEW_TOKENS = 1024
HELP = """/reset          forget what was said
/undo           forget the last message and its answer
/system TEXT    set the system message (without TEXT: none) and forget what was said
/exit           leave; so does Ctrl-D
A line that ends with a backslash goes on in the next one. // at the beginning says a /.
Ctrl-C stops an answer, which is kept as far as it came."""
OWN = {"batch_size"}


def run_chat(args: list[str]) -> None:
    """``mtp chat MODEL``.

    Args:
        args: options.

    Raises:
        UsageError: a wrong option, or a base without a chat template and none given.
    """
    parser = CommandParser(prog="mtp chat", description="A conversation with a trained model.")
    parser.add_argument("model", type=str, help="saved folder, checkpoint file or hub id")
    parser.add_argument("--system", type=str | None, default=None, help="the system message")
    parser.add_argument(
        "--chat_template",
        type=str | None,
        default=None,
        help="a jinja file; plain: names before lines, for a base without a template; not given: the base's own",
    )
    parser.add_class_arguments(DecodingArguments, None, skip=OWN)
    parser.set_defaults({"max_new_tokens": MAX_NEW_TOKENS})
    config = parser.parse_args(args)
    names = [name for name in DecodingArguments.__dataclass_fields__ if name not in OWN]
    arguments = DecodingArguments(**{name: config[name] for name in names})
    template = _template(config.chat_template)
    if sys.stdin is None or sys.stdin.closed:
        raise RunError("standard input: expected messages, it is closed. Run mtp chat in a terminal, or pipe messages in.")
    model = arguments.load(config.model)
    converse(conversation(model, arguments, template, config.system))


def _template(name: str | None) -> str | None:
    if name is None or name == "plain":
        return None if name is None else PLAIN_TEMPLATE
    if not name:
        raise UsageError("chat_template must be a jinja file or plain, got an empty name. Change --chat_template.")
    try:
        text = Path(resolve(name)).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = os_reason(error) if isinstance(error, OSError) else one_line(error)
        raise RunError(f"chat_template {name!r} can't be read: {reason}. Give a jinja file, or plain.") from error
    if not text.strip():
        raise RunError(f"chat_template {name!r} is empty. Give a jinja file, or plain.")
    return text


def conversation(
    model: MTPModel, arguments: DecodingArguments, template: str | None, system: str | None = None
) -> Conversation:
    """A conversation with the options of the command line.

    Args:
        model: the model.
        arguments: how to decode.
        template: text of a chat template, or None for the base's own.
        system: the system message.

    Returns:
        The conversation.

    Raises:
        UsageError: there is no chat template, a system message that does not fit the context, or a wrong option.
        RunError: the template takes no message.
    """
    resolve_num_masks(model, arguments.options())  # what is wrong shows before anything is said
    if model.tokenizer is None:
        raise UsageError("mtp chat needs a tokenizer, and the model was saved without one. Save it with its tokenizer.")
    if template is not None:
        model.tokenizer.chat_template = template
    elif not model.tokenizer.chat_template:
        raise UsageError(
            "the base's tokenizer has no chat template: it was not made for chat. Give --chat_template FILE, or"
            " --chat_template plain for a simple dialogue."
        )
    _try_template(model, system)
    stops = [arguments.stop] if arguments.stop else []
    return Conversation(model, arguments.options(), stops + ([PLAIN_STOP] if template == PLAIN_TEMPLATE else []), system)


def _try_template(model: MTPModel, system: str | None) -> None:
    """Render a message, so that a template which takes none is refused before anything is said."""
    messages = [{"role": "system", "content": system}] if system else []
    try:
        prompt = render_messages([*messages, {"role": "user", "content": "a"}], model.tokenizer)
    except RunError as error:
        said = str(error).removeprefix("messages: ").rstrip(".")
        raise RunError(f"{said}. Change --chat_template{' or --system' if system else ''}.") from error
    if system and len(prompt.input_ids) >= model.context:
        raise UsageError(
            f"the system message makes a prompt of {len(prompt.input_ids)} tokens and the model's context is"
            f" {model.context}. Shorten --system."
        )


def converse(talk: Conversation) -> None:
    """Read messages from standard input and print answers until there are no more.

    Args:
        talk: the conversation.

    Raises:
        KeyboardInterrupt: Ctrl-C where standard input is no terminal and no answer is being written.
        RunError: standard input is no terminal, and a message of it could not be answered or is no text.
    """
    terminal = sys.stdin.isatty()
    said = unanswered = 0
    if terminal:
        with contextlib.suppress(ImportError):  # arrow keys and history; not on every system
            importlib.import_module("readline")
        _note("/help lists the commands, Ctrl-D leaves.")
    while True:
        try:
            text = _read(terminal)
        except EOFError:
            if terminal:
                print(flush=True)
            break
        except UnicodeDecodeError as error:
            raise RunError(f"standard input: expected UTF-8 text, {one_line(error)}. Convert it.") from error
        except KeyboardInterrupt:
            if not terminal:
                raise
            _note("\nCtrl-D or /exit leaves.")
            continue
        if text == "/exit":
            break
        if text.startswith("/") and not text.startswith("//"):
            _command(talk, text)
        elif text.strip():
            said += 1
            unanswered += not _answer(talk, text.removeprefix("/") if text.startswith("//") else text)
    if unanswered and not terminal:  # in a terminal it was seen
        raise RunError(f"{unanswered} of {said} messages were not answered, for the reasons above. Change them.")


def _read(terminal: bool) -> str:
    """One message, of several lines where they end with a backslash."""
    lines = [input("> " if terminal else "")]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1][:-1]
        lines.append(input(". " if terminal else ""))
    return "\n".join(lines)


def _command(talk: Conversation, text: str) -> None:
    name, _, rest = text.partition(" ")
    if name == "/help":
        _note(HELP)
    elif name == "/reset":
        talk.reset()
        _note("Forgotten.")
    elif name == "/undo":
        _note("The last message is forgotten." if talk.undo() else "Nothing was said yet.")
    elif name == "/system":
        talk.system = rest.strip() or None
        talk.reset()
        _note("The system message is set." if talk.system else "There is no system message.")
    else:
        _note(f"There is no command {name}. /help lists them; // at the beginning says a /.")


def _answer(talk: Conversation, text: str) -> bool:
    """Print an answer as it comes; whether there is one. Ctrl-C stops it; what was said stays in the conversation."""
    pieces = talk.say(text)
    begun = False
    try:
        for piece in pieces:
            # The space or newline that stands between the template's last word and the answer is not for the reader.
            shown = piece if begun else piece.lstrip()
            begun = begun or bool(shown)
            print(shown, end="", flush=True)
    except KeyboardInterrupt:
        pieces.close()  # type: ignore[attr-defined] # it is a generator
        print(flush=True)
        _note("[stopped; the answer is kept as far as it came]")
        return True
    except MTPError as error:
        _note(f"mtp: {error}")
        return False
    print(flush=True)
    if talk.dropped:
        _note(f"[the {talk.dropped} oldest messages no longer fit the context and are forgotten]")
    if talk.generated is not None:
        _note(talk.generated.summary())
    return True


def _note(text: Any) -> None:
    print(text, file=sys.stderr, flush=True)
