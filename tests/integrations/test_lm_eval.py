# SPDX-License-Identifier: Apache-2.0
"""The lm-evaluation-harness with our model class, on a task that is written here: the same figures as with its own class."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from saved import saved_model

pytest.importorskip("lm_eval", reason="lm_eval is not installed (pip install mtp-lightning[lm_eval])")
from lm_eval import simple_evaluate  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

import mtp_lightning.lm_eval  # noqa: E402, F401 - registers the class
from mtp_lightning import MTPModel  # noqa: E402

ROWS = """
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/rows.jsonl}}}}
test_split: test
doc_to_text: "{{{{text}}}}"
"""
CHOICE = """
task: toy_choice
output_type: multiple_choice
doc_to_choice: [" one", " two", " three"]
doc_to_target: 1
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
WRITE = """
task: toy_write
output_type: generate_until
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["six"], max_gen_toks: 20, do_sample: false}}
metric_list: [{{metric: bypass, aggregation: bypass, higher_is_better: true}}]
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved folder, its base, and two tasks."""
    folder = tmp_path_factory.mktemp("tasks")
    saved_model(folder)
    texts = ["one two three", "two", "four five one one", "six three"]
    (folder / "rows.jsonl").write_text("".join(json.dumps({"text": text, "answer": "two"}) + "\n" for text in texts))
    for name, text in (("choice", CHOICE), ("write", WRITE)):
        (folder / f"{name}.yaml").write_text((ROWS + text).format(folder=folder))
    return folder


def evaluate(folder: Path, model: Any, **options: Any) -> dict[str, list[Any]]:
    """For each task what the model answered."""
    out = simple_evaluate(
        model=model,
        tasks=["toy_choice", "toy_write"],
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        log_samples=True,
        bootstrap_iters=0,
        **options,
    )
    return {name: [row["resps"] for row in rows] for name, rows in out["samples"].items()}


@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_harness_sees_the_base_model(tasks: Path, batch_size: int) -> None:
    arguments = f"pretrained={tasks / 'base'},dtype=float64"
    expected = evaluate(tasks, "hf", model_args=arguments, batch_size=batch_size, device="cpu")
    assert len(expected["toy_write"]) == 4 and any(text for [[text]] in expected["toy_write"])
    for options in ("", ",decoding=linear,num_masks=2", ",sampler_head=False"):
        arguments = f"pretrained={tasks / 'saved'},dtype=float64{options}"
        assert evaluate(tasks, "mtp", model_args=arguments, batch_size=batch_size, device="cpu") == expected


def test_a_model_that_is_loaded_already(tasks: Path) -> None:
    model = MTPModel.from_pretrained(tasks / "saved")
    sizes: list[int] = []
    model.base.get_decoder().register_forward_pre_hook(
        lambda _, args, given: sizes.append(0 if given.get("inputs_embeds") is None else given["inputs_embeds"].shape[1]),
        with_kwargs=True,
    )
    found = evaluate(tasks, mtp_lightning.lm_eval.MTPLM(model, num_masks=2))
    assert found == evaluate(tasks, "hf", model_args=f"pretrained={tasks / 'base'}", device="cpu")
    assert max(sizes) == 9  # two drafts and three blocks of two: speculative decoding ran


@pytest.mark.slow
def test_the_command_line(tasks: Path) -> None:
    words = ["--model", "mtp", "--model_args", f"pretrained={tasks / 'saved'},num_masks=2", "--tasks", "toy_choice"]
    words += ["--include_path", str(tasks), "--device", "cpu", "--output_path", str(tasks / "out")]
    done = subprocess.run([sys.executable, "-m", "mtp_lightning.lm_eval", *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (file,) = (tasks / "out").rglob("results*.json")
    assert 0 <= json.loads(file.read_text())["results"]["toy_choice"]["acc,none"] <= 1
