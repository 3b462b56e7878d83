# SPDX-License-Identifier: Apache-2.0
"""Runs that are killed and resumed are the uninterrupted run, bit for bit; signals save; damage is passed over."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import read_metrics
from tiny_run import LAST, assert_same_run, write_run
from zygote import Zygote

from mtp_lightning.checkpoint_files import newest_checkpoint, write_beside
from mtp_lightning.errors import RunError
from mtp_lightning.random_state import random_state, set_random_state
from mtp_lightning.trainer import MetricsWriter

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
def whole(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    write_run(folder)
    ended = zygote.run(folder, *FIT)
    assert ended.code == 0, ended.err
    assert "no complete checkpoint of this run in 'run/checkpoints': training begins at step 0." in ended.err
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


SIGNAL_AT = """
import os, signal
from mtp_lightning.module import MTPModule
whole, calls = MTPModule.training_step, 0

def training_step(self, *arguments):
    global calls
    calls += 1
    if calls == @AT:
        os.kill(os.getpid(), signal.@NAME)
    return whole(self, *arguments)

MTPModule.training_step = training_step
"""


def told(at: int, name: str = "SIGTERM") -> str:
    return SIGNAL_AT.replace("@AT", str(at)).replace("@NAME", name)


@pytest.mark.parametrize("at", [3, 6])
def test_sigterm_saves_and_exits(zygote: Zygote, whole: Path, tmp_path: Path, at: int) -> None:
    """At 6 a validation is due: it is finished first, and the step after it too."""
    folder = fresh(whole, tmp_path / "run")
    ended = zygote.run(folder, *FIT, prelude=told(at))
    step = 7 if at == 6 else at
    assert ended.code == 143
    assert ended.err.splitlines()[-1] == (f"mtp: SIGTERM: saved '{LAST}' after step {step}. Go on with --ckpt_path last.")
    assert torch.load(folder / LAST, weights_only=True)["global_step"] == step
    assert zygote.run(folder, *FIT).code == 0
    assert_same_run(folder, whole)


@pytest.mark.parametrize(("at", "when"), [(5, "before"), (5, "while"), (14, "before")])
def test_sigterm_around_an_evaluation(zygote: Zygote, whole: Path, tmp_path: Path, at: int, when: str) -> None:
    """A signal in a batch after which an evaluation is due, or while it decodes; and in the last batch of the run."""
    folder = fresh(whole, tmp_path / "run")
    prelude = told(at) if when == "before" else WHILE_EVALUATING.replace("@STEP", str(at))
    ended = zygote.run(folder, *FIT, prelude=prelude)
    assert ended.code == 143, ended.err
    assert torch.load(folder / LAST, weights_only=True)["global_step"] == at
    assert [step for _, step in history(folder)] == [step for _, step in history(whole) if step <= at]
    assert zygote.run(folder, *FIT).code == 0
    assert_same_run(folder, whole)
    assert history(folder) == history(whole) and ("val", 5) in history(whole)


WHILE_EVALUATING = """
import os, signal
from mtp_lightning import acceptance
from mtp_lightning.callbacks.acceptance_evaluation import AcceptanceEvaluation
whole, decode, step = AcceptanceEvaluation._evaluate, acceptance._decode, 0

def evaluate(self, trainer, module):
    global step
    step = trainer.global_step
    whole(self, trainer, module)

def decodes(*arguments, **options):
    if step == @STEP:
        os.kill(os.getpid(), signal.SIGTERM)
    return decode(*arguments, **options)

AcceptanceEvaluation._evaluate, acceptance._decode = evaluate, decodes
"""


def history(folder: Path) -> list[tuple[str, int]]:
    """Stage and step of the evaluations in a run's acceptance.json."""
    entries = json.loads((folder / "run/acceptance.json").read_text())["history"]
    return [(entry["stage"], entry["step"]) for entry in entries]


TIME_IS_UP = """
from lightning.pytorch.callbacks import Timer
from mtp_lightning.module import MTPModule
whole, calls = MTPModule.training_step, 0

def training_step(self, *arguments):
    global calls
    calls += 1
    return whole(self, *arguments)

MTPModule.training_step = training_step
Timer.time_elapsed = lambda self, stage="train": 0.0 if calls < @AT else 1e6
"""


