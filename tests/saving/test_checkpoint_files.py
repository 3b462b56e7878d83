# SPDX-License-Identifier: Apache-2.0
"""The newest complete checkpoint of a run: damage is detected, and last.ckpt is preferred."""

from __future__ import annotations

import os
import shutil
import zipfile
from pathlib import Path

import torch
from interrupted_runs import run_name
from tiny_run import LAST

from mtp_lightning.saving.checkpoint_files import newest_checkpoint


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


def test_every_damage_is_detected(whole: Path, tmp_path: Path) -> None:
    good = (whole / LAST).read_bytes()
    with zipfile.ZipFile(whole / LAST) as archive:
        content = archive.read(max(archive.infolist(), key=lambda entry: entry.file_size))
    middle = good.index(content) + len(content) // 2  # between entries there is padding, which is never read
    damaged = {
        "cut": good[:middle],
        "empty": b"",
        "text": b"hello",
        "flipped": good[:middle] + bytes([good[middle] ^ 255]) + good[middle + 1 :],
    }
    for name, content in damaged.items():
        (tmp_path / f"{name}.ckpt").write_bytes(content)
    torch.save({"mtp_settings": {}, "state_dict": {}}, tmp_path / "weights.ckpt")
    shutil.copy(whole / LAST, tmp_path / "good.ckpt")
    for number, name in enumerate(("good", *damaged, "weights")):
        os.utime(tmp_path / f"{name}.ckpt", ns=(0, number * 10**9))
    warnings: list[str] = []
    assert newest_checkpoint([tmp_path / "no folder", tmp_path], warn=warnings.append) == tmp_path / "good.ckpt"
    assert [line.split("'")[1].rpartition("/")[2] for line in warnings] == [
        f"{name}.ckpt" for name in ("weights", *reversed(damaged))
    ]
