# SPDX-License-Identifier: Apache-2.0
"""Looking at a configuration file before it is parsed: is it there, and is it YAML of keys, each once. Reads no values."""

from __future__ import annotations

from pathlib import Path

import yaml

from mtp_lightning.errors import RunError, UsageError, one_line, os_reason

GROUPS = ("model", "model.lora", "data", "trainer")
"""Keys that hold keys."""


def check_configuration(name: str) -> None:
    """Refuse a file that is no configuration, with the file's name, which the parser does not say.

    Args:
        name: the file.

    Raises:
        RunError: it is missing or can't be read.
        UsageError: it is no YAML, holds no keys, names a key twice, or has a single value in the place of a group of keys.
    """
    path = Path(name)
    if not path.is_file():
        found = "is a folder" if path.is_dir() else "does not exist"
        raise RunError(f"configuration file {name!r} {found}. Give the path of a YAML file with --config.")
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise RunError(f"configuration file {name!r} can't be read: {os_reason(error)}. Change its permissions.") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"configuration file {name!r} is no UTF-8 text: {one_line(error)}. Save it as UTF-8.") from error
    try:
        node = yaml.compose(text, yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        line = 0 if error.problem_mark is None else error.problem_mark.line + 1
        said = ": ".join(part for part in (error.context, error.problem) if part)
        raise UsageError(f"configuration file {name!r}, line {line}: expected YAML, {said}. Correct it.") from error
    except yaml.YAMLError as error:
        raise UsageError(f"configuration file {name!r}: expected YAML, {one_line(error)}. Correct it.") from error
    if not isinstance(node, yaml.MappingNode):
        nothing = "comments alone" if text.strip() else "nothing"
        raise UsageError(
            f"configuration file {name!r}: expected keys as model, data and trainer, got"
            f" {nothing if node is None else one_line(Exception(text), 40)}. Correct it or leave it out."
        )
    _check_keys(name, node, "", set())


def _check_keys(name: str, node: yaml.MappingNode, group: str, seen: set[int]) -> None:
    if id(node) in seen:  # an alias of what it stands in
        return
    seen.add(id(node))
    lines: dict[str, int] = {}
    for key_node, value in node.value:
        if key_node.value == "<<":  # YAML merges all of them
            continue
        key = f"{group}{key_node.value}"
        line = key_node.start_mark.line + 1
        if key in lines:
            raise UsageError(
                f"configuration file {name!r}, line {line}: the key {key} stands in line {lines[key]} too, and one of them"
                " would be lost. Put them together."
            )
        lines[key] = line
        if isinstance(value, yaml.MappingNode):
            _check_keys(name, value, f"{key}.", seen)
        elif key in GROUPS:
            got = one_line(Exception(value.value), 40) if isinstance(value, yaml.ScalarNode) and value.value else "none"
            raise UsageError(
                f"configuration file {name!r}, line {line}: expected keys below {key}, got"
                f" {'a list' if isinstance(value, yaml.SequenceNode) else got}. Correct it or leave it out."
            )
