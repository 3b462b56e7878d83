# SPDX-License-Identifier: Apache-2.0
"""What jsonargparse says of a command line or a configuration, in one line and in the user's terms. Text alone."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

_PLAIN = {
    r"Type typing\.Callable\[.+\] expects a function or a callable class: ": "",
    r"<class '(?:\w+\.)*(\w+)'>": r"\1",
    r"typing\.Literal\[(.+?)\]": r"\1",
    r"\bNoneType\b": "null",
    r"\bFalse\b": "false",
    r"Expected a dot import path string: (\S+)": r"\1 is no import path",
    r"\bNot a valid subclass of (\w+)": r"Expected a \1 (class_path and init_args)",
    r"Option '(.+?)' is not accepted": r"unknown argument '\1'",
    r"^Expected an? ": "expected ",
    r" or Expected an? ": " or ",
}
"""What Python's types and jsonargparse's terms are called in a message."""

_CLASS_PATH = "a class_path is module.Class, of an installed package or of a file in the current folder."


def missing_arguments(message: str) -> list[str]:
    """The arguments that a message of jsonargparse says are required.

    Args:
        message: the message.

    Returns:
        Their names; none where it says something else.
    """
    line = " ".join(str(message).split())
    found = re.match(r"the following arguments are required: (.+)", line)
    return [re.sub(r"^(fit|validate|test)\.", "", name) for name in found[1].split(", ")] if found else []


def required(names: list[str]) -> str:
    """``a is required: set it``, or ``a, b are required: set them``; where, the caller says.

    Args:
        names: at least one.

    Returns:
        The beginning of a sentence.
    """
    return f"{', '.join(names)} {'is required: set it' if len(names) == 1 else 'are required: set them'}"


def clear_message(message: str, known: Iterable[str]) -> str:
    """A message of jsonargparse in one line and in the user's terms.

    ``Subcommand 'fit' does not accept option 'model.num_maks' -> unknown key or option 'model.num_maks': did you mean ..``

    Args:
        message: the message.
        known: the keys that there are, to find the one meant.

    Returns:
        The line.
    """
    line, known = " ".join(message.split()), list(known)
    if unknown := re.search(r"^(?:Group '(.+)'|.*) does not accept option '(.+)'|^unrecognized arguments: (\S+)", line):
        group, key, option = unknown.groups()
        name = option.partition("=")[0] if option else f"{group}.{key}" if group else key
        near = difflib.get_close_matches(name.lstrip("-"), known, n=1)
        return f"unknown key or option {name!r}: {f'did you mean {near[0]!r}?' if near else '--help lists what there is.'}"
    if missing := missing_arguments(line):
        return f"{required(missing)} in the configuration file or on the command line."
    if bare := re.fullmatch(r"argument (?:-\w/)?(--\S+): expected one argument", line):
        return f"{bare[1]} needs a value behind it, and there is none. --help says which."
    wrong = re.match(r'Parser key "(.+?)":(.*)', message, re.DOTALL)
    if not wrong:
        return line
    key, what = wrong[1], wrong[2]
    got = re.search(r"\n *Given value: (.*)", what) or re.search(r"\. Got value: (.*)", what)
    text, known_type = _what_is_wrong(what)
    for python, plain in _PLAIN.items():
        text = re.sub(python, plain, text)
    text = text.rstrip(".")
    value = " ".join(got[1].split())[:100] or "an empty text" if got else ""
    value = f", got {value}" if got and not known_type and "Namespace(" not in value else ""
    if "class_path " in text or "import path" in text.lower():
        return f"{key}: {text}{value}; {_CLASS_PATH}"
    if "required: set" in text:
        return f"{key}: {text}."
    # Of a class named in the configuration this is an argument, and the message about its key, which follows, says it.
    change = (f" Change {key}." if "." in key else f" Change --{key}.") if key in known else ""
    return f"{key}: {text}{value}.{change}"


def _what_is_wrong(what: str) -> tuple[str, bool]:
    """The errors in a message of jsonargparse about a key, and whether the type is right and something in it wrong."""
    # Of a type with alternatives each has its own error; a line that is indented deeper says more about the one before it.
    # Where the value is an empty text all lines are one space less deep.
    errors = [" ".join(error.split()) for error in re.findall(r"^ {3,4}- (.+(?:\n {7,8}.+)*)$", what, re.MULTILINE)]
    if not errors and "Subclass types expect" not in what:
        errors = re.findall(r"^  - (.+?)$", what, re.MULTILINE)
    errors = [error for error in errors if not error.startswith("Expected a path but")]
    subtypes = re.search(r"Subtypes: \[(.+)\]$", what, re.MULTILINE)
    if subtypes and any(re.match(r"Expected an? .+\. Got value: ", error) for error in errors):
        # What is wrong is an entry of a list or dict, so the kinds are told with their entries.
        return f"expected {' or '.join(re.split(r', (?![^[]*])', subtypes[1]))}", False
    errors = [re.sub(r"\. Got value:.*", "", error).rstrip(".") for error in errors]
    if causes := [error for error in errors if not re.match(r"Expected an? (<class|typing)|Not a valid subclass", error)]:
        deeper = [error for error in causes if not error.startswith("Option ")]
        return " or ".join(dict.fromkeys(deeper or causes)), True
    if errors:
        return " or ".join(dict.fromkeys(errors)), False
    return " ".join(re.split(r"\. Got value:|\n *Given value:|\n *Subclass types expect", what)[0].split()), False
