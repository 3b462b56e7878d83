# SPDX-License-Identifier: Apache-2.0
"""Throughput: its figures against counts of the batches and a clock of the test's own."""

from __future__ import annotations

import functools
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from command_line import ParseOnly, mtp, read_metrics
from tiny_run import write_config, write_run

from mtp_lightning.callbacks import AcceptanceEvaluation, SampleText, Throughput, throughput
from mtp_lightning.callbacks.throughput import evaluation_seconds
from mtp_lightning.data.loader import WindowedLoader
from mtp_lightning.errors import UsageError
from mtp_lightning.training.module import MTPModule

ROOT = Path(__file__).parents[2]
FIGURES = {"tokens_per_second", "positions_per_second", "model_flop_utilization", "peak_memory_gb", "data_wait_share"}
FIGURES |= {"hours_left"}


def test_figures_by_a_clock_that_the_test_moves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = write_run(tmp_path)
    config["trainer"] |= {"max_steps": 4, "log_every_n_steps": 2, "accumulate_grad_batches": 2, "val_check_interval": 4}
    entry = {"class_path": "mtp_lightning.callbacks.Throughput", "init_args": {"peak_tflops": 1e-6}}
    config["trainer"]["callbacks+"] = [entry]
    write_config(tmp_path, config)
    monkeypatch.chdir(tmp_path)
    now = 0.0
    seen: list[Any] = []
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: now)
    deliver = WindowedLoader._deliver

    def slow(self: WindowedLoader) -> Any:
        nonlocal now
        for batch in deliver(self):
            if not self.constant:
                now += 1.0  # a batch is waited for for 1 s
                seen.append(batch)
            yield batch

    step = Throughput.on_train_batch_end

    def steps(self: Throughput, *arguments: Any) -> None:
        nonlocal now
        now += 3.0  # and computed in 3 s
        step(self, *arguments)

    end = Throughput.on_validation_end

    def validates(self: Throughput, *arguments: Any) -> None:
        nonlocal now
        now += 100.0  # a validation does not count
        end(self, *arguments)

    monkeypatch.setattr(WindowedLoader, "_deliver", slow)
    monkeypatch.setattr(Throughput, "on_train_batch_end", steps)
    monkeypatch.setattr(Throughput, "on_validation_end", validates)
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
    # Two steps of 8 s are done and two are left; then none are.
    assert float(lines[0]["train/hours_left"]) == pytest.approx(16 / 3600)
    assert float(lines[1]["train/hours_left"]) == 0


ACCEPTANCE = {
    "class_path": "mtp_lightning.callbacks.AcceptanceEvaluation",
    "init_args": {"prompts": "prompts.jsonl", "max_new_tokens": 3, "every_n_steps": 2, "num_masks": 2},
}
SAMPLES = {"class_path": "mtp_lightning.callbacks.SampleText", "init_args": {"prompts": "prompts.jsonl", "num_masks": 2}}


def test_evaluations_are_not_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step takes 1 s, an evaluation every 2 steps 50 s, a validation every 4 steps 40 s and its text 9 s."""
    config = write_run(tmp_path)
    config["trainer"] |= {"max_steps": 8, "log_every_n_steps": 1, "val_check_interval": 4}
    entry = {"class_path": "mtp_lightning.callbacks.Throughput"}
    config["trainer"]["callbacks+"] = [SAMPLES, ACCEPTANCE, entry]
    write_config(tmp_path, config)
    monkeypatch.chdir(tmp_path)
    now = 0.0
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: now)

    def takes(owner: Any, name: str, seconds: float) -> None:
        whole = getattr(owner, name)

        @functools.wraps(whole)
        def slow(*arguments: Any, **options: Any) -> Any:
            nonlocal now
            now += seconds
            return whole(*arguments, **options)

        monkeypatch.setattr(owner, name, slow)

    takes(MTPModule, "training_step", 1.0)
    takes(AcceptanceEvaluation, "_evaluate", 50.0)
    takes(MTPModule, "on_validation_epoch_end", 40.0)
    takes(SampleText, "on_validation_end", 9.0)
    tokens: list[float] = []
    batch_end = Throughput.on_train_batch_end

    def counts(self: Throughput, trainer: Any, module: Any, outputs: Any, batch: Any, number: int) -> None:
        tokens.append(float((batch.document_ids >= 0).sum()))
        batch_end(self, trainer, module, outputs, batch, number)

    monkeypatch.setattr(Throughput, "on_train_batch_end", counts)
    assert mtp("fit", "--config", "config.yaml") == 0
    lines = [line for line in read_metrics(tmp_path / "run") if "train/tokens_per_second" in line]
    assert [float(line["train/tokens_per_second"]) for line in lines] == pytest.approx(tokens)
    assert {float(line["train/data_wait_share"]) for line in lines} == {0.0}
    # When step 5 is logged there were evaluations after steps 2 (50 s) and 4 (50 + 40 + 9 s), and one more is due in the 3
    # steps that are left: 74.5 s.
    assert float(lines[4]["train/hours_left"]) == pytest.approx((3 + 74.5) / 3600)


def test_evaluations_to_come_by_hand() -> None:
    assert evaluation_seconds({}, 100) == 0
    assert evaluation_seconds({10: 6.0}, 95) == 9 * 6
    assert evaluation_seconds({1000: 6.0}, 5000) == 5 * 6  # the first one of a resumed run
    assert evaluation_seconds({1000: 6.0, 1050: 2.0, 1100: 4.0}, 120) == 2 * 4


def test_a_peak_must_be_a_number_above_0() -> None:
    with pytest.raises(UsageError, match="peak_tflops of Throughput must be above 0, got 0"):
        Throughput(0)


def test_one_line_adds_weights_and_biases() -> None:
    words = ["--config", ROOT / "configs" / "qwen.yaml"]
    own = ParseOnly(*words).settings.trainer.logger
    both = ParseOnly(*words, "--config", ROOT / "configs" / "loggers" / "wandb.yaml").settings.trainer.logger
    assert [each.class_path for each in both[:-1]] == [each.class_path for each in own]
    assert both[-1].class_path == "lightning.pytorch.loggers.WandbLogger"
    again = ParseOnly(*words, "--config", ROOT / "configs" / "loggers" / "wandb.yaml", "--trainer.logger.version", "a")
    assert [getattr(each.init_args, "version", None) for each in again.settings.trainer.logger] == ["", "", "a"]


@pytest.mark.skipif(find_spec("wandb") is not None, reason="wandb is installed")
def test_a_logger_whose_package_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    write_run(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert mtp("fit", "--config", "config.yaml", "--config", str(ROOT / "configs" / "loggers" / "wandb.yaml")) == 2
    assert "lightning.pytorch.loggers.WandbLogger needs wandb" in capsys.readouterr().err.splitlines()[-1]
