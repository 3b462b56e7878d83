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
    """Writes ``metrics.csv``. Lightning's own deletes the file that is there as soon as a trainer is started on its folder.

    Args:
        log_dir: the run's folder.
        append: add to the file that is there, if any; else replace it when the first figures are written.
    """

    def __init__(self, log_dir: str, append: bool) -> None:
        self.append = append
        self._opened = False
        super().__init__(log_dir)

    def _check_log_dir_exists(self) -> None:
        """Delete nothing."""

    def _open(self) -> None:
        """Take over the file that is there, once."""
        path = Path(self.metrics_file_path)
        if self._opened or not path.is_file():
            self._opened = True
            return
        self._opened = True
        if self.append:
            with path.open(newline="") as file:
                self.metrics_keys = next(csv.reader(file), [])
        else:
            path.unlink()

    def save(self) -> None:
        """Write what was logged since the last time. A new name changes the first line, so the file is written anew."""
        if not self.metrics:
            return
        self._open()
        path = Path(self.metrics_file_path)
        new_keys = self._record_new_keys()
        if new_keys and path.is_file():
            self._write(self._lines() + self.metrics)
        else:
            there = path.is_file()
            with path.open("a", newline="") as file:
                writer = csv.DictWriter(file, self.metrics_keys)
                if not there:
                    writer.writeheader()
                writer.writerows(self.metrics)
        self.metrics = []

    def num_lines(self) -> int:
        """Lines in the file after everything that was logged is written.

        Returns:
            Their number, the names not counted.
        """
        self.save()
        self._open()
        return len(self._lines())

    def keep(self, num_lines: int) -> None:
        """Drop what a run wrote after the checkpoint that it is resumed from: it is going to be measured again.

        Args:
            num_lines: lines that the file had when the checkpoint was written.
        """
        self._open()
        lines = self._lines()
        if len(lines) > num_lines:
            self._write(lines[:num_lines])

    def _lines(self) -> list[dict[str, Any]]:
        path = Path(self.metrics_file_path)
        if not path.is_file():
            return []
        with path.open(newline="") as file:
            return list(csv.DictReader(file))

    def _write(self, lines: list[dict[str, Any]]) -> None:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self.metrics_keys)
        writer.writeheader()
        writer.writerows(lines)
        with atomic_file(self.metrics_file_path) as file:
            file.write(text.getvalue().encode())
