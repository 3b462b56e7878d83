# SPDX-License-Identifier: Apache-2.0
"""Checks a configuration file before it is parsed: it exists, is YAML and has groups of keys, each key once."""

from __future__ import annotations

from typing import Any

import yaml

from mtp_lightning.errors import RunError, UsageError, one_line, os_reason


class _UniqueKeys(yaml.SafeLoader):
    """A loader that refuses a key given twice, of which YAML would keep the last."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        """A dict; a ConstructorError for a key given twice."""
        found = set[str]()
        for key, _ in node.value:
            if key.value in found and key.tag != "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(None, None, f"the key {key.value} is given twice", key.start_mark)
            found.add(key.value)
        return super().construct_mapping(node, deep)


def read_configuration(path: str) -> dict[str, Any]:
    """The content of a configuration file; errors name the file, which the parser's don't."""
    try:
        with open(path, encoding="utf-8") as file:
            content: Any = yaml.load(file, _UniqueKeys)
    except OSError as error:
        raise RunError(f"configuration file {path!r} can't be read: {os_reason(error)}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"configuration file {path!r} is not valid YAML: {one_line(error)}.") from error
    _check_group(path, "", content)
    for name in ("model", "data", "trainer"):
        if name in content:
            _check_group(path, name, content[name])
    if "lora" in content.get("model", {}):
        _check_group(path, "model.lora", content["model"]["lora"])
    return dict(content)


def _check_group(path: str, name: str, value: Any) -> None:
    if not isinstance(value, dict):
        below = f" below {name}" if name else ""
        raise UsageError(f"configuration file {path!r}: expected keys{below}, got {one_line(str(value), 40)}.")
