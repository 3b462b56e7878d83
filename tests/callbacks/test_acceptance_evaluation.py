# SPDX-License-Identifier: Apache-2.0
"""AcceptanceEvaluation in real, tiny runs: when it evaluates, what it logs, prints and writes, and how ranks share."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from command_line import read_metrics
from lightning import Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from prompt_results import result
from saved import files_of
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_run import LAST
from zygote import Zygote

from mtp_lightning.callbacks import AcceptanceEvaluation, acceptance_evaluation
from mtp_lightning.errors import RunError, UsageError
from mtp_lightning.evaluation.acceptance import PromptResult, summarise
from mtp_lightning.evaluation.acceptance_report import save_plot
from mtp_lightning.training.module import MTPModule

Fit = Callable[..., Trainer]
DOMAINS = ["code", "maths"]


@pytest.fixture
def evaluated(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by the number of prompts at each evaluation."""
    calls: list[int] = []
    original = acceptance_evaluation.evaluate_prompts

    def count(model: Any, prompts: Any, *arguments: Any, **options: Any) -> list[PromptResult]:
        calls.append(len(prompts))
        return original(model, prompts, *arguments, **options)

    monkeypatch.setattr(acceptance_evaluation, "evaluate_prompts", count)
    return calls


def read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "acceptance.json").read_text())


def logged(folder: Path, name: str) -> dict[int, float]:
    with (folder / "metrics.csv").open() as file:
        return {int(row["step"]): float(row[name]) for row in csv.DictReader(file) if row.get(name)}


