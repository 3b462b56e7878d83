# SPDX-License-Identifier: Apache-2.0
"""``mtp compare``, and what a run logs for it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml
from command_line import error_of, mtp, read_metrics
from trained_run import STEPS


def test_two_runs(run: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree("run", "others/run")
    config = yaml.safe_load(Path("run/config.yaml").read_text())
    config["model"]["lora"]["rank"] = 7
    config["trainer"]["callbacks"][0]["init_args"]["filename"] = "another"
    config["trainer"]["callbacks"].append({"class_path": "my.Other", "init_args": {"a": 1}})
    config["trainer"]["logger"][0]["init_args"]["save_dir"] = "others"
    Path("others/run/config.yaml").write_text(yaml.safe_dump(config))
    with Path("others/run/metrics.csv").open("a") as file:  # an empty epoch
        file.write(",".join("nan" if name == "train/loss" else "" for name in read_metrics(run)[0]) + "\n")
    overall = {"acceptance_length": 1.75, "speed_up": {"median": 1.25}}
    Path("others/run/acceptance.json").write_text(json.dumps({"latest": {"overall": overall, "speed_num_masks": "auto"}}))
    assert mtp("compare", "run", "others/run", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    first, second = found["settings"].pop("runs")
    assert first != second and second == "others/run"
    assert found["settings"] == {
        "model.lora.rank": [2, 7],
        "trainer.callbacks": ["ModelCheckpoint, ModelCheckpoint_1", "ModelCheckpoint, ModelCheckpoint_1, Other"],
        "trainer.callbacks.ModelCheckpoint.filename": ["best", "another"],
    }
    figures = found["figures"][first]
    lines = read_metrics(run)
    best = max(
        (line for line in lines if line.get("val/loss")), key=lambda line: float(line["val/forced_acceptance_length"])
    )
    assert figures["steps"] == STEPS and figures["speed-up by default"] is None
    assert figures["best forced acceptance length"] == float(best["val/forced_acceptance_length"])
    assert figures["validation loss"] == float(best["val/loss"]) and figures["at step"] == int(best["step"]) + 1
    assert found["figures"][second]["speed-up by default"] == 1.25
    assert found["figures"][second]["last training loss"] is None  # NaN is not valid JSON
    assert Path("compare.png").read_bytes().startswith(b"\x89PNG")
    assert mtp("compare", "run", "others/run", "others/../run", "--output", "out/three.png") == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80 and "model.lora.rank" in out and Path("out/three.png").is_file()


def test_what_a_run_logs(run: Path, here: Path) -> None:
    settings = yaml.safe_load((run / "hparams.yaml").read_text())
    assert settings["model.lora.rank"] == 2 and settings["model.optimizer.lr"] == 0.01 and settings["data.batch_size"] == 4
    assert not [name for name in settings if "logger" in name or "callbacks" in name]
    lines = [line for line in read_metrics(run) if line.get("train/loss")]
    assert [float(line["train/learning_rate"]) for line in lines[-2:]] == pytest.approx([0.01, 0.01])
    assert all(float(line["train/gradient_norm"]) > 0 for line in lines)


@pytest.mark.parametrize(
    ("words", "code", "named"),
    [
        ("run", 2, "two runs"),
        ("run base", 1, "base"),
        ("run run", 1, "run"),
        ("run run2 --output x.txt", 2, "x.txt"),
        ("run run2 --output config.yaml/x.png", 1, "config.yaml"),
        ("run broken", 1, "broken"),
    ],
)
def test_wrong_command_lines(run: Path, here: Path, capsys, words: str, code: int, named: str) -> None:
    shutil.copytree("run", "run2")
    shutil.copytree("run", "broken")
    Path("broken/metrics.csv").write_text("step,train/loss\n1,x\n")
    assert named in error_of(capsys, code, "compare", *words.split())
    assert not Path("compare.png").exists()
