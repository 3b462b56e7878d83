# SPDX-License-Identifier: Apache-2.0
"""Throughput: its figures against counts of the batches and a clock of the test's own."""

from __future__ import annotations

import functools
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from command_line import ParseOnly, mtp, read_metrics
from tiny_run import write_config, write_run

from mtp_lightning.callbacks import AcceptanceEvaluation, Throughput, throughput
from mtp_lightning.callbacks.run_clock import evaluation_seconds
from mtp_lightning.data.loader import WindowedLoader
from mtp_lightning.errors import UsageError
from mtp_lightning.training.module import MTPModule

ROOT = Path(__file__).parents[2]
FIGURES = {"tokens_per_second", "positions_per_second", "model_flop_utilization", "peak_memory_gb", "data_wait_share"}
FIGURES |= {"hours_left"}


def test_figures_by_a_clock_that_the_test_moves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = write_run(tmp_path)
    config["model"].pop("num_masks_schedule")  # the batches seen here have all masks
    config["trainer"] |= {"max_steps": 4, "log_every_n_steps": 2, "accumulate_grad_batches": 2, "val_check_interval": 4}
    evaluation = {"prompts": "prompts.jsonl", "max_new_tokens": 3, "every_n_steps": 2, "num_masks": 2}
    config["trainer"]["callbacks+"] = [
        {"class_path": "mtp_lightning.callbacks.AcceptanceEvaluation", "init_args": evaluation},
        {"class_path": "mtp_lightning.callbacks.Throughput", "init_args": {"peak_tflops": 1e-6}},
    ]
    write_config(tmp_path, config)
    monkeypatch.chdir(tmp_path)
    now = 0.0
    seen: list[Any] = []
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: now)
    deliver = WindowedLoader._deliver

    def takes(owner: Any, name: str, seconds: float) -> None:
        whole = getattr(owner, name)

        @functools.wraps(whole)
        def slow(*arguments: Any, **options: Any) -> Any:
            nonlocal now
            now += seconds
            return whole(*arguments, **options)

        monkeypatch.setattr(owner, name, slow)

    def slow(self: WindowedLoader) -> Any:
        nonlocal now
        for batch in deliver(self):
            if not self.constant:
                now += 1.0  # a batch is waited for for 1 s
                seen.append(batch)
            yield batch

    monkeypatch.setattr(WindowedLoader, "_deliver", slow)
    takes(MTPModule, "training_step", 3.0)
    takes(AcceptanceEvaluation, "_evaluate", 50.0)  # every 2 steps; not counted
    takes(MTPModule, "on_validation_epoch_end", 100.0)  # as well
    assert mtp("fit", "--config", "config.yaml") == 0
    lines = [line for line in read_metrics(tmp_path / "run") if "train/tokens_per_second" in line]
    assert [int(line["step"]) for line in lines] == [1, 3]
    for number, line in enumerate(lines):
        assert {f"train/{name}" for name in FIGURES} <= set(line)
        batches = seen[4 * number : 4 * number + 4]
        tokens = sum(int((batch.document_ids >= 0).sum()) for batch in batches)
        positions = sum(batch.input_ids.numel() + batch.mtp_labels.numel() for batch in batches)
        assert float(line["train/tokens_per_second"]) == pytest.approx(tokens / 16)
        assert float(line["train/positions_per_second"]) == pytest.approx(positions / 16)
        assert float(line["train/data_wait_share"]) == pytest.approx(0.25)
        assert 0 < float(line["train/model_flop_utilization"]) < 100 and float(line["train/peak_memory_gb"]) > 0.1
    # Two steps of 8 s are done, and two and an evaluation are left; then none are.
    assert float(lines[0]["train/hours_left"]) == pytest.approx((16 + 50) / 3600)
    assert float(lines[1]["train/hours_left"]) == 0


def test_the_time_left_ends_with_the_last_epoch() -> None:
    """Not with ``max_steps`` where ``max_epochs`` ends the run before; Lightning's estimate knows both."""
    callback = Throughput()
    callback.clock.began -= 10
    trainer: Any = SimpleNamespace(global_step=2, max_steps=100, estimated_stepping_batches=4)
    assert callback._hours_left(trainer)["hours_left"] == pytest.approx(10 / 3600, rel=0.1)  # the test takes time itself


def test_evaluations_to_come_by_hand() -> None:
    assert evaluation_seconds({}, 100) == 0
    assert evaluation_seconds({10: 6.0}, 95) == 9 * 6
    assert evaluation_seconds({1100: 6.0}, 5000, first_step=1000) == 50 * 6  # the first one of a resumed run
    assert evaluation_seconds({1000: 6.0, 1050: 2.0, 1100: 4.0}, 120) == 2 * 4


@pytest.mark.parametrize(("name", "peak"), [("NVIDIA L4", 121), ("NVIDIA L40", 181), ("NVIDIA L40S", 362), ("GT 1", None)])
def test_the_peak_by_a_name(name: str, peak: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: name)
    assert Throughput().peak(torch.device("cuda")) == peak


def test_a_peak_must_be_a_number_above_0() -> None:
    with pytest.raises(UsageError, match="peak_tflops of Throughput must be above 0, got 0"):
        Throughput(0)


def test_one_line_adds_weights_and_biases() -> None:
    words = ["--config", ROOT / "configs" / "qwen.yaml", "--config", ROOT / "configs" / "loggers" / "wandb.yaml"]
    loggers = ParseOnly(*words, "--trainer.logger.version", "a").settings.trainer.logger
    assert loggers[-1].class_path == "lightning.pytorch.loggers.WandbLogger"
    assert [getattr(each.init_args, "version", None) for each in loggers] == ["a"]


@pytest.mark.skipif(find_spec("wandb") is not None, reason="wandb is installed")
def test_a_logger_whose_package_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    write_run(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert mtp("fit", "--config", "config.yaml", "--config", str(ROOT / "configs" / "loggers" / "wandb.yaml")) == 2
    assert "lightning.pytorch.loggers.WandbLogger needs wandb" in capsys.readouterr().err.splitlines()[-1]
