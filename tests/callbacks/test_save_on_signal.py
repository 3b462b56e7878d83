# SPDX-License-Identifier: Apache-2.0
"""SaveOnSignal: runs that are stopped by a signal save, and resume as the run that was not stopped."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from command_line import read_metrics
from interrupted_runs import ACCUMULATED, FIT, evaluated, fresh, signal_at
from tiny import tiny_model
from tiny_run import LAST, assert_same_run
from zygote import Zygote

from mtp_lightning.callbacks import AcceptanceEvaluation, acceptance_evaluation
from mtp_lightning.callbacks.save_on_signal import EvaluationStopped

WHILE_EVALUATING = """
import os, signal
from mtp_lightning.evaluation import acceptance
from mtp_lightning.callbacks.acceptance_evaluation import AcceptanceEvaluation
whole, decode, step = AcceptanceEvaluation._evaluate, acceptance.decode_batch, 0

def evaluate(self, trainer, module):
    global step
    step = trainer.global_step
    return whole(self, trainer, module)

def decodes(*arguments, **options):
    if step == 5:
        os.kill(os.getpid(), signal.SIGTERM)
    return decode(*arguments, **options)

AcceptanceEvaluation._evaluate, acceptance.decode_batch = evaluate, decodes
"""


STOPS = [(signal_at(3), 3), (WHILE_EVALUATING, 5), (signal_at(1), 7), (signal_at(7), 14)]
"""In a batch, in an evaluation, where a validation is due, and in the last batch, with the step that is saved.

The number of a batch is counted from each start. In step 6 a validation is due: it and the step after it are finished.
"""


@pytest.mark.parametrize("stops", [STOPS[:1], pytest.param(STOPS, marks=pytest.mark.slow)])
def test_sigterm_saves_and_exits(zygote: Zygote, whole: Path, tmp_path: Path, stops: list[tuple[str, int]]) -> None:
    folder = fresh(whole, tmp_path / "run")
    for prelude, step in stops:
        ended = zygote.run(folder, *FIT, prelude=prelude)
        assert ended.code == 143, ended.err
        assert f"mtp: SIGTERM: saved '{LAST}' after step {step}." in ended.err.splitlines()[-1]
        assert torch.load(folder / LAST, weights_only=True)["global_step"] == step
        assert evaluated(folder) == [at for at in evaluated(whole) if at <= step] if step >= 5 else True
    assert zygote.run(folder, *FIT).code == 0
    assert_same_run(folder, whole)
    assert evaluated(folder) == evaluated(whole) and 5 in evaluated(whole)


TWICE = signal_at(3, "SIGINT").replace("os.kill(", "os.kill(os.getpid(), signal.SIGINT); os.kill(", 1)


def test_ctrl_c_saves_and_a_second_one_ends_at_once(zygote: Zygote, whole: Path, tmp_path: Path) -> None:
    folder = fresh(whole, tmp_path / "run")
    ended = zygote.run(folder, *FIT, prelude=TWICE)
    assert ended.code == 130 and not (folder / LAST).exists(), ended.err
    ended = zygote.run(folder, *FIT, prelude=signal_at(3, "SIGINT"))
    assert ended.code == 130 and f"'{LAST}'" in ended.err, ended.err
    assert torch.load(folder / LAST, weights_only=True)["global_step"] == 3


@pytest.mark.parametrize(("step", "saved"), [(5, 5), (6, 7)])
def test_ctrl_c_stops_an_evaluation(zygote: Zygote, whole: Path, tmp_path: Path, step: int, saved: int) -> None:
    """In training and at validation, which is finished: all but this evaluation's figures is as in a run without Ctrl-C."""
    folder = fresh(whole, tmp_path / "run")
    prelude = WHILE_EVALUATING.replace("step == 5", f"step == {step}").replace("SIGTERM", "SIGINT")
    ended = zygote.run(folder, *FIT, prelude=prelude)
    assert ended.code == 130 and f"saved '{LAST}' after step {saved}." in ended.err, ended.err
    assert torch.load(folder / LAST, weights_only=True)["global_step"] == saved
    assert step not in evaluated(folder) and step in evaluated(whole)
    lines = [line for line in read_metrics(folder / "run") if int(line["step"]) == step - 1]
    assert not [line for line in lines if "val/acceptance_length" in line]
    assert [line for line in lines if "val/loss" in line] if step == 6 else True  # the validation itself is finished
    assert zygote.run(folder, *FIT).code == 0
    same = [line for line in read_metrics(whole / "run") if "train/loss" in line]
    assert [line for line in read_metrics(folder / "run") if "train/loss" in line] == same


def test_an_evaluation_is_reported_stopped_once_a_step(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """Also where a validation comes after the same step."""
    evaluation: Any = AcceptanceEvaluation("package://demo/chat_prompts.jsonl")
    evaluation.loaded = []
    monkeypatch.setattr(acceptance_evaluation, "stop_after_ctrl_c", Mock(side_effect=EvaluationStopped))
    for step in (4, 4, 5):
        assert not evaluation._evaluate(SimpleNamespace(global_step=step), SimpleNamespace(model=tiny_model()))
    assert len(capsys.readouterr().err.splitlines()) == 2


@pytest.mark.slow
def test_no_checkpoint_between_the_batches_of_a_step(zygote: Zygote, whole: Path, accumulated: Path, tmp_path: Path) -> None:
    """A step takes 4 batches, a validation comes every 6: the signal comes after 5 batches, and a validation in a step."""
    folder = fresh(whole, tmp_path / "run")
    for at, step in ((5, 2), (4, 4)):  # the second is counted from the resumed run's first batch; an epoch has 11
        assert zygote.run(folder, *FIT, *ACCUMULATED, prelude=signal_at(at)).code == 143
        assert torch.load(folder / LAST, weights_only=True)["global_step"] == step
    assert zygote.run(folder, *FIT, *ACCUMULATED).code == 0
    assert_same_run(folder, accumulated)


def test_slurm_requeues_the_job(zygote: Zygote, whole: Path, tmp_path: Path) -> None:
    folder = fresh(whole, tmp_path / "run")
    command = folder / "bin" / "scontrol"
    command.parent.mkdir()
    command.write_text('#!/bin/sh\necho "$@" > requeued\n')
    command.chmod(0o755)
    slurm = {"SLURM_NTASKS": "1", "SLURM_JOB_ID": "77", "SLURM_JOB_NAME": "train", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    slurm |= {"SLURM_NODEID": "0", "SLURM_NODELIST": "localhost", "SLURM_NTASKS_PER_NODE": "1"}
    slurm["PATH"] = f"{command.parent}:{os.environ['PATH']}"
    ended = zygote.run(folder, *FIT, prelude=signal_at(3, "SIGUSR1"), **slurm)
    assert ended.code == 143, ended.err
    assert f"mtp: SIGUSR1: saved '{LAST}' after step 3, job 77 requeued." in ended.err
    assert (folder / "requeued").read_text() == "requeue 77\n"
