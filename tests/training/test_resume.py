# SPDX-License-Identifier: Apache-2.0
"""Runs that are killed and resumed are the uninterrupted run, bit for bit; signals save."""

from __future__ import annotations

import os
import random
import signal
from collections import Counter
from pathlib import Path

import pytest
import torch
from interrupted_runs import FIT, KILL, MOST, fresh, history, told
from tiny_run import LAST, assert_same_run
from zygote import Zygote


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
from mtp_lightning.evaluation import acceptance
from mtp_lightning.callbacks.acceptance_evaluation import AcceptanceEvaluation
whole, decode, step = AcceptanceEvaluation._evaluate, acceptance.decode_batch, 0

def evaluate(self, trainer, module):
    global step
    step = trainer.global_step
    whole(self, trainer, module)

def decodes(*arguments, **options):
    if step == @STEP:
        os.kill(os.getpid(), signal.SIGTERM)
    return decode(*arguments, **options)

AcceptanceEvaluation._evaluate, acceptance.decode_batch = evaluate, decodes
"""


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
