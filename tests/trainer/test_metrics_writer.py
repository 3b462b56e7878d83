# SPDX-License-Identifier: Apache-2.0
"""MetricsWriter: each figure is in the file once, whatever was written before."""

from __future__ import annotations

from pathlib import Path

from command_line import read_metrics

from mtp_lightning.trainer import MetricsWriter


def test_lines_after_the_checkpoint_are_dropped(tmp_path: Path) -> None:
    writer = MetricsWriter(str(tmp_path), append=False)
    for step in range(3):
        writer.log_metrics({"a": step}, step)
    assert writer.num_lines() == 3
    writer.log_metrics({"b": 1.5}, 3)  # a new name: the first line changes
    assert writer.num_lines() == 4
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write("4,")  # a line that a kill cut short
    again = MetricsWriter(str(tmp_path), append=True)
    again.keep(3)
    again.log_metrics({"a": 3.0, "c": 1.0}, 3)
    again.save()
    kept = [{"a": str(step), "step": str(step)} for step in range(3)]
    assert read_metrics(tmp_path) == [*kept, {"a": "3.0", "c": "1.0", "step": "3"}]
    other = MetricsWriter(str(tmp_path), append=False)
    other.log_metrics({"a": 9}, 0)
    other.save()
    assert read_metrics(tmp_path) == [{"a": "9", "step": "0"}]