@pytest.mark.parametrize(
    ("at", "step", "words"),
    [
        (3, 3, []),
        (6, 6, []),  # a validation is due
        (11, 11, []),  # the last batch of an epoch
        (3, 3, ["--trainer.limit_val_batches", 0]),
        (5, 2, ["--trainer.accumulate_grad_batches", 4, "--trainer.max_steps", 5]),  # a step takes 4 batches
        (2, 11, ["--trainer.min_steps", 4]),  # which Lightning takes for an epoch at least
    ],
)
def test_a_run_whose_time_is_up_goes_on(
    zygote: Zygote, whole: Path, tmp_path: Path, at: int, step: int, words: list[object]
) -> None:
    plain, folder = whole, fresh(whole, tmp_path / "run")
    if words:
        plain = fresh(whole, tmp_path / "plain")
        assert zygote.run(plain, *FIT, *words).code == 0
    ended = zygote.run(folder, *FIT, *words, "--trainer.max_time", "00:01:00:00", prelude=TIME_IS_UP.replace("@AT", str(at)))
    assert ended.code == 0 and "Time limit reached" in ended.err
    assert torch.load(folder / LAST, weights_only=True)["global_step"] == step
    ended = zygote.run(folder, *FIT, *words)
    assert ended.code == 0, ended.err
    assert f"Restoring states from the checkpoint path at {LAST}" in ended.err
    assert_same_run(folder, plain)
    assert history(folder) == history(plain)


STOPPED_EARLY = """
from mtp_lightning.callbacks import AcceptanceEvaluation as patched
whole = patched.on_validation_end

def on_validation_end(self, trainer, module):
    whole(self, trainer, module)
    trainer.should_stop = not trainer.sanity_checking

patched.on_validation_end = on_validation_end
"""


@pytest.mark.parametrize(
    ("step", "words"), [(6, []), (2, ["--trainer.accumulate_grad_batches", 4, "--trainer.max_steps", 5])]
)
def test_a_run_that_is_stopped_in_a_validation_goes_on(
    zygote: Zygote, whole: Path, tmp_path: Path, step: int, words: list[object]
) -> None:
    """The validation comes after 6 batches, in the second case in the middle of a step of 4."""
    plain, folder = whole, fresh(whole, tmp_path / "run")
    if words:
        plain = fresh(whole, tmp_path / "plain")
        assert zygote.run(plain, *FIT, *words).code == 0
    assert zygote.run(folder, *FIT, *words, prelude=STOPPED_EARLY).code == 0
    assert torch.load(folder / LAST, weights_only=True)["global_step"] == step
    assert zygote.run(folder, *FIT, *words).code == 0
    assert_same_run(folder, plain)
    assert history(folder) == history(plain)


def test_no_checkpoint_between_the_batches_of_a_step(zygote: Zygote, whole: Path, tmp_path: Path) -> None:
    """A step takes 4 batches, a validation comes every 6: the signal comes after 5 batches, and a validation in a step."""
    words = (*FIT, "--trainer.accumulate_grad_batches", 4, "--trainer.max_steps", 5)
    plain, folder = fresh(whole, tmp_path / "plain"), fresh(whole, tmp_path / "run")
    assert zygote.run(plain, *words).code == 0
    for at, step in ((5, 2), (4, 4)):  # the second is counted from the resumed run's first batch; an epoch has 11
        assert zygote.run(folder, *words, prelude=told(at)).code == 143
        assert torch.load(folder / LAST, weights_only=True)["global_step"] == step
    assert zygote.run(folder, *words).code == 0
    assert_same_run(folder, plain)


