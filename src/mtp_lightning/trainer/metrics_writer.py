# SPDX-License-Identifier: Apache-2.0
"""MetricsWriter: writes ``metrics.csv`` so that a run that was killed and resumed has each line once."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.csv_logs import ExperimentWriter

from mtp_lightning.files import atomic_file


class MetricsWriter(ExperimentWriter):
    """Writes ``metrics.csv``: appends to the file, or replaces it when the first figures are written.

    Lightning's own deletes an existing file as soon as a trainer starts in its folder.
    """

    def __init__(self, log_dir: str, append: bool) -> None:
        self.append = append
        self._opened = False
        super().__init__(log_dir)
        self._path = Path(self.metrics_file_path)

    def _check_log_dir_exists(self) -> None:
        """Delete nothing."""

    def _open(self) -> None:
        """Take over an existing file, once."""
        if self._opened:
            return
        self._opened = True
        if not self.append:
            self._path.unlink(missing_ok=True)
        elif self._path.is_file():
            with self._path.open(newline="") as file:
                self.metrics_keys = next(csv.reader(file), [])

    def save(self) -> None:
        """Write what was logged since the last call. A new name changes the first line, so the file is rewritten."""
        if not self.metrics:
            return
        self._open()
        names = sorted({*self.metrics_keys, *(name for line in self.metrics for name in line)})
        if names != self.metrics_keys or not self._path.is_file():
            self.metrics_keys = names
            self._rewrite(self._lines() + self.metrics)
        else:
            with self._path.open("a", newline="") as file:
                csv.DictWriter(file, self.metrics_keys).writerows(self.metrics)
        self.metrics = []

    def num_lines(self) -> int:
        """Number of lines in the file, without the header, after everything that was logged is written."""
        self.save()
        self._open()
        return len(self._lines())

    def keep(self, num_lines: int) -> None:
        """Keep the lines that were there at the checkpoint; what a run wrote after it is going to be measured again."""
        self._open()
        lines = self._lines()
        if len(lines) > num_lines:
            self._rewrite(lines[:num_lines])

    def _lines(self) -> list[dict[str, Any]]:
        if not self._path.is_file():
            return []
        with self._path.open(newline="") as file:
            return list(csv.DictReader(file))

    def _rewrite(self, lines: list[dict[str, Any]]) -> None:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self.metrics_keys)
        writer.writeheader()
        writer.writerows(lines)
        with atomic_file(self._path) as file:
            file.write(text.getvalue().encode())
