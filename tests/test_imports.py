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