def test_a_run_logs_prints_and_writes(
    fit: Fit, module: MTPModule, prompts: str, tmp_path: Path, evaluated: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    callback = AcceptanceEvaluation(prompts, num_prompts=4, max_new_tokens=12, num_lossless=1, num_speed_pairs=2)
    trainer = fit(module, callback)
    assert evaluated == [4, 4]  # two validations, and not the sanity check
    written = read(tmp_path)
    latest = written["latest"]
    overall = latest["overall"]
    assert (latest["stage"], latest["step"]) == ("val", 4)
    assert overall["lossless"] == {"equal": 2, "checked": 2, "differences": []}
    assert overall["num_tokens"] == 48 and overall["acceptance_length"] > 1
    assert list(latest["domains"]) == DOMAINS and [latest["domains"][d]["num_prompts"] for d in DOMAINS] == [2, 2]
    metrics = trainer.callback_metrics
    # What is logged is float32.
    assert metrics["val/acceptance_length"].item() == pytest.approx(overall["acceptance_length"], rel=1e-6)
    assert metrics["val/speed_up"].item() == pytest.approx(overall["speed_up"]["median"], rel=1e-6)
    for domain in DOMAINS:
        assert f"val/acceptance_length/{domain}" in metrics
    forced = latest["forced"]
    assert forced["acceptance_length"] == metrics["val/forced_acceptance_length"].item()
    assert forced["reference"] == metrics["val/forced_reference"].item()
    assert set(logged(tmp_path, "val/acceptance_length")) == {1, 3}  # Lightning's axis begins at 0
    assert (tmp_path / "acceptance.png").stat().st_size > 10_000
    out = capsys.readouterr().out
    assert out.count("Acceptance by real decoding") == 2 and "Teacher-forced: " in out


def test_evaluation_leaves_training_as_it_is(fit: Fit, new_module: Callable[[], MTPModule], prompts: str) -> None:
    with_callback, without = new_module(), new_module()
    for one in (with_callback, without):
        torch.manual_seed(0)
        one.configure_model()
    fit(with_callback, AcceptanceEvaluation(prompts, max_new_tokens=6, every_n_steps=1, num_speed_pairs=1))
    fit(without)
    assert all(part.training for part in with_callback.modules())
    trained = dict(without.model.trained_parameters())
    assert trained
    for name, parameter in with_callback.model.trained_parameters():
        assert torch.equal(parameter, trained[name])


def test_every_n_steps_in_training_below_a_progress_bar(
    fit: Fit, module: MTPModule, prompts: str, tmp_path: Path, evaluated: list[int], capsys
) -> None:
    callback = AcceptanceEvaluation(prompts, max_new_tokens=6, every_n_steps=1, num_lossless=0)
    fit(module, callback, TQDMProgressBar(), enable_progress_bar=True)
    # Four steps; the validations after steps 2 and 4 use what was just measured.
    assert evaluated == [5] * 4
    out = capsys.readouterr().out
    assert (out.count("Acceptance by real decoding"), out.count("Teacher-forced: ")) == (4, 2)
    # Lightning's own log interval is 50 steps: it would have dropped these.
    assert set(logged(tmp_path, "val/acceptance_length")) == {0, 1, 2, 3}
    assert read(tmp_path)["latest"]["step"] == 4


def test_validate_and_test(
    fit: Fit, module: MTPModule, prompts: str, tmp_path: Path, batches: Any, evaluated: list[int]
) -> None:
    callback = AcceptanceEvaluation(prompts, num_prompts=None, max_new_tokens=6)
    trainer = fit(module, callback)
    evaluated.clear()
    (values,) = trainer.validate(module, batches, verbose=False)
    assert evaluated == [5] and "val/acceptance_length/code" in values
    (values,) = trainer.test(module, batches, verbose=False)
    assert evaluated == [5, 5]
    assert "test/acceptance_length/maths" in values and not any(name.startswith("val/") for name in values)
    latest = read(tmp_path)["latest"]
    assert latest["stage"] == "test"
    assert latest["forced"]["acceptance_length"] == values["test/forced_acceptance_length"]


def test_several_may_be_in_one_run() -> None:
    """Lightning refuses two callbacks of a class that both keep a state in checkpoints."""
    callbacks = [AcceptanceEvaluation("p.txt", max_new_tokens=n) for n in (6, 7)]
    Trainer(callbacks=callbacks, accelerator="cpu", logger=False, enable_checkpointing=False)


def test_fast_dev_run_writes_nothing(fit: Fit, module: MTPModule, prompts: str, tmp_path: Path) -> None:
    fit(module, AcceptanceEvaluation(prompts, max_new_tokens=6), fast_dev_run=True)
    assert not (tmp_path / "acceptance.json").exists()


def test_validate_writes_to_a_folder_of_its_own(zygote: Zygote, whole: Path, tmp_path: Path) -> None:
    """At the checkpoint's step; what the run measured stays."""
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    best = LAST.replace("last", "best")
    step = torch.load(folder / best, weights_only=True)["global_step"]
    before = files_of(folder / "run")
    expected = next(line for line in read_metrics(folder / "run") if line.get("val/loss") and int(line["step"]) == step - 1)
    assert zygote.run(folder, "validate", "--config", "config.yaml", "--ckpt_path", best).code == 0
    after = files_of(folder / "run")
    assert {name: after[name] for name in before} == before
    assert set(after) - set(before) == {f"validate/{name}" for name in ("acceptance.json", "acceptance.png", "metrics.csv")}
    latest = read(folder / "run/validate")["latest"]
    assert (latest["stage"], latest["step"]) == ("val", step)
    (line,) = read_metrics(folder / "run/validate")
    assert {name: line[name] for name in ("step", "epoch", "val/loss")}.items() <= expected.items()


@pytest.mark.parametrize(
    "options", [{"prompts": "-"}, {"max_steps": -1}, {"every_n_steps": 0}, {"num_lossless": -1}, {"num_speed_pairs": -1}]
)
def test_wrong_options(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(options))):
        AcceptanceEvaluation(**{"prompts": "p.txt", **options})


def test_what_is_wrong_shows_before_training(fit: Fit, module: MTPModule, prompts: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="num_masks must be auto or from 1 to 3"):
        fit(module, AcceptanceEvaluation(prompts, num_masks=4))
    with pytest.raises(RunError, match="nothing is there"):
        fit(module, AcceptanceEvaluation(str(tmp_path / "none.txt")))
    long = tmp_path / "long.txt"
    long.write_text("x" * 64)
    with pytest.raises(RunError, match="has 64 tokens, and the base's context is 64: 'xxx"):
        fit(module, AcceptanceEvaluation(str(long)))


def test_the_picture_goes_to_loggers_that_take_pictures(tmp_path: Path) -> None:
    pictures: list[tuple[str, list[str]]] = []
    tensorboard = TensorBoardLogger(tmp_path, name="", version="")
    other = SimpleNamespace(log_image=lambda name, files: pictures.append((name, files)))
    save_plot(summarise([result(0)]), tmp_path / "acceptance.png")
    trainer: Any = SimpleNamespace(global_step=4, loggers=[tensorboard, CSVLogger(tmp_path, name="", version=""), other])
    acceptance_evaluation.log_image(trainer, "val/acceptance", tmp_path / "acceptance.png")
    tensorboard.experiment.flush()
    (image,) = EventAccumulator(str(tmp_path)).Reload().Images("val/acceptance")
    assert image.step == 3 and image.width > 100
    assert pictures == [("val/acceptance", [str(tmp_path / "acceptance.png")])]
