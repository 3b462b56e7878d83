# SPDX-License-Identifier: Apache-2.0
"""RunGuards: losses and gradients that are not finite, memory, and processes that disagree."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from command_line import mtp, read_metrics
from lightning import Callback
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.strategies import ModelParallelStrategy
from tiny_run import LAST, write_config, write_run
from trained_run import NUM_MASKS
from transformers import AutoModelForCausalLM

from mtp_lightning.callbacks import AcceptanceEvaluation, Throughput
from mtp_lightning.callbacks.run_guards import check_monitors, disagreement, gradient_norm, not_finite
from mtp_lightning.errors import UsageError
from mtp_lightning.training.module import MTPModule, paper_losses

SPOILED = """
import torch
import torch.nn.functional as F
from mtp_lightning.losses import BaseCrossEntropy


class Spoiled(BaseCrossEntropy):
    def __init__(self, how: str, at: int = 6):
        super().__init__()
        self.how, self.at, self.calls = how, at, 0

    def per_position(self, logits, targets):
        loss = super().per_position(logits, targets)
        self.calls += self.training
        if not self.training or self.calls != self.at:
            return loss
        if self.how == "memory":
            torch.empty(2**55)
        if self.how == "gradient":
            return loss + torch.sqrt(logits.sum(-1) * 0)  # 0, with the derivative of a root at 0
        return loss * float(self.how)
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """The current folder holds everything but a run; gives the configuration."""
    config = write_run(tmp_path)
    (tmp_path / "my_losses.py").write_text(SPOILED)
    monkeypatch.chdir(tmp_path)
    yield config


def spoil(config: dict[str, Any], how: str, at: int = 6, **trainer: Any) -> None:
    config["model"]["losses"] = {
        "sampler": {"class_path": "SamplerCrossEntropy"},
        "spoiled": {"class_path": "my_losses.Spoiled", "init_args": {"how": how, "at": at}},
    }
    config["model"].pop("loss_schedules", None)  # of terms that are not there now
    config["trainer"] |= trainer
    write_config(Path(), config)


FIT = ("fit", "--config", "config.yaml")


def failed(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of a run that must stop."""
    assert mtp(*FIT) == 1
    err = capsys.readouterr().err
    assert err.count("mtp: error: ") == 1 and "Traceback" not in err
    return err.splitlines()[-1].removeprefix("mtp: error: ")


@pytest.mark.parametrize(
    ("how", "what"),
    [("nan", "the loss is nan"), pytest.param("gradient", "a gradient is not finite", marks=pytest.mark.slow)],
)
def test_what_is_not_finite_stops_before_it_reaches_a_weight(here: dict[str, Any], capsys, how: str, what: str) -> None:
    spoil(here, how)
    found = failed(capsys)
    assert found.startswith(what) and " at step 6 (epoch 0, rows " in found
    rows = {int(row) for row in found.partition("rows ")[2].partition(" of data.train")[0].split(", ")}
    assert len(rows) == 2 and max(rows) < 22  # the rows of one batch
    assert f"'{LAST}', of step 4." in found
    saved = torch.load(LAST, weights_only=True)
    assert saved["global_step"] == 4 and all(value.isfinite().all() for value in saved["state_dict"].values())
    assert max(int(line["step"]) for line in read_metrics(Path("run"))) == 4
    if how == "nan":  # and with a loss that is finite the run resumes
        spoil(here, "1.0", max_steps=5)
        assert mtp(*FIT, "--ckpt_path", "last") == 0


def test_the_estimate_is_printed_and_memory_that_runs_out_gets_advice(here: dict[str, Any], capsys) -> None:
    spoil(here, "memory")
    assert mtp(*FIT) == 1
    err = capsys.readouterr().err
    # 2 rows of 12 tokens, padded to 32; blocks after half of the 10 starts, padded to 8, 2 masks each.
    assert "memory: up to 96 positions per step (64 tokens and 32 masks); base 0." in err
    last = err.splitlines()[-1]
    assert "memory ran out in step 6 (" in last and "up to 96 positions" in last
    assert "Lower data.batch_size from 2 to 1." in last  # fewer blocks would be padded to as many
    assert torch.load(LAST, weights_only=True)["global_step"] == 4


NO_MEMORY = "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory"


def test_out_of_memory_while_the_base_is_loaded(here: dict[str, Any], capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise RuntimeError(NO_MEMORY)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", fails)
    assert failed(capsys).startswith("memory ran out before training began (")


def test_names_that_a_callback_can_monitor(trained: Path) -> None:
    losses: dict[str, Any] = paper_losses(with_sampler=True)
    module = MTPModule("base", num_masks=NUM_MASKS, losses=losses)
    names = {name for line in read_metrics(trained / "run") for name in line}
    assert names == {*module.logged_names, "step", "epoch"}

    def check(name: str, *others: Callback, strategy: Any = None) -> None:
        trainer = SimpleNamespace(callbacks=[EarlyStopping(name), *others], strategy=strategy)
        check_monitors(cast(Any, trainer), module)

    evaluation = AcceptanceEvaluation("prompts.txt")
    for name in names:
        check(name)
    check("val/acceptance_length/code", evaluation)
    check("train/tokens_per_second", Throughput())
    check("val/mine", type("Mine", (Callback,), {})())  # it may log that
    for name in ("val/acceptance_length", "train/tokens_per_second", "val/mine", "val_loss"):
        with pytest.raises(UsageError, match=f"EarlyStopping.monitor '{name}'"):
            check(name)
    with pytest.raises(UsageError, match="val/speed_up"):
        check("val/speed_up", evaluation)
    timed = AcceptanceEvaluation("prompts.txt", num_speed_pairs=1)
    check("val/speed_up", timed)
    with pytest.raises(UsageError, match="val/speed_up"):
        check("val/speed_up", timed, strategy=ModelParallelStrategy())  # nothing is timed where parameters are sharded


def test_disagreement_by_hand() -> None:
    same = {"model.num_masks": "2", "data.train": "3 rows"}
    assert disagreement([same]) is None and disagreement([same, dict(same)]) is None
    found = disagreement([same, same, {**same, "data.train": "4 rows"}])
    assert found is not None and "disagree on data.train: 3 rows in process 0, 4 rows in process 2." in found
    assert "on new: nothing in process 0, 1 in process 1" in str(disagreement([{}, {"new": "1"}]))


def test_the_message_names_rows_of_all_processes() -> None:
    good = {"losses": [], "rows": [], "all_rows": [1, 2]}
    found = not_finite([good, {"losses": [math.inf], "rows": [7, 3], "all_rows": [3, 4, 7]}], 5, 1, None)
    assert found.startswith("the loss is inf at step 5 (epoch 1, rows 3, 7 of data.train)")
    assert "rows 1, 2 of data.train" in not_finite([good], 5, 0, None)
    assert "model.losses: focal, x" in not_finite([{**good, "losses": [math.nan]}], 5, 0, None, ["focal", "x"])


def test_the_norm_of_gradients() -> None:
    a, b, none = (torch.nn.Parameter(torch.zeros(2)) for _ in range(3))
    a.grad, b.grad = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0])
    assert gradient_norm([a, b, none]) == 5 and gradient_norm([none]) == 0
    b.grad[0] = math.nan
    assert not gradient_norm([a, b]).isfinite()
