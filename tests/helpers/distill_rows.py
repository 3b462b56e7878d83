# SPDX-License-Identifier: Apache-2.0
"""Prompts for ``mtp distill``, and the rows it wrote."""

from __future__ import annotations

import json
from pathlib import Path

WORDS = "one two three four five six".split()


def questions(number: int) -> list[dict]:
    return [
        {"id": f"q{row}", "prompt": " ".join(WORDS[(row + n) % 6] for n in range(1 + row % 5)), "domain": "d", "raw": True}
        if row % 2
        else {"messages": [{"role": "user", "content": WORDS[row % 6]}], "id": row}
        for row in range(number)
    ]


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
