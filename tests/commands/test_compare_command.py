# SPDX-License-Identifier: Apache-2.0
"""``mtp compare``, and what a run logs for it."""

from __future__ import annotations

import csv
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from command_line import error_of, mtp, read_metrics
from rich.console import Console
from trained_run import STEPS

from mtp_lightning.commands.compare import print_table, wrapped
from mtp_lightning.evaluation.run_comparison import BEST, Run, final_figures, mean_and_deviation


def test_two_runs(run: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree("run", "others/run")
    text = Path("run/config.yaml").read_text()
    header = [line for line in text.splitlines() if line.startswith("# ") and "==" in line]
    assert f"# torch=={torch.__version__}" in header
    config = yaml.safe_load(text)
    config["model"]["lora"]["rank"] = 7
    config["trainer"]["callbacks"][0]["init_args"]["filename"] = "another"
    config["trainer"]["callbacks"].append({"class_path": "my.Other", "init_args": {"a": 1}})
    config["trainer"]["logger"][0]["init_args"]["save_dir"] = "others"
    Path("others/run/config.yaml").write_text("\n".join([*header[:-1], "# lightning==9.9", yaml.safe_dump(config)]))
    with Path("others/run/metrics.csv").open("a") as file:  # an empty epoch
        file.write(",".join("nan" if name == "train/loss" else "" for name in read_metrics(run)[0]) + "\n")
    overall = {"acceptance_length": 1.75, "speed_up": {"median": 1.25}}
    Path("others/run/acceptance.json").write_text(json.dumps({"latest": {"overall": overall, "speed_num_masks": "auto"}}))
    assert mtp("compare", "run", "others/run", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    first, second = found["settings"].pop("runs")
    assert first != second and second == "others/run"
    assert found["seeds"] == []
    assert found["settings"] == {
        "version of lightning": [header[-1].partition("==")[2], "9.9"],
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
    assert found["figures"][second]["training loss at the end"] is None  # NaN is not valid JSON
    assert Path("compare.png").read_bytes().startswith(b"\x89PNG")
    assert mtp("compare", "run", "others/run", "others/../run", "--output", "out/three.png") == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80 and "model.lora.rank" in out and Path("out/three.png").is_file()


def test_runs_that_differ_in_the_seed_alone(run: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines, text = read_metrics(run), Path("run/config.yaml").read_text()
    best = max((line for line in lines if BEST in line), key=lambda line: float(line[BEST]))
    for seed, rank in ((1, 2), (2, 2), (3, 7)):
        shutil.copytree("run", f"seed_{seed}")
        config = text.replace("seed_everything: 0", f"seed_everything: {seed}").replace("rank: 2", f"rank: {rank}")
        Path(f"seed_{seed}/config.yaml").write_text(config)
    with Path("seed_2/metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, sorted({name for line in lines for name in line}))
        writer.writeheader()
        writer.writerows([*lines[:-1], {**lines[-1], BEST: float(best[BEST]) + 3}])
    assert mtp("compare", "seed_3", "run", "seed_1", "seed_2", "--json") == 0
    (found,) = json.loads(capsys.readouterr().out)["seeds"]
    mean, deviation = found["mean and deviation"]["best forced acceptance length"]
    assert found["runs"] == ["run", "seed_1", "seed_2"]
    assert mean == pytest.approx(float(best[BEST]) + 1) and deviation == pytest.approx(3**0.5)
    assert mtp("compare", "seed_3", "run", "seed_1", "seed_2") == 0
    out = capsys.readouterr().out
    assert f"{mean:.3f} ± {deviation:.3f}" in out and max(map(len, out.splitlines())) <= 80


def test_names_are_broken_between_words() -> None:
    assert wrapped("model.sampler_head.hidden_size", 20, "./").split("\n") == ["model.sampler_head.", "hidden_size"]
    assert wrapped("GRUSamplerHead", 10).split("\n") == ["GRUSampler", "Head"]
    assert wrapped("-0.125", 10) == "-0.125"


def test_a_very_narrow_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(Console(width=8), "Figures", ["one", "two"], {"validation loss": ["1.5", "2.5"]})
    assert capsys.readouterr().out


def test_an_infinite_loss_is_no_figure() -> None:
    figures = [final_figures(Run(name, {}, [{"step": 1, "train/loss": math.inf}], None)) for name in "ab"]
    assert figures[0]["training loss at the end"] is None and mean_and_deviation(figures) == {"steps": (2, 0)}


def test_the_training_loss_is_a_mean() -> None:
    for count, latest in ((4, range(4)), (30, range(20, 30)), (200, range(180, 200))):
        lines = [{"step": step, "train/loss": step} for step in range(count)]
        assert final_figures(Run("a", {}, lines, None))["training loss at the end"] == sum(latest) / len(latest)


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
        ("run unlogged", 1, "trainer.log_every_n_steps"),
    ],
)
def test_wrong_command_lines(run: Path, here: Path, capsys, words: str, code: int, named: str) -> None:
    shutil.copytree("run", "run2")
    shutil.copytree("run", "broken")
    shutil.copytree("run", "unlogged", ignore=shutil.ignore_patterns("metrics.csv"))
    Path("broken/metrics.csv").write_text("step,train/loss\n1,x\n")
    assert named in error_of(capsys, code, "compare", *words.split())
    assert not Path("compare.png").exists()
