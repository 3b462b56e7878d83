# SPDX-License-Identifier: Apache-2.0
"""What fails in a run and is not a bug: a full disk, a folder that can't be written, a worker or a process that dies."""

from __future__ import annotations

import errno
import threading
from pathlib import Path

import pytest
import torch
from interrupted_runs import FIT, fresh
from tiny_run import LAST, assert_same_run
from zygote import Zygote

from mtp_lightning.trainer.run_errors import quiet_full_disks

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


FULL_DISK = """
import io
from mtp_lightning import files
saves = 0

class Disk(io.FileIO):
    def write(self, data):
        if saves == 2:
            raise OSError(28, "No space left on device")
        return super().write(data)

def opens(path, mode):
    global saves
    saves += path.name.startswith("last.ckpt")
    return Disk(path, mode)

files.open = opens
"""


@pytest.mark.slow
def test_a_full_disk(zygote: Zygote, whole: Path, tmp_path: Path) -> None:
    """There is no room for the second last.ckpt: the first one is intact, and the run resumes from the best."""
    folder = fresh(whole, tmp_path / "here")
    ended = zygote.run(folder, *FIT, prelude=FULL_DISK)
    assert ended.code == 1 and LAST in ended.error and "No space left on device" in ended.error
    paths = [folder / LAST.replace("last", name) for name in ("last", "best")]
    assert [torch.load(path, weights_only=True)["global_step"] for path in paths] == [4, 6]
    assert not list((folder / "run/checkpoints").glob("*.part"))
    assert zygote.run(folder, *FIT).code == 0
    assert_same_run(folder, whole)


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


class Writer(threading.Thread):
    """TensorBoard's."""

    __module__ = "tensorboard.summary.writer"


def test_a_writer_whose_disk_is_full_prints_nothing(capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threading, "excepthook", threading.__excepthook__)
    quiet_full_disks()
    full, missing = OSError(errno.ENOSPC, "full"), OSError(errno.ENOENT, "missing")
    for kind, error, is_shown in ((Writer, full, False), (Writer, missing, True), (threading.Thread, full, True)):

        def fail(error: OSError = error) -> None:
            raise error

        thread = kind(target=fail)
        thread.start()
        thread.join()
        assert ("Traceback" in capsys.readouterr().err) == is_shown
