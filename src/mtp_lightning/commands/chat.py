# SPDX-License-Identifier: Apache-2.0
"""``mtp chat``: a conversation in the terminal. Answers go to standard output, all else to standard error."""

from __future__ import annotations

import contextlib
import importlib
import sys
from typing import Any

from mtp_lightning.commands.arguments import DecodingArguments
from mtp_lightning.commands.options import NOT_OF_CHAT
from mtp_lightning.data.chat import read_template
from mtp_lightning.decoding.limits import resolve_num_masks
from mtp_lightning.errors import MTPError, RunError, UsageError
from mtp_lightning.evaluation.reporting import note
from mtp_lightning.model import MTPModel
from mtp_lightning.text.chat import PLAIN_STOP, PLAIN_TEMPLATE, Conversation

HELP = """/reset          forget the conversation
/undo           forget the last message and its answer
/system TEXT    set the system message (without TEXT: remove it) and forget the conversation
/exit           leave; so does Ctrl-D
End a line with a backslash to continue on the next line. Start with // to send a literal /.
Ctrl-C stops an answer and keeps what was written of it."""


def run_chat(options: Any) -> None:
    """``mtp chat MODEL``."""
    arguments = DecodingArguments.from_config(options, skip=NOT_OF_CHAT)
    name = options.chat_template
    template = PLAIN_TEMPLATE if name == "plain" else None if name is None else read_template(name, "chat_template")
    run_conversation(open_conversation(arguments.load(options.model), arguments, template, options.system))


def open_conversation(
    model: MTPModel, arguments: DecodingArguments, template: str | None, system: str | None = None
) -> Conversation:
    """A conversation with the options of the command line; the template is a text, or None for the base's own."""
    resolve_num_masks(model, arguments.options())  # an error shows before the first message
    if model.tokenizer is None:
        raise UsageError("mtp chat needs a tokenizer, and the model was saved without one.")
    if template is not None:
        model.tokenizer.chat_template = template
    elif not model.tokenizer.chat_template:
        raise UsageError("the tokenizer has no chat template: give --chat_template FILE, or plain for a simple dialogue.")
    stops = [arguments.stop] if arguments.stop else []
    return Conversation(model, arguments.options(), stops + ([PLAIN_STOP] if template == PLAIN_TEMPLATE else []), system)


def run_conversation(conversation: Conversation) -> None:
    """Read messages from standard input and print answers until there are no more.

    In a terminal, Ctrl-C at the prompt does not leave, and a message that can't be answered is not an error of the command.
    """
    terminal = sys.stdin.isatty()
    num_messages = num_unanswered = 0
    if terminal:
        with contextlib.suppress(ImportError):  # arrow keys and history; not on every system
            importlib.import_module("readline")
        note("/help lists the commands, Ctrl-D leaves.")
    while True:
        try:
            text = _read_message(terminal)
        except EOFError:
            if terminal:
                print(flush=True)
            break
        except KeyboardInterrupt:
            if not terminal:
                raise
            note("\nCtrl-D or /exit leaves.")
            continue
        if text == "/exit":
            break
        if text.startswith("/") and not text.startswith("//"):
            _run_command(conversation, text)
        elif text.strip():
            first = num_messages == num_unanswered  # none was answered yet
            num_messages += 1
            message = text.removeprefix("/") if text.startswith("//") else text
            num_unanswered += not _print_answer(conversation, message, first)
    if num_unanswered and not terminal:  # a user at a terminal has seen the reasons
        raise RunError(f"{num_unanswered} of {num_messages} messages were not answered, for the reasons above.")


def _read_message(terminal: bool) -> str:
    """One message; a line that ends with a backslash continues on the next one."""
    lines = [input("> " if terminal else "")]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1][:-1]
        lines.append(input(". " if terminal else ""))
    return "\n".join(lines)


def _run_command(conversation: Conversation, text: str) -> None:
    name, _, rest = text.partition(" ")
    if name == "/help":
        note(HELP)
    elif name == "/reset":
        conversation.reset()
        note("Forgotten.")
    elif name == "/undo":
        note("The last message is forgotten." if conversation.undo() else "There is no message to forget.")
    elif name == "/system":
        conversation.system = rest.strip() or None
        conversation.reset()
        note("The system message is set." if conversation.system else "There is no system message.")
    else:
        note(f"There is no command {name}. /help lists them; start with // to send a literal /.")


def _print_answer(conversation: Conversation, text: str, first: bool) -> bool:
    """Print an answer as it is decoded; True if there is one. Of an answer that Ctrl-C stops the beginning is kept.

    What low precision can change is said below the ``first``.
    """
    pieces = conversation.say(text)
    empty = True
    try:
        for piece in pieces:
            # Some templates leave the space or newline before the answer to the model.
            shown = piece.lstrip() if empty else piece
            empty = empty and not shown
            print(shown, end="", flush=True)
    except KeyboardInterrupt:
        pieces.close()  # type: ignore[attr-defined] # it is a generator
        print(flush=True)
        note("[stopped]" if empty else "[stopped; the beginning of the answer is kept]")
        return True
    except MTPError as error:
        note(f"mtp: {error}")
        return False
    print(flush=True)
    if conversation.dropped:
        note(f"[the {conversation.dropped} oldest messages no longer fit the context and are forgotten]")
    if conversation.generated is not None:
        note(conversation.generated.summary(near_ties=first))
    return True