def test_slurm_is_asked_to_run_the_job_again(zygote: Zygote, whole: Path, tmp_path: Path) -> None:
    folder = fresh(whole, tmp_path / "run")
    command = folder / "bin" / "scontrol"
    command.parent.mkdir()
    command.write_text('#!/bin/sh\necho "$@" > requeued\n')
    command.chmod(0o755)
    slurm = {"SLURM_NTASKS": "1", "SLURM_JOB_ID": "77", "SLURM_JOB_NAME": "train", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    slurm |= {"SLURM_NODEID": "0", "SLURM_NODELIST": "localhost", "SLURM_NTASKS_PER_NODE": "1"}
    slurm["PATH"] = f"{command.parent}:{os.environ['PATH']}"
    ended = zygote.run(folder, *FIT, prelude=told(3, "SIGUSR1"), **slurm)
    assert ended.code == 143, ended.err
    assert f"mtp: SIGUSR1: saved '{LAST}' after step 3, job 77 requeued." in ended.err
    assert (folder / "requeued").read_text() == "requeue 77\n"
    assert zygote.run(folder, *FIT, **slurm).code == 0
    assert_same_run(folder, whole)


def run_name(folder: Path) -> str:
    return (folder / "run/run_id.txt").read_text().strip()


def test_an_earlier_runs_checkpoints_are_not_gone_on_from(zygote: Zygote, whole: Path, tmp_path: Path) -> None:
    """A run that begins anew in the folder of an earlier one and is killed before its first checkpoint."""
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    before = {path.name: path.read_bytes() for path in (folder / "run/checkpoints").iterdir()}
    last, best = LAST, LAST.replace("last", "best")
    killed = KILL.replace("@EVENT", "'optimizer'").replace("@NUMBER", "2").replace("@SECONDS", "0")
    ended = zygote.run(folder, *FIT[:-2], prelude=killed)
    assert ended.code == -signal.SIGKILL
    assert f"mtp: checkpoints of an earlier run are there ({best}, {last}), and this one begins at step 0: its" in ended.err
    assert {path.name: path.read_bytes() for path in (folder / "run/checkpoints").iterdir()} == before
    assert run_name(folder) != run_name(whole)
    validated = zygote.run(folder, "validate", *FIT[1:])
    assert validated.code == 1 and "no complete checkpoint of this run in 'run/checkpoints'." in validated.err
    killed = killed.replace("left = 2", "left = 3")
    ended = zygote.run(folder, *FIT, prelude=killed)  # killed again before its first checkpoint
    assert ended.code == -signal.SIGKILL
    for path in (last, best):
        said = f"mtp: checkpoint '{path}' is passed over: it belongs to an earlier run in this folder. To go on from it give"
        assert f"{said} --ckpt_path {path}." in ended.err
    assert "no complete checkpoint of this run in 'run/checkpoints': training begins at step 0." in ended.err
    named = tmp_path / "named"
    shutil.copytree(folder, named)
    assert zygote.run(folder, *FIT).code == 0
    assert_same_run(folder, whole)
    # By its name the earlier run can be gone on with; the folder is its own again, also for the start after a kill.
    words = (*FIT[:-1], best, "--trainer.max_steps", 16)
    assert zygote.run(named, *words, prelude=killed.replace("left = 3", "left = 1")).code == -signal.SIGKILL
    assert run_name(named) == run_name(whole)
    ended = zygote.run(named, *FIT[:-1], "last", "--trainer.max_steps", 16)
    assert ended.code == 0 and f"Restoring states from the checkpoint path at {last}" in ended.err


def test_a_start_that_fails_takes_no_folder_over(zygote: Zygote, whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    (folder / "base/model.safetensors").unlink()  # all but the last thing that is loaded is there
    assert zygote.run(folder, *FIT[:-2]).code == 1
    assert run_name(folder) == run_name(whole)


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


def test_validate_adds_to_the_history_at_the_checkpoints_step(zygote: Zygote, whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    best = LAST.replace("last", "best")
    step = torch.load(folder / best, weights_only=True)["global_step"]

    before, lines = history(folder), read_metrics(folder / "run")
    of_the_step = next(line for line in lines if line.get("val/loss") and int(line["step"]) == step - 1)
    ended = zygote.run(folder, "validate", "--config", "config.yaml", "--ckpt_path", best)
    assert ended.code == 0, ended.err
    assert f"after {step} training steps" in ended.out
    assert history(folder) == [*(entry for entry in before if entry != ("val", step)), ("val", step)] and len(before) > 2
    *others, line = read_metrics(folder / "run")
    assert others == lines and (line["step"], line["epoch"]) == (of_the_step["step"], of_the_step["epoch"])
    assert line["val/loss"] == of_the_step["val/loss"]


def test_commands_that_only_read_need_a_checkpoint(zygote: Zygote, whole: Path, tmp_path: Path) -> None:
    folder = fresh(whole, tmp_path / "run")
    ended = zygote.run(folder, "validate", "--config", "config.yaml", "--ckpt_path", "last")
    assert ended.code == 1
    assert (
        ended.error
        == "no complete checkpoint of this run in 'run/checkpoints'. Give the path of a .ckpt file with --ckpt_path."
    )


def test_every_damage_is_seen(whole: Path, tmp_path: Path) -> None:
    good = (whole / LAST).read_bytes()
    middle = len(good) // 2
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


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    path.write_bytes(b"before")

    def fails(file: Any) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(RunError, match="could not be written: No space left on device. The checkpoint that"):
        write_beside(path, fails)
    assert path.read_bytes() == b"before" and os.listdir(tmp_path) == ["last.ckpt"]
    write_beside(path, lambda file: file.write(b"after"))
    assert path.read_bytes() == b"after" and os.listdir(tmp_path) == ["last.ckpt"]


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
