# SPDX-License-Identifier: Apache-2.0
"""The adapter in pretrained/ is what its card says: small, in bfloat16, and whole."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from safetensors.torch import load_file

FOLDER = Path(__file__).parents[2] / "pretrained" / "smollm2-135m"


def test_the_shipped_adapter() -> None:
    files = json.loads((FOLDER / "mtp_config.json").read_text())["files"]
    assert {name: hashlib.sha256((FOLDER / name).read_bytes()).hexdigest() for name in files} == files
    weights = [value for path in FOLDER.glob("*.safetensors") for value in load_file(path).values()]
    assert {value.dtype for value in weights} == {torch.bfloat16}
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 30e6  # bytes; a clone carries them
