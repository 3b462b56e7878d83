# SPDX-License-Identifier: Apache-2.0
"""Runs that are killed and resumed are the uninterrupted run, bit for bit; signals save; damage is passed over."""

from __future__ import annotations

import random
import shutil
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_run import assert_same_run, write_run
from zygote import Zygote

FIT = ("fit", "--config", "config.yaml", "--ckpt_path", "last")

KILL = """
import os, signal, threading, time

def dies():
    os.kill(os.getpid(), signal.SIGKILL)

left = @NUMBER

def passes(name, when):
    global left
    if name == @EVENT:
        left -= 1
        if left == 0:
            dies()

def hook(owner, name, event, after=False):
    whole = getattr(owner, name)
    def wrapped(*arguments, **options):
        if not after:
            passes(event, name)
        result = whole(*arguments, **options)
        if after:
            passes(event, name)
        return result
    setattr(owner, name, wrapped)

from pathlib import Path
from mtp_lightning.module import MTPModule
from mtp_lightning.trainer.metrics_writer import MetricsWriter
from mtp_lightning import acceptance, checkpoint_files
import torch

hook(MTPModule, "training_step", "forward")
hook(torch.optim.AdamW, "step", "optimizer", after=True)
hook(checkpoint_files._Watched, "write", "checkpoint")
hook(Path, "replace", "rename")
hook(checkpoint_files, "_sync_folder", "renamed")
hook(MTPModule, "validation_step", "validation")
hook(acceptance, "_decode", "decoding", after=True)
hook(MetricsWriter, "save", "metrics")
if @EVENT == "time":
    def later(*arguments):
        threading.Thread(target=lambda: (time.sleep(@SECONDS), dies()), daemon=True).start()
    first = MTPModule.on_train_start
    MTPModule.on_train_start = lambda self: (later(), first(self))[1]
"""
MOST = {
    "forward": 6,
    "optimizer": 6,
    "checkpoint": 200,
    "rename": 3,
    "renamed": 3,
    "validation": 3,
    "decoding": 6,
    "metrics": 12,
}
"""Each moment of a run where it may be killed, and how often it comes in a few steps."""


@pytest.fixture(scope="module")
def zygote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    started = Zygote(tmp_path_factory.mktemp("cache"))
    yield started
    started.close()


@pytest.fixture(scope="module")
def whole(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    write_run(folder)
    ended = zygote.run(folder, *FIT)
    assert ended.code == 0, ended.err
    assert "no complete checkpoint in 'run/checkpoints': training begins at step 0." in ended.err
    return folder


def fresh(whole: Path, folder: Path) -> Path:
    """A folder to run in from the beginning."""
    shutil.copytree(whole, folder, ignore=lambda at, names: {"run"} & set(names))
    return folder


def killed_runs(zygote: Zygote, whole: Path, parent: Path, kills: int, seed: int) -> Counter[str]:
    """Kill runs at random moments and resume them until they end; gives how often each moment was met."""
    draw, met, number = random.Random(seed), Counter[str](), 0
    order = [*MOST, "time"]
    draw.shuffle(order)
    folder = fresh(whole, parent / "0")
    for _ in range(4 * kills):
        done = sum(met.values())
        event = order[done % len(order)] if done < kills else ""
        choice = {"EVENT": event, "NUMBER": draw.randint(1, MOST.get(event, 1)), "SECONDS": draw.uniform(0, 1.5)}
        prelude = KILL
        for name, value in choice.items():
            prelude = prelude.replace(f"@{name}", repr(value))
        ended = zygote.run(folder, *FIT, prelude=prelude)
        assert ended.code in (0, -signal.SIGKILL), ended.err
        if ended.code:
            met[event] += 1
            continue
        assert_same_run(folder, whole)
        if done == kills:
            break
        number += 1
        folder = fresh(whole, parent / str(number))
    return met


def test_three_kills_and_the_run_is_the_uninterrupted_one(zygote: Zygote, whole: Path, tmp_path: Path) -> None:
    assert sum(killed_runs(zygote, whole, tmp_path, 3, seed=1).values()) == 3


@pytest.mark.slow
def test_twenty_kills(zygote: Zygote, whole: Path, tmp_path: Path) -> None:
    met = killed_runs(zygote, whole, tmp_path, 20, seed=0)
    assert sum(met.values()) == 20 and len(met) == len(MOST) + 1, met
