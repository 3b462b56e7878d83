# SPDX-License-Identifier: Apache-2.0
"""``mtp distill`` in a process that can be killed (which must be able to import this file), its prompts and its rows."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

WORDS = "one two three four five six".split()


def distill(words: list[str]) -> None:
    """Run the command, quietly."""
    import torch

    from mtp_lightning.commands.cli import main

    torch.set_num_threads(1)
    sys.stderr = open(os.devnull, "w")
    main(["distill", *words])


def questions(number: int) -> list[dict]:
    return [
        {"id": f"q{row}", "prompt": " ".join(WORDS[(row + place) % 6] for place in range(1 + row % 5)), "domain": "d"}
        if row % 2
        else {"messages": [{"role": "user", "content": WORDS[row % 6]}], "id": row}
        for row in range(number)
    ]


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
