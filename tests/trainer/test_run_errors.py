# SPDX-License-Identifier: Apache-2.0
"""What fails in a run and is not a bug: a full disk, a folder that can't be written, a worker or a process that dies."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from interrupted_runs import FIT, fresh
from tiny_run import LAST, assert_same_run
from zygote import Zygote

KILLED_AT = """
import os, signal
from mtp_lightning.@MODULE import @CLASS as patched
whole, calls = patched.@METHOD, 0

def method(self, *arguments):
    global calls
    calls += 1
    if calls == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return whole(self, *arguments)

patched.@METHOD = method
"""


def dies_in(module: str, name: str, method: str) -> str:
    """Code after which the third call of a method kills its process."""
    return KILLED_AT.replace("@MODULE", module).replace("@CLASS", name).replace("@METHOD", method)


@pytest.fixture
def disk(whole: Path, tmp_path: Path) -> Iterator[Path]:
    """A folder to run in whose ``run`` is a disk of its own of 450 kB, enough for all but a second ``last.ckpt``."""
    folder = fresh(whole, tmp_path / "here")
    (folder / "run").mkdir()
    if not mount("-t", "tmpfs", "-o", "size=450k", "tmpfs", str(folder / "run")):
        pytest.skip("this user may not mount a file system")
    yield folder
    subprocess.run(["umount", str(folder / "run")], check=True)


def mount(*words: str) -> bool:
    command = shutil.which("mount")
    return command is not None and subprocess.run([command, *words], capture_output=True).returncode == 0


@pytest.mark.slow
def test_a_full_disk(zygote: Zygote, whole: Path, disk: Path) -> None:
    ended = zygote.run(disk, *FIT)
    assert ended.code == 1 and LAST in ended.error and "No space left on device" in ended.error
    steps = {
        name: torch.load(disk / LAST.replace("last", name), weights_only=True)["global_step"] for name in ("last", "best")
    }
    assert steps == {"last": 4, "best": 6} and not list((disk / "run/checkpoints").glob("*.part"))
    assert mount("-o", "remount,size=2m", str(disk / "run"))
    assert zygote.run(disk, *FIT).code == 0
    assert_same_run(disk, whole)


def test_a_file_in_the_place_of_the_folder(zygote: Zygote, whole: Path, tmp_path: Path) -> None:
    folder = fresh(whole, tmp_path / "here")
    (folder / "run").write_text("in the way")
    ended = zygote.run(folder, *FIT)
    assert ended.code == 1 and ended.error.startswith("the run's folder 'run' can't be written: ")
    assert (folder / "run").read_text() == "in the way"


def test_a_data_worker_that_dies(zygote: Zygote, whole: Path, tmp_path: Path) -> None:
    folder = fresh(whole, tmp_path / "here")
    prelude = dies_in("data.collator", "MaskedInputCollator", "__call__")
    ended = zygote.run(folder, *FIT, "--data.num_workers", 1, "--trainer.num_sanity_val_steps", 0, prelude=prelude)
    assert ended.code == 1 and "data.num_workers" in ended.error


@pytest.mark.slow
def test_a_process_of_several_that_dies(zygote: Zygote, whole: Path, tmp_path: Path) -> None:
    folder = fresh(whole, tmp_path / "here")
    words = [*FIT, "--trainer.devices", 2, "--trainer.strategy", "ddp", "--trainer.val_check_interval", 2]
    preludes = ["", dies_in("training.module", "MTPModule", "training_step")]
    first, second = (process.wait() for process in zygote.ranks(folder, words, words, preludes=preludes))
    assert (first.code, second.code) == (1, -9)
    assert first.error.startswith("another process of this run has ended")
    assert torch.load(folder / LAST, weights_only=True)["global_step"] == 2
