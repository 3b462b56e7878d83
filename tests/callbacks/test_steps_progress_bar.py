# SPDX-License-Identifier: Apache-2.0
"""What a run shows on the terminal: its steps, what it trains, what is unusual about it, and no advertisements."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from command_line import mtp, write_rows
from tiny import tiny_model
from tiny_run import write_config, write_run
from toy_tokenizers import word_tokenizer

from mtp_lightning.callbacks import run_clock, run_summary, steps_progress_bar
from mtp_lightning.callbacks.run_summary import RunSummary


def test_the_terminal_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd, caplog) -> None:
    """Steps of the whole run are counted, under accumulation and after a resume."""
    config = write_run(tmp_path)
    last = {"class_path": "mtp_lightning.callbacks.LastCheckpoint"}
    config["trainer"] |= {"enable_progress_bar": True, "accumulate_grad_batches": 2, "callbacks+": [last]}
    write_config(tmp_path, config)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(steps_progress_bar, "SECONDS_BETWEEN_LINES", 0.0)
    for words, total, steps in (([], 2, [1, 2]), (["--ckpt_path", "last"], 5, [3, 4, 5])):
        assert mtp("fit", "config.yaml", "--trainer.max_steps", total, *words) == 0
        out, err = capfd.readouterr()
        assert [int(step) for step in dict.fromkeys(re.findall(r"^step (\d+) of \d+,.* loss", err, re.MULTILINE))] == steps
        lines = err.splitlines()
        assert all(any(line.startswith(name) for line in lines) for name in ("base ", "LoRA ", "masks ", "head ", "losses "))
        assert any(line.startswith("warning: ") and "data.validation" in line for line in lines)  # three rows
        assert any(line.startswith("warning: ") and "warmup_steps" in line for line in lines) == (not words)  # of 2 steps
        few = [line for line in lines if line.startswith("warning: ") and "trainer.val_check_interval" in line]
        assert [("no validation" in line, "one validation" in line) for line in few] == [(total == 2, total == 5)]
        assert "Tip:" not in out + err + caplog.text
    assert "max_steps=5` reached" in caplog.text  # other messages of Lightning are shown
    for limit, words in (("max_steps", []), ("max_epochs", ["--trainer.max_steps", -1, "--trainer.max_epochs", 0])):
        assert mtp("fit", "config.yaml", "--trainer.max_steps", 5, "--ckpt_path", "last", *words) == 0
        line = next(line for line in capfd.readouterr().err.splitlines() if "step 5" in line)
        assert f"trainer.{limit}" in line  # there is nothing left to train


def test_the_time_left_around_an_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(run_clock.time, "perf_counter", lambda: now)
    clock = run_clock.RunClock(10)
    assert clock.seconds_left(10, 110) is None and clock.seconds_left(11, math.inf) is None
    now = 20.0
    assert clock.seconds_left(20, 110) == 90 * 2
    clock.pause()
    now = 120.0  # while it decodes, and as soon as it has ended
    assert clock.seconds_left(20, 110) == 90 * 2
    assert clock.resume(20) == 100 and clock.resume(20) == 0
    now = 122.0
    assert clock.seconds_left(21, 110) == 89 * 2 + 8 * 100  # and evaluations in steps 30, 40, ... 100


def test_a_run_without_a_limit_of_steps(capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = {"estimated_stepping_batches": math.inf, "num_training_batches": 4, "check_val_every_n_epoch": 1}
    others = {"is_global_zero": True, "log_dir": "run", "val_check_batch": 4, "lr_scheduler_configs": [], "global_step": 0}
    others["datamodule"] = SimpleNamespace(train="a.jsonl", validation=["a.jsonl", "b.jsonl"], rows={})
    for precision, has_products in (("32-true", False), ("bf16-mixed", True), ("bf16-mixed", False)):
        monkeypatch.setattr(run_summary, "has_bfloat16_products", lambda has=has_products: has)
        cpu = SimpleNamespace(root_device=torch.device("cpu"))
        trainer = SimpleNamespace(**limits, **others, precision=precision, strategy=cpu)
        RunSummary().on_train_start(trainer, SimpleNamespace(model=tiny_model()))
        lines = capsys.readouterr().err.splitlines()
        assert not re.search(r"\d", next(line for line in lines if line.startswith("run ")))
        assert any("data.train" in line and "a.jsonl" in line for line in lines if line.startswith("warning: "))
        trainer.datamodule = SimpleNamespace(train=torch.ones(2), validation=[{"text": "one"}])  # a user's own
        found = run_summary.warnings_of(trainer, SimpleNamespace(model=tiny_model()), 1)
        assert not any("data.train" in text for text in found)
        slow = any("trainer.precision" in line for line in lines if line.startswith("warning: "))
        assert slow == (precision == "bf16-mixed" and not has_products)


def test_openings_of_rows_in_place_of_conversations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """A base without a chat template can't be asked them; and a row is at most as long as its context."""
    config = write_run(tmp_path)
    config["data"]["max_length"] = 999
    write_config(tmp_path, config)
    tokenizer = word_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "base")
    (tmp_path / "base/chat_template.jinja").unlink(missing_ok=True)
    write_rows(tmp_path / "prompts.jsonl", [{"messages": [{"role": "user", "content": "one"}]}])
    monkeypatch.chdir(tmp_path)
    assert mtp("fit", "config.yaml", "--trainer.max_steps", 1, "--trainer.val_check_interval", 1) == 0
    assert "data.max_length: 32," in capsys.readouterr().err
    assert json.loads(Path("run/acceptance.json").read_text())["latest"]["overall"]["num_prompts"] == 3
