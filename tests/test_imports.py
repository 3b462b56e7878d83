# SPDX-License-Identifier: Apache-2.0
"""What a bare import loads, and how every source file opens."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import mtp_lightning

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "mtp_lightning"


def python_files(*folders: Path) -> list[Path]:
    return sorted(path for folder in folders for path in folder.rglob("*.py"))


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_model_works_without_lightning() -> None:
    # None in sys.modules makes every later import of that name raise ImportError.
    blocked = "import sys; sys.modules.update(lightning=None, pytorch_lightning=None)"
    done = python(f"{blocked}; from mtp_lightning import MTPModel")
    assert done.returncode == 0, done.stderr


def test_bare_import_is_light() -> None:
    heavy = ["lightning", "pytorch_lightning", "transformers", "peft", "datasets", "torch"]
    done = python(f"import sys, mtp_lightning; print([name for name in {heavy} if name in sys.modules])")
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


def test_no_file_needs_what_windows_lacks() -> None:
    posix_only = {"fcntl", "grp", "pty", "pwd", "readline", "resource", "syslog", "termios", "tty"}
    for path in python_files(PACKAGE):
        body = ast.parse(path.read_text(encoding="utf-8")).body
        names = {alias.name for node in body if isinstance(node, ast.Import) for alias in node.names}
        names |= {node.module or "" for node in body if isinstance(node, ast.ImportFrom)}
        assert not names & posix_only, path


def test_public_names() -> None:
    assert set(mtp_lightning.__all__) <= set(dir(mtp_lightning))
    for name in mtp_lightning.__all__:
        assert getattr(mtp_lightning, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'MTPModle'"):
        mtp_lightning.MTPModle  # noqa: B018


def test_every_source_file_opens_with_licence_and_docstring() -> None:
    paths = python_files(PACKAGE, ROOT / "tests", ROOT / "scripts", ROOT / "benchmarks")
    assert Path(__file__).resolve() in paths
    for path in paths:
        text = path.read_text()
        first = next(line for line in [*text.splitlines(), ""] if not line.startswith("#!"))
        assert first == "# SPDX-License-Identifier: Apache-2.0", f"{path.relative_to(ROOT)}: no SPDX line on top"
        assert ast.get_docstring(ast.parse(text)), f"{path.relative_to(ROOT)}: no docstring"


LONG_STABLE = {"_version", "_forward_hooks", "_forward_pre_hooks"}  # torch's
SINGLE_USE = {"_actions": "parser.py", "_fingerprint": "tables.py"}  # argparse's, datasets'
PACKED_OPERATORS = {"_linear_pointwise": "packed_linear.py", "_reorder_linear_weight": "packed_linear.py"}  # torch's


def test_private_attributes_of_libraries_are_touched_in_one_file_per_library() -> None:
    """``*_private.py`` hold them; a method that overrides a library's may call it through ``super()``."""
    for path in python_files(PACKAGE):
        if path.name.endswith("_private.py"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Attribute) or not node.attr.startswith("_") or node.attr.startswith("__"):
                continue
            owner = ast.unparse(node.value)
            is_ours = owner in ("self", "cls", "super()") or node.attr in ("_replace", "_asdict", "_fields")
            is_known = node.attr in LONG_STABLE or {**SINGLE_USE, **PACKED_OPERATORS}.get(node.attr) == path.name
            assert is_ours or is_known, f"{path.relative_to(ROOT)}, line {node.lineno}: {owner}.{node.attr}"
