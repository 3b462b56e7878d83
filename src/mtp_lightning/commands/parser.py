# SPDX-License-Identifier: Apache-2.0
"""The parser of every command: what jsonargparse refuses is raised as one line, for ``main`` to print."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

from jsonargparse import ArgumentParser

from mtp_lightning.errors import UsageError, one_line

_OMITTED = (
    "Does not validate against any of the Union subtypes",
    "Subtypes: ",
    "Errors:",
    "Given value type: ",
    "Expected a path but ",
    "Subclass types expect one of:",
    "a class path (str)",
    "a dict with",
)
"""Beginnings of lines of jsonargparse's messages that are left out."""
_SHORTER = {
    r'Parser key "(.+?)"': r"\1",
    r"<class '(?:\w+\.)*(\w+)'>": r"\1",
    r"typing\.Literal\[(.+?)\]": r"\1",
    r"\bNoneType\b": "null",
    r"\bExpected an? ": "expected ",
    r"(?:\. Got|; Given) value: ?": ", got ",
    r"Not of type \w+: (\S+) does not conform to restriction v(\S+)": r"expected a number \2, got \1",
    r"Not of type \w+: does not conform to restriction v(.+?); expected null": r"expected a number \1",
    r"Not of type \w+: could not convert string to float: .+?; expected null": "expected a number",
    r"(?<=\d) and v(?=[<>])": " and ",
    # What else a class's place could hold.
    r"((?:[Ii]mport path|class_path|Option ')[^;]*)(?:; (?:expected (?:False|bool|null)|Not a valid subclass)\b)+.*": r"\1",
    r"expected dot import path string: ([^\s;]+)": r"there is no class \1; one of your own is named module.Class",
}


SWITCHES = ("--exact", "--compile", "--raw", "--private")
"""Options that need no value: off by default, and on where they are named."""


class CommandParser(ArgumentParser):
    """A parser without abbreviations, whose errors are one line."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def parse_args(self, args: Sequence[str] | None = None, *others: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """Jsonargparse's; a switch without a value is ``true``: ``--exact --json``."""
        words = None if args is None else list(args)
        for at in range(len(words or []), 0, -1):
            if words and words[at - 1] in SWITCHES and not _is_value(words, at):
                words.insert(at, "true")
        return super().parse_args(words, *others, **kwargs)

    def format_help(self, *args: Any, **kwargs: Any) -> str:
        """The help text, without the backticks of the docstrings."""
        return super().format_help(*args, **kwargs).replace("``", "")

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise what is wrong with the command line or the configuration."""
        start, colon, missing = str(message).partition("arguments are required: ")
        if colon:  # named by their keys, where what is typed has dashes
            typed = {action.dest: action.option_strings[0] for action in self._actions if action.option_strings}
            commands = [name for action in self._actions if isinstance(action.choices, dict) for name in action.choices]
            typed |= {f"{command}.{dest}": f"--{dest}" for command in commands for dest in _keys(self)}
            message = start + colon + ", ".join(typed.get(name, name) for name in missing.split(", "))
        raise UsageError(_in_one_line(str(message), list(_keys(self)))) from ex


def _is_value(words: list[str], at: int) -> bool:
    """True if the word behind a switch is its value: not an option, nor MODEL where that has not come yet."""
    if at == len(words) or words[at].startswith("--"):
        return False
    return not words[0].startswith("--") or words[at].lower() in ("true", "false")


def _keys(parser: ArgumentParser) -> Iterator[str]:
    """The keys of a parser and of its subcommands."""
    for action in parser._actions:
        yield action.dest
        if isinstance(action.choices, dict):
            for subparser in action.choices.values():
                yield from _keys(subparser)


def _in_one_line(message: str, keys: list[str]) -> str:
    """A message of jsonargparse in one line; for an unknown key with the known one that is nearest to it."""
    lines = [line.strip(" -") for line in message.splitlines()]
    lines = list(dict.fromkeys(line for line in lines if line and not line.startswith(_OMITTED)))
    text = "; ".join(lines).replace(":; ", ": ")
    for pattern, replacement in _SHORTER.items():
        text = re.sub(pattern, replacement, text)
    unknown = re.search(r"unrecognized arguments: -*([\w.]+)|does not accept option '([\w.]+)", text)
    near = difflib.get_close_matches(unknown[1] or unknown[2], keys, n=1) if unknown else []
    dashes = "--" if unknown and unknown[1] else ""
    return one_line(text) + (f"; did you mean {dashes}{near[0]}?" if near else "")
