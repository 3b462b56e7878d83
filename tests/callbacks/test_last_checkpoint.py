# SPDX-License-Identifier: Apache-2.0
"""LastCheckpoint: runs that are stopped early, by the time limit or a callback, resume as the run that was not stopped."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from interrupted_runs import ACCUMULATED, FIT, evaluated, fresh
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny_run import CONFIG, LAST, assert_same_run, write_config
from zygote import Zygote

from mtp_lightning.callbacks import LastCheckpoint
from mtp_lightning.callbacks.last_checkpoint import last_checkpoint_path

TIME_IS_UP = """
from lightning.pytorch.callbacks import Timer
from mtp_lightning.training.module import MTPModule
whole, calls = MTPModule.training_step, 0

def training_step(self, *arguments):
    global calls
    calls += 1
    return whole(self, *arguments)

MTPModule.training_step = training_step
Timer.time_elapsed = lambda self, stage="train": 0.0 if calls < @AT else 1e6
"""
STOPPED_IN_VALIDATION = """
from mtp_lightning.callbacks import AcceptanceEvaluation as patched
whole = patched.on_validation_end

def on_validation_end(self, trainer, module):
    whole(self, trainer, module)
    trainer.should_stop = not trainer.sanity_checking

patched.on_validation_end = on_validation_end
"""
MAX_TIME = ("--trainer.max_time", "00:01:00:00")


@pytest.mark.parametrize(
    ("prelude", "step", "in_step"),
    [
        (TIME_IS_UP.replace("@AT", "5"), 2, True),
        pytest.param(TIME_IS_UP.replace("@AT", "11"), 11, False, marks=pytest.mark.slow),  # the last batch of an epoch
        pytest.param(STOPPED_IN_VALIDATION, 6, False, marks=pytest.mark.slow),
    ],
)
def test_a_run_that_is_stopped_resumes(
    zygote: Zygote, whole: Path, accumulated: Path, tmp_path: Path, prelude: str, step: int, in_step: bool
) -> None:
    """Where ``in_step``, the stop is asked for between the 4 batches of an optimizer step, and comes after the last."""
    uninterrupted, words = (accumulated, ACCUMULATED) if in_step else (whole, ())
    folder = fresh(whole, tmp_path / "run")
    ended = zygote.run(folder, *FIT, *words, *MAX_TIME, prelude=prelude)
    assert ended.code == 0 and ("Time limit reached" in ended.err) == ("Timer" in prelude)
    assert torch.load(folder / LAST, weights_only=True)["global_step"] == step
    assert zygote.run(folder, *FIT, *words).code == 0
    assert_same_run(folder, uninterrupted)
    assert evaluated(folder) == evaluated(uninterrupted)


@pytest.mark.slow
def test_a_run_that_is_stopped_at_the_end_of_an_epoch_resumes(zygote: Zygote, whole: Path, tmp_path: Path) -> None:
    """Lightning's early stopping decides at the end of the first epoch, which no step or validation would save."""
    uninterrupted, folder = (fresh(whole, tmp_path / name) for name in ("uninterrupted", "run"))
    config: dict[str, Any] = copy.deepcopy(CONFIG)
    config["trainer"] |= {"max_steps": 24, "limit_val_batches": 0}
    stops = {"stopping_threshold": 1000.0}  # at once
    for options, at in (({}, uninterrupted), (stops, folder), ({}, folder)):
        arguments = {"monitor": "train/loss", "check_on_train_epoch_end": True, "patience": 9, **options}
        early_stopping = {"class_path": "lightning.pytorch.callbacks.EarlyStopping", "init_args": arguments}
        config["trainer"]["callbacks+"] = [*CONFIG["trainer"]["callbacks+"], early_stopping]
        write_config(at, config)
        ended = zygote.run(at, *FIT)
        assert ended.code == 0, ended.err
        if options:
            assert torch.load(folder / LAST, weights_only=True)["global_step"] == 11
    assert_same_run(folder, uninterrupted)
    assert evaluated(folder) == evaluated(uninterrupted)
    callbacks = [torch.load(at / LAST, weights_only=True)["callbacks"] for at in (uninterrupted, folder)]
    one, other = (state for states in callbacks for name, state in states.items() if "EarlyStopping" in name)
    assert (one["wait_count"], one["best_score"]) == (other["wait_count"], other["best_score"])


@pytest.mark.parametrize(("named", "expected"), [(None, LAST), ("kept", "kept/last.ckpt")])
def test_the_last_checkpoint_is_in_the_runs_folder(named: str | None, expected: str) -> None:
    """Also where the best one is kept elsewhere: a run's folder stands for its checkpoints."""
    callbacks = [ModelCheckpoint(dirpath="elsewhere"), LastCheckpoint(dirpath=named)]
    trainer: Any = SimpleNamespace(callbacks=callbacks, checkpoint_callbacks=callbacks, log_dir="run")
    assert last_checkpoint_path(trainer) == Path(expected)
