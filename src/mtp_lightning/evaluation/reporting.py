# SPDX-License-Identifier: Apache-2.0
"""What all reports share: numbers as text, Markdown tables, JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from mtp_lightning.files import atomic_file


def decimals(value: float | None) -> str:
    """Two decimals, or a dash for a missing value."""
    return "-" if value is None else f"{value:.2f}"


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """The lines of a Markdown table."""
    yield f"| {' | '.join(header)} |"
    yield f"|{'---|' * len(header)}"
    for row in rows:
        yield f"| {' | '.join(row)} |"


def save_json(data: Any, path: Path) -> None:
    """Write JSON atomically; NaN is refused."""
    text = json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    with atomic_file(path) as file:
        file.write(text.encode())
