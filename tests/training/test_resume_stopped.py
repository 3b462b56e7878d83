# SPDX-License-Identifier: Apache-2.0
"""Runs that end early, by the time limit or a callback, go on as the run that was not stopped."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from interrupted_runs import FIT, fresh, history
from tiny_run import CONFIG, LAST, assert_same_run, write_config
from zygote import Zygote

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


EARLY: dict[str, Any] = {"class_path": "lightning.pytorch.callbacks.EarlyStopping"}
STOPS: dict[str, Any] = {"stopping_threshold": 1000.0}  # at once
"""Lightning's early stopping, and what makes it stop at the end of the first epoch."""


@pytest.mark.parametrize(
    ("arguments", "trainer"),
    [
        # no validation, and the end of the epoch is no step that is saved by its number
        ({"monitor": "train/loss", "check_on_train_epoch_end": True}, {"limit_val_batches": 0}),
        # decided after the end of a validation
        ({"monitor": "val/loss"}, {"val_check_interval": 1.0, "check_val_every_n_epoch": 1}),
    ],
)
def test_a_run_that_is_stopped_at_the_end_of_an_epoch_goes_on(
    zygote: Zygote, whole: Path, tmp_path: Path, arguments: dict[str, Any], trainer: dict[str, Any]
) -> None:
    plain, folder = (fresh(whole, tmp_path / name) for name in ("plain", "run"))
    config = copy.deepcopy(CONFIG)
    config["trainer"] |= {**trainer, "max_steps": 24}
    for more, at in (({}, plain), (STOPS, folder), ({}, folder)):
        early = {**EARLY, "init_args": {**arguments, "patience": 9, **more}}
        config["trainer"]["callbacks+"] = [*CONFIG["trainer"]["callbacks+"], early]
        write_config(at, config)
        ended = zygote.run(at, *FIT)
        assert ended.code == 0, ended.err
        if more:
            assert torch.load(folder / LAST, weights_only=True)["global_step"] == 11
    assert_same_run(folder, plain)
    assert history(folder) == history(plain)
    callbacks = [torch.load(at / LAST, weights_only=True)["callbacks"] for at in (plain, folder)]
    one, other = (state for each in callbacks for name, state in each.items() if "EarlyStopping" in name)
    assert (one["wait_count"], one["best_score"]) == (other["wait_count"], other["best_score"])


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
