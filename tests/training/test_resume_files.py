# SPDX-License-Identifier: Apache-2.0
"""Files of a run: damage is seen and passed over, writing leaves what was there, figures stand once."""

from __future__ import annotations

import os
import random
import shutil
import time
import zipfile
from pathlib import Path

import numpy as np
import torch
from command_line import read_metrics
from interrupted_runs import FIT, fresh, run_name, told
from tiny_run import LAST, assert_same_run
from zygote import Zygote

from mtp_lightning.saving.checkpoint_files import newest_checkpoint
from mtp_lightning.trainer import MetricsWriter
from mtp_lightning.training.random_state import random_state, set_random_state


def test_last_is_preferred_to_another_of_the_same_step(whole: Path, tmp_path: Path) -> None:
    for number, name in enumerate(("last", "later", "older")):
        checkpoint = torch.load(whole / LAST, weights_only=True)
        torch.save({**checkpoint, "global_step": 14 - (name == "older")}, tmp_path / f"{name}.ckpt")
        os.utime(tmp_path / f"{name}.ckpt", ns=(0, number * 10**9))
    run = run_name(whole)
    assert newest_checkpoint([tmp_path], run) == tmp_path / "older.ckpt"
    (tmp_path / "older.ckpt").unlink()
    assert newest_checkpoint([tmp_path], run) == tmp_path / "last.ckpt"
    assert newest_checkpoint([tmp_path], "another") is None
    (tmp_path / "last.ckpt").write_bytes(b"cut")
    assert newest_checkpoint([tmp_path], run) == newest_checkpoint([tmp_path]) == tmp_path / "later.ckpt"


def test_a_damaged_checkpoint_is_passed_over(zygote: Zygote, whole: Path, tmp_path: Path) -> None:
    folder = fresh(whole, tmp_path / "run")
    assert zygote.run(folder, *FIT, prelude=told(9)).code == 143
    last, best = folder / LAST, folder / LAST.replace("last", "best")
    assert best.is_file()
    last.write_bytes(last.read_bytes()[:-1000])
    (last.parent / "last.ckpt.part").write_bytes(b"half")  # what a killed run may leave
    ended = zygote.run(folder, *FIT)
    assert ended.code == 0
    assert f"mtp: checkpoint '{LAST}' is passed over: it is cut short or no checkpoint." in ended.err
    assert "Restoring states from the checkpoint path at run/checkpoints/best.ckpt" in ended.err
    assert_same_run(folder, whole)


def test_every_damage_is_seen(whole: Path, tmp_path: Path) -> None:
    good = (whole / LAST).read_bytes()
    with zipfile.ZipFile(whole / LAST) as archive:
        content = archive.read(max(archive.infolist(), key=lambda entry: entry.file_size))
    middle = good.index(content) + len(content) // 2  # between entries there is padding, which nobody reads
    kinds = {
        "cut": good[:middle],
        "empty": b"",
        "text": b"hello",
        "flipped": good[:middle] + bytes([good[middle] ^ 255]) + good[middle + 1 :],
    }
    now = time.time_ns()
    for number, (name, content) in enumerate(kinds.items(), 1):
        (tmp_path / f"{name}.ckpt").write_bytes(content)
        os.utime(tmp_path / f"{name}.ckpt", ns=(now, now + number * 10**9))
    shutil.copy(whole / LAST, tmp_path / "good.ckpt")
    os.utime(tmp_path / "good.ckpt", ns=(now, now))
    torch.save({"mtp_settings": {}, "state_dict": {}}, tmp_path / "weights.ckpt")
    os.utime(tmp_path / "weights.ckpt", ns=(now, now + 10**11))
    said: list[str] = []
    assert newest_checkpoint([tmp_path / "no folder", tmp_path], warn=said.append) == tmp_path / "good.ckpt"
    assert [line.split("'")[1].rpartition("/")[2].partition(".")[0] for line in said] == ["weights", *reversed(kinds)]
    assert "it holds weights alone" in said[0] and "is damaged" in said[1]


def test_random_state_comes_back() -> None:
    def draws() -> list[float]:
        return [random.random(), random.gauss(0, 1), float(np.random.standard_normal()), torch.rand(()).item()]

    draws()
    state = random_state()
    first = draws()
    draws()
    set_random_state(state)
    assert draws() == first


def test_figures_that_a_resumed_run_measures_again_are_dropped(tmp_path: Path) -> None:
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
    assert read_metrics(tmp_path) == [
        {"a": "0", "step": "0"},
        {"a": "1", "step": "1"},
        {"a": "2", "step": "2"},
        {"a": "3.0", "c": "1.0", "step": "3"},
    ]
    other = MetricsWriter(str(tmp_path), append=False)
    other.log_metrics({"a": 9}, 0)
    other.save()
    assert read_metrics(tmp_path) == [{"a": "9", "step": "0"}]
