# SPDX-License-Identifier: Apache-2.0
"""Killing and stopping a run at a chosen moment, and looking at what it left. Helpers of the tests, no tests."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

FIT = ("fit", "--config", "config.yaml", "--ckpt_path", "auto")
ACCUMULATED = ("--trainer.accumulate_grad_batches", 4, "--trainer.max_steps", 5)
"""Optimizer steps of 4 batches, while a validation comes every 6 and an epoch has 11."""

KILL = """
import io, os, signal, threading, time

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
from mtp_lightning.training.module import MTPModule
from mtp_lightning.trainer.metrics_writer import MetricsWriter
from mtp_lightning.evaluation import acceptance
from mtp_lightning import files
import torch

hook(MTPModule, "training_step", "forward")
hook(torch.optim.AdamW, "step", "optimizer", after=True)
class Watched(io.FileIO):
    def write(self, data):
        passes("checkpoint", "write")
        return super().write(data)

files.open = Watched
hook(Path, "replace", "rename")
hook(files, "_sync_folder", "renamed")
hook(MTPModule, "validation_step", "validation")
hook(acceptance, "decode_batch", "decoding", after=True)
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


SIGNAL_AT = """
import os, signal
from mtp_lightning.training.module import MTPModule
whole, calls = MTPModule.training_step, 0

def training_step(self, *arguments):
    global calls
    calls += 1
    if calls == @AT:
        os.kill(os.getpid(), signal.@NAME)
    return whole(self, *arguments)

MTPModule.training_step = training_step
"""


def signal_at(at: int, name: str = "SIGTERM") -> str:
    """Code after which a process sends itself a signal in the given training batch, counted from 1."""
    return SIGNAL_AT.replace("@AT", str(at)).replace("@NAME", name)


def fresh(whole: Path, folder: Path) -> Path:
    """A folder to run in from the beginning."""
    shutil.copytree(whole, folder, ignore=lambda at, names: {"run"} & set(names))
    return folder


def evaluated(folder: Path) -> list[int]:
    """The optimizer steps with figures of real decoding in a run's metrics.csv, if there is one."""
    path = folder / "run/metrics.csv"
    lines = csv.DictReader(path.read_text().splitlines()) if path.exists() else ()
    return [int(line["step"]) + 1 for line in lines if line.get("val/acceptance_length")]


def run_name(folder: Path) -> str:
    return (folder / "run/run_id.txt").read_text().strip()
