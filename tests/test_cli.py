# SPDX-License-Identifier: Apache-2.0
"""The program from its command line to its files and messages, on a tiny base whose tokenizer has no pad token."""

from __future__ import annotations

import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from command_line import (
    error_of,
    leave_no_trace,  # noqa: F401 - a fixture
    mtp,
    own_cache,  # noqa: F401 - a fixture
    read_metrics,
    save_base,
    write_rows,
)
from tiny import greedy_text
from toy_tokenizers import word_tokenizer
from transformers import AutoModelForCausalLM

import mtp_lightning
from mtp_lightning import MTPModel, cli
from mtp_lightning.errors import RunError, UsageError
from mtp_lightning.text_stream import possible_stop

CONTEXT, NUM_MASKS, STEPS = 96, 3, 4
CONFIG: dict[str, Any] = {
    "model": {
        "base_model": "base",
        "num_masks": NUM_MASKS,
        "lora": {"rank": 2},
        "sampler_head": {"class_path": "GRUSamplerHead", "init_args": {"hidden_size": 8}},
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}},
        "lr_scheduler": {"class_path": "mtp_lightning.schedules.WarmupConstant", "init_args": {"warmup_steps": 2}},
    },
    "data": {"train": "train.jsonl", "validation": "validation.jsonl", "max_length": 32, "batch_size": 4},
    "trainer": {
        "accelerator": "cpu",
        "max_steps": STEPS,
        "val_check_interval": 2,
        "log_every_n_steps": 1,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "logger": [
            {
                "class_path": "lightning.pytorch.loggers.CSVLogger",
                "init_args": {"save_dir": "run", "name": "", "version": ""},
            }
        ],
        "callbacks+": [
            {
                "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                "init_args": {
                    "monitor": "val/forced_acceptance_length",
                    "mode": "max",
                    "filename": "best",
                    "auto_insert_metric_name": False,
                    "enable_version_counter": False,
                },
            },
            # Not save_last: it writes when the best one is written.
            {
                "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                "init_args": {"filename": "last", "enable_version_counter": False},
            },
        ],
    },
}
LAST = "run/checkpoints/last.ckpt"
TERMS = ("base", "lcm", "sampler")
FIGURES = {"ntp_loss", "forced_acceptance_length", "forced_reference", "share_of_reference", "loss"}
FIGURES |= {f"loss/{term}" for term in TERMS} | {f"accuracy/offset_{o}" for o in range(2, NUM_MASKS + 2)}
FIELDS = "prompt text token_ids num_steps acceptance_length accepted_per_step seconds tokens_per_second decoding num_masks"
FIELDS = [*FIELDS.split(), "finish_reason"]


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, data, a configuration and what one run of ``fit`` wrote; not to be changed."""
    folder = tmp_path_factory.mktemp("trained")
    tokenizer = word_tokenizer()
    assert tokenizer.pad_token is None
    save_base(folder / "base", "llama", tokenizer, torch.float32, max_position_embeddings=CONTEXT)
    draw = torch.Generator().manual_seed(0)
    words = tokenizer.convert_ids_to_tokens(list(range(9, 15)))
    texts = [" ".join(words[i] for i in torch.randint(6, (20,), generator=draw).tolist()) for _ in range(24)]
    write_rows(folder / "train.jsonl", [{"text": text} for text in texts])
    # What the base itself writes: there its own argmax is right, and the forced reference has something to count.
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    prompts = torch.randint(9, 15, (6, 4), generator=draw)
    write_rows(folder / "validation.jsonl", [{"input_ids": [*p.tolist(), *greedy_text(base, p, 20)]} for p in prompts])
    write_rows(folder / "prompts.jsonl", [{"prompt": "one two", "domain": "a"}, {"prompt": "six"}])
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert mtp("fit", "--config", "config.yaml") == 0
    return folder


@pytest.fixture
def here(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder of a test: a copy of ``trained``."""
    folder = tmp_path / "here"
    shutil.copytree(trained, folder, ignore=lambda at, names: {"run"} & set(names))
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def run(trained: Path, here: Path) -> Path:
    """The run's folder in ``here``."""
    shutil.copytree(trained / "run", here / "run")
    return here / "run"


def fit(*options: object) -> int:
    return mtp("fit", "--config", "config.yaml", *options)


def contents(folder: Path) -> dict[str, bytes]:
    """Path and content of all files."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def without_times(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in line.items() if "second" not in name} for line in lines]


def losses(folder: Path) -> list[str]:
    return [line["train/loss"] for line in read_metrics(folder) if "train/loss" in line]


def validations(folder: Path) -> list[dict[str, str]]:
    return [line for line in read_metrics(folder) if "val/loss" in line]


def weights(checkpoint: str | Path) -> dict[str, torch.Tensor]:
    return torch.load(checkpoint, weights_only=True)["state_dict"]


# fit


def test_a_run_folder_and_the_logged_names(trained: Path) -> None:
    assert set(contents(trained / "run")) == {
        *("config.yaml", "metrics.csv", "run_id.txt"),
        *("checkpoints/best.ckpt", "checkpoints/last.ckpt"),
    }
    lines = read_metrics(trained / "run")
    training, validation = [line for line in lines if "train/loss" in line], validations(trained / "run")
    assert len(training) == STEPS and len(validation) == STEPS // 2 and len(lines) == 3 * STEPS // 2
    for line in training:
        assert set(line) == {"epoch", "step", "train/loss", *(f"train/loss/{term}" for term in TERMS)}
        assert float(line["train/loss"]) == pytest.approx(sum(float(line[f"train/loss/{term}"]) for term in TERMS), rel=1e-6)
    for line in validation:
        assert set(line) == {"epoch", "step", *(f"val/{name}" for name in FIGURES)}
        forced, reference = float(line["val/forced_acceptance_length"]), float(line["val/forced_reference"])
        assert reference > 2 and 1 <= forced <= 1 + NUM_MASKS
        assert float(line["val/share_of_reference"]) == pytest.approx((forced - 1) / (reference - 1))


def test_validation_text_and_blocks_are_the_same_every_time(trained: Path) -> None:
    lines = validations(trained / "run")
    assert len({line["val/loss"] for line in lines}) == len(lines) > 1  # it trains
    for name in ("val/ntp_loss", "val/forced_reference"):
        assert len({line[name] for line in lines}) == 1


def test_a_checkpoint_holds_trained_weights_alone(trained: Path, here: Path) -> None:
    for name in ("best", "last"):
        path = trained / "run" / "checkpoints" / f"{name}.ckpt"
        checkpoint = torch.load(path, weights_only=True)
        model = MTPModel.from_pretrained(str(path))
        expected = {f"model.{name}": p.shape for name, p in model.trained_parameters()}
        assert {name: p.shape for name, p in checkpoint["state_dict"].items()} == expected
        assert not [name for name in expected if ".base." in name and ".lora_" not in name]
        # Weights and Adam's two moments of each; the rest is settings and the loops' counters.
        assert path.stat().st_size < 3 * 4 * sum(shape.numel() for shape in expected.values()) + 100_000
        assert path.stat().st_size < sum(p.numel() * 4 for p in model.parameters()) + 100_000
    assert checkpoint["global_step"] == STEPS


def test_a_resumed_run_is_the_uninterrupted_one_and_adds_to_its_figures(run: Path) -> None:
    before = (run / "metrics.csv").read_text()
    assert fit("--ckpt_path", LAST, "--trainer.max_steps", 6) == 0
    assert fit("--trainer.max_steps", 6, "--trainer.logger.save_dir", "whole") == 0
    assert (run / "metrics.csv").read_text().startswith(before)
    assert read_metrics(run) == read_metrics(Path("whole"))
    assert [int(line["step"]) for line in read_metrics(run) if "train/loss" in line] == list(range(6))
    resumed, whole = weights(LAST), weights("whole/checkpoints/last.ckpt")
    assert resumed.keys() == whole.keys() and all(resumed[name].equal(whole[name]) for name in whole)


def test_the_saved_configuration_alone_is_the_same_run(trained: Path, here: Path) -> None:
    shutil.copy(trained / "run" / "config.yaml", "saved.yaml")
    assert mtp("fit", "--config", "saved.yaml") == 0
    assert contents(here / "run")["metrics.csv"] == contents(trained / "run")["metrics.csv"]
    assert (here / "run" / "config.yaml").read_text() == Path("saved.yaml").read_text()


def test_a_new_run_in_the_same_folder_replaces_the_figures(run: Path) -> None:
    assert fit("--trainer.max_steps", 1) == 0
    assert len(losses(run)) == 1


def test_a_configuration_without_a_logger_goes_on_in_the_same_folder(here: Path) -> None:
    config = yaml.safe_load((here / "config.yaml").read_text())
    del config["trainer"]["logger"]
    (here / "config.yaml").write_text(yaml.safe_dump(config))
    assert fit("--ckpt_path", "last", "--trainer.max_steps", 2) == 0
    assert fit("--ckpt_path", "last", "--trainer.max_steps", 3) == 0
    assert len(losses(here / "lightning_logs")) == 3
    assert list((here / "lightning_logs").glob("events.out.tfevents.*"))
    assert not list((here / "lightning_logs").glob("version_*"))
    assert fit("--trainer.logger", "false", "--trainer.max_steps", 1) == 0
    assert len(losses(here / "lightning_logs")) == 3


def test_validate_and_test_give_the_figures_of_the_last_validation(run: Path, capsys) -> None:
    before, configuration = validations(run)[-1], (run / "config.yaml").read_text()
    figures = {name: value for name, value in before.items() if name.startswith("val/")}
    for command, prefix in (("validate", "val/"), ("test", "test/")):
        options = ["--ckpt_path", LAST, "--data.test", "validation.jsonl"]
        assert mtp(command, "--config", "config.yaml", *options) == 0
        out = capsys.readouterr().out
        expected = {name.replace("val/", prefix): value for name, value in figures.items()}
        assert all(name in out for name in expected)
        line = read_metrics(run)[-1]
        assert {name: value for name, value in line.items() if "/" in name} == expected
    assert validations(run)[-2] == before and len(losses(run)) == STEPS  # nothing of the training is lost
    assert (run / "config.yaml").read_text() == configuration


def test_a_standard_lora_moves_the_ntp_loss(here: Path) -> None:
    assert fit("--model.lora.gated", "false") == 0
    assert len({line["val/ntp_loss"] for line in validations(here / "run")}) == STEPS // 2


def test_without_sampler_head(here: Path, capsys) -> None:
    assert fit("--model.sampler_head", "false", "--trainer.max_steps", 2) == 0
    assert "train/loss/sampler" not in read_metrics(here / "run")[0]
    assert not [name for name in weights(LAST) if "sampler" in name]
    assert mtp("generate", LAST, "--prompt", "one", "--max_new_tokens", 3) == 0


def test_accumulated_batches_are_one_large_batch(here: Path) -> None:
    # Packed rows are not sorted by length, so that two batches of 2 are one of 4. Adam would hide a factor.
    options = ["--model.dtype", "float64", "--model.optimizer.class_path", "torch.optim.SGD", "--trainer.max_steps", 2]
    options += ["--data.packing", "true", "--data.max_length", 64]
    assert fit(*options, "--trainer.logger.save_dir", "large") == 0
    options += ["--data.batch_size", 2, "--trainer.accumulate_grad_batches", 2, "--trainer.val_check_interval", 4]
    assert fit(*options, "--trainer.logger.save_dir", "accumulated") == 0
    large, accumulated = weights("large/checkpoints/last.ckpt"), weights("accumulated/checkpoints/last.ckpt")
    assert large.keys() == accumulated.keys()
    for name in large:
        torch.testing.assert_close(accumulated[name], large[name], rtol=1e-8, atol=1e-10)


def test_gradient_checkpointing_changes_nothing(here: Path) -> None:
    options = ["--model.dtype", "float64", "--trainer.max_steps", 2, "--trainer.logger.save_dir"]
    assert fit("--model.gradient_checkpointing", "true", *options, "recomputed") == 0
    assert fit("--model.gradient_checkpointing", "false", *options, "stored") == 0
    stored, recomputed = weights("stored/checkpoints/last.ckpt"), weights("recomputed/checkpoints/last.ckpt")
    for name in stored:
        torch.testing.assert_close(recomputed[name], stored[name], rtol=1e-8, atol=1e-10)


def test_a_loss_and_a_head_from_the_current_folder(here: Path, capsys) -> None:
    (here / "my_losses.py").write_text(
        "import torch\nimport torch.nn.functional as F\nfrom mtp_lightning.losses import SamplerCrossEntropy\n\n\n"
        "class Focal(SamplerCrossEntropy):\n"
        "    def per_position(self, logits, targets):\n"
        "        loss = F.cross_entropy(logits, targets.labels, reduction='none')\n"
        "        return (1 - torch.exp(-loss)) ** 2 * loss\n"
    )
    (here / "my_heads.py").write_text(
        "from torch import nn\nfrom mtp_lightning.sampler_heads import SamplerHead\n\n\n"
        "class Added(SamplerHead):\n"
        "    def __init__(self, bias: bool = True):\n"
        "        super().__init__()\n"
        "        self.bias = bias\n\n"
        "    def build(self, width):\n"
        "        self.layer = nn.Linear(width, width, self.bias)\n\n"
        "    def forward(self, hidden, previous):\n"
        "        return hidden + self.layer(previous)\n\n"
        "    def step(self, hidden, previous, state):\n"
        "        return self(hidden, previous), None\n"
    )
    head = ["--model.sampler_head.class_path", "my_heads.Added", "--model.sampler_head.bias", "false"]
    both = ["--model.losses.plain.class_path", "SamplerCrossEntropy", "--model.losses.focal.class_path", "my_losses.Focal"]
    assert fit(*head, *both, "--model.losses.focal.weight", 0.5, "--trainer.max_steps", 2) == 0
    line = read_metrics(here / "run")[0]
    plain, focal = float(line["train/loss/plain"]), float(line["train/loss/focal"])
    assert 0 < focal < plain and float(line["train/loss"]) == pytest.approx(plain + 0.5 * focal)
    assert [name for name in weights(LAST) if "sampler_head" in name] == ["model.sampler_head.layer.weight"]
    assert mtp("generate", LAST, "--prompt", "one", "--max_new_tokens", 3) == 0
    assert capsys.readouterr().out.startswith("one")


# generate and predict


class Recorder(io.StringIO):
    """Standard output that remembers what was written at once."""

    def __init__(self) -> None:
        super().__init__()
        self.pieces: list[str] = []

    def write(self, text: str) -> int:
        self.pieces.append(text)
        return super().write(text)


def json_lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_generate_streams_what_the_model_generates(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = Recorder()
    monkeypatch.setattr(sys, "stdout", output)
    assert mtp("generate", LAST, "--prompt", "one two", "--max_new_tokens", 16) == 0
    model = MTPModel.from_pretrained(LAST)
    expected = model.generate(model.tokenizer("one two", return_tensors="pt").input_ids, max_new_tokens=16)
    text = model.tokenizer.decode(expected.sequences[0, 3:], skip_special_tokens=True)
    assert output.getvalue() == f"one two{text}"
    assert len([piece for piece in output.pieces if piece.strip()]) > 3  # in pieces, not at the end


def test_json_lines_of_generate_and_predict(run: Path, capsys) -> None:
    options = ["--max_new_tokens", 9, "--decoding", "linear", "--num_masks", 2]
    assert mtp("generate", LAST, "--prompts", "prompts.jsonl", "--json", *options) == 0
    lines = json_lines(capsys)
    assert mtp("predict", "--config", "config.yaml", "--ckpt_path", LAST, "--data.test", "prompts.jsonl", *options) == 0
    assert without_times(json_lines(capsys)) == without_times(lines)
    assert mtp("predict", "--config", "config.yaml", "--ckpt_path", LAST, "--prompts", "prompts.jsonl", *options) == 0
    assert without_times(json_lines(capsys)) == without_times(lines)
    assert [line["prompt"] for line in lines] == ["one two", "six"]
    for line in lines:
        assert list(line) == FIELDS
        assert (line["decoding"], line["num_masks"], line["finish_reason"]) == ("linear", 2, "length")
        assert len(line["token_ids"]) == sum(line["accepted_per_step"]) + line["num_steps"] == 9
        assert line["num_steps"] == len(line["accepted_per_step"])
        assert line["acceptance_length"] == 9 / line["num_steps"]
        assert line["tokens_per_second"] == pytest.approx(9 / line["seconds"])


def test_all_decodings_write_the_same_text(run: Path, capsys) -> None:
    for options in (["quadratic"], ["linear"], ["autoregressive"], ["quadratic", "--sampler_head", "false"]):
        words = ["--prompt", "one two", "--max_new_tokens", 40, "--dtype", "float64", "--json", "--decoding"]
        assert mtp("generate", LAST, *words, *options) == 0
    lines = json_lines(capsys)
    assert len(lines) == 4 and len(lines[0]["token_ids"]) == 40
    assert all(line["token_ids"] == lines[0]["token_ids"] and line["text"] == lines[0]["text"] for line in lines)
    assert (lines[2]["num_steps"], lines[2]["num_masks"]) == (40, 0)


def test_batches_and_seeds(run: Path, capsys) -> None:
    """A prompt's draws depend on the seed and its place in the file, not on what is decoded beside it."""
    Path("many.txt").write_text("one two\nsix\nthree four five\none two\n")
    words = ["generate", LAST, "--prompts", "many.txt", "--max_new_tokens", 12, "--dtype", "float64", "--json"]
    for options in (["--temperature", 0.9, "--top_p", 0.95, "--top_k", 20, "--seed", 4], [], ["--stop", " "]):
        assert mtp(*words, *options) == 0
        alone = without_times(json_lines(capsys))
        for size in (2, 3, 8):
            assert mtp(*words, *options, "--batch_size", size, "--num_masks", 2, "--decoding", "linear") == 0
            lines = without_times(json_lines(capsys))
            assert [line["text"] for line in lines] == [line["text"] for line in alone]
            assert [line["finish_reason"] for line in lines] == [line["finish_reason"] for line in alone]
        if "--seed" in options:
            assert alone[0]["text"] != alone[3]["text"]  # the same prompt with another seed
    assert mtp(*words, "--temperature", 1, "--seed", 4, "--verification", "rejection") == 0
    assert len(json_lines(capsys)) == 4
    assert mtp(*words[:-1], "--batch_size", 4) == 0
    out = capsys.readouterr()
    assert out.err.count("acceptance length") == 4 and out.out.count("one two") == 2


def test_a_stop_text_ends_the_text_and_is_not_shown(run: Path, capsys) -> None:
    words = ["generate", LAST, "--prompt", "one two", "--max_new_tokens", 30]
    assert mtp(*words, "--json") == 0
    whole = json_lines(capsys)[0]
    # A part of the text that begins within one token and ends within a later one.
    begin = len(whole["text"]) // 2
    stop = whole["text"][begin : begin + 12]
    cut = whole["text"][: whole["text"].index(stop)]
    assert mtp(*words, "--json", "--stop", stop) == 0
    line = json_lines(capsys)[0]
    assert (line["text"], line["finish_reason"]) == (cut, "stop")
    assert len(line["token_ids"]) < 30 and line["token_ids"] == whole["token_ids"][: len(line["token_ids"])]
    assert mtp(*words, "--stop", stop) == 0
    assert capsys.readouterr().out.rstrip("\n") == f"one two{cut}".rstrip("\n")
    assert mtp(*words, "--json", "--stop", "no such text") == 0
    assert without_times(json_lines(capsys)) == without_times([whole])


def test_possible_stop() -> None:
    assert [possible_stop(text, "two") for text in ("one t", "one tw", "one two", "", "w")] == [1, 2, 0, 0, 0]
    assert possible_stop("abab", "ababc") == 4 and possible_stop("abc", "") == 0


def test_generate_reads_standard_input(run: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\ntwo\n"))
    assert mtp("generate", LAST, "--prompts", "-", "--json", "--max_steps", 2) == 0
    assert [(line["prompt"], line["num_steps"]) for line in json_lines(capsys)] == [("one", 2), ("two", 2)]


def test_a_base_that_moved(run: Path, capsys) -> None:
    words = ["generate", LAST, "--prompt", "one", "--max_new_tokens", 5, "--json"]
    assert mtp(*words) == 0
    expected = json_lines(capsys)
    os.rename("base", "moved")
    assert error_of(capsys, 1, *words).startswith("base model 'base' could not be loaded: ")
    assert mtp(*words, "--base_model", "moved") == 0
    assert without_times(json_lines(capsys)) == without_times(expected)


# help, errors


def test_help_and_version(capsys) -> None:
    for words in ([], ["--help"], ["-h"]):
        assert mtp(*words) == 0
        out = capsys.readouterr().out
        assert all(f"\n  {command} " in out for command in ("fit", "validate", "test", "predict", "generate"))
    assert mtp("--version") == 0 and capsys.readouterr().out == f"mtp {mtp_lightning.__version__}\n"
    for command, option in (("fit", "--model.lora.rank"), ("predict", "--num_masks"), ("generate", "--stop")):
        assert mtp(command, "--help") == 0
        assert option in capsys.readouterr().out


def test_python_m_is_the_same_program() -> None:
    done = subprocess.run([sys.executable, "-m", "mtp_lightning", "fitt"], capture_output=True, text=True)
    expected = f"mtp: error: unknown command 'fitt': expected one of {', '.join(cli.COMMANDS)}.\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", expected)


DOTTED = "; a class_path is module.Class, of an installed package or of a file in the current folder."
WRONG_CONFIGURATION = {
    "--model.nummasks 9": "unknown key or option '--model.nummasks': did you mean 'model.num_masks'?",
    "--config typo.yaml": "unknown key or option 'model.num_maks': did you mean 'model.num_masks'?",
    "--zzzzzzzz 1": "unknown key or option '--zzzzzzzz': --help lists what there is.",
    "--model.num_masks three": "model.num_masks: expected int, got three.",
    "--trainer.max_steps 1.5": "trainer.max_steps: expected int, got 1.5.",
    "--config no_list.yaml": re.compile(r"Problems parsing config: .*line 2.*"),
    "--config": "argument -c/--config: expected one argument",
    "--model.num_masks 0": "num_masks must be 1 or more, got 0. Set model.num_masks in the YAML.",
    "--model.num_masks -1": "num_masks must be 1 or more, got -1. Set model.num_masks in the YAML.",
    "--model.lora.rank 0": "rank must be 1 or more, got 0. Set model.lora.rank in the YAML.",
    "--model.dtype float12": (
        "dtype must be auto or one of float64, float32, bfloat16, float16, got 'float12'. Set model.dtype, or --dtype."
    ),
    "--model.attention flash9": (
        "attention must be one of sdpa, eager, flex_attention, or null, got 'flash9'. Set model.attention."
    ),
    "--model.quantization 3bit": "quantization must be one of 4bit, 8bit, or null, got '3bit'. Set model.quantization.",
    "--model.sampler_head false --model.losses.mine.class_path SamplerCrossEntropy": (
        "loss term mine (SamplerCrossEntropy) needs a sampler head, and model.sampler_head is false."
        " Remove model.losses.mine or name a sampler head."
    ),
    "--model.sampler_head.class_path NoHead": ("model.sampler_head: NoHead is no import path" + DOTTED),
    "--model.losses.a.class_path my_losses.Focal": (
        "model.losses: Problem with given class_path 'my_losses.Focal': No module named 'my_losses'" + DOTTED
    ),
    "--model.losses.a.class_path mtp_lightning.losses.SamplerCrossEntropi": (
        "model.losses: Problem with given class_path 'mtp_lightning.losses.SamplerCrossEntropi':"
        " module 'mtp_lightning.losses' has no attribute 'SamplerCrossEntropi'" + DOTTED
    ),
    "--model.losses.a.class_path SamplerCrossEntropi": "model.losses: SamplerCrossEntropi is no import path" + DOTTED,
    "--model.losses.a.class_path torch.nn.Linear": (
        "model.losses: Import path torch.nn.Linear does not correspond to a subclass of LossTerm" + DOTTED
    ),
    "--model.losses.a.class_path BaseCrossEntropy --model.losses.a.wait 2": "model.losses: Option 'wait' is not accepted.",
    "--model.lora.target_modules no_layer": re.compile(
        r"model\.lora\.target_modules 'no_layer' fits no layer of the base model: .*"
    ),
    "--data.batch_size 0": "batch_size must be 1 or more, got 0. Set data.batch_size.",
    "--data.max_length 97": "max_length must be at most the base's context, 96, got 97. Set data.max_length.",
    "--data.train config.yaml": (
        "config.yaml: expected a file that ends in one of .jsonl, .json, .parquet, .txt, got '.yaml'. Convert it."
    ),
    "--trainer.strategy no_strategy": re.compile(
        r"the trainer can't be made: .*no_strategy.* Change trainer\.\* in the configuration\."
    ),
    "--trainer.callbacks+ mtp_lightning.callbacks.AcceptanceEvaluation": (
        "trainer.callbacks: prompts is required: set it in the configuration file or on the command line."
    ),
    "--model.sampler_head 3": "model.sampler_head: 3 is no import path" + DOTTED,
    "--model.losses 3": "model.losses: expected dict, got 3.",
    "--model.optimizer.class_path torch.optim.Nope": re.compile(
        r"model\.optimizer: .*: module 'torch\.optim' has no attribute 'Nope'\."
    ),
    "--trainer.callbacks+ mtp_lightning.callbacks.AcceptanceEvaluation --trainer.callbacks.prompts prompts.jsonl"
    " --trainer.callbacks.num_masks 4": (
        "num_masks must be auto or from 1 to 3, the number this model was trained with, got 4. Change num_masks."
    ),
}
WRONG_DATA = {
    "missing.jsonl": (None, "expected a file or folder, nothing is there (looked in {here}). Check the path."),
    "empty.jsonl": ("\n", "expected at least one row, it is empty."),
    "broken.jsonl": (
        '{"text": "one two"}\n{text: 1}\n',
        re.compile(r"broken\.jsonl, line 2: expected JSON, got .* at column 2\. Correct or delete the line\."),
    ),
    "fields.jsonl": (
        '{"txt": "one two"}\n',
        "expected rows with messages | prompt + completion (or completion_ids) | text | input_ids (+ labels),"
        " got the fields txt. Rename or add a field.",
    ),
    "types.jsonl": (
        '{"prompt": "one", "completion": 3}\n',
        re.compile(r"types\.jsonl, row 1: completion must be text, got int\."),
    ),
    "short.jsonl": (
        '{"input_ids": [9]}\n',
        re.compile(
            r"data\.(train|validation): none of the 1 rows can be used: 1 shorter than two tokens\. Expected rows of two"
            r" tokens or more with loss after the first; check the fields, max_length and the chat template\."
        ),
    ),
}


def assert_message(found: str, expected: str | re.Pattern[str]) -> None:
    if isinstance(expected, str):
        assert found == expected
    else:
        assert expected.fullmatch(found), found


@pytest.mark.parametrize("options", WRONG_CONFIGURATION)
def test_wrong_configuration(here: Path, capsys, options: str) -> None:
    (here / "typo.yaml").write_text("model: {num_maks: 3}\n")
    (here / "no_list.yaml").write_text("data:\n  train: [a, b\n")
    assert_message(error_of(capsys, 2, "fit", "--config", "config.yaml", *options.split()), WRONG_CONFIGURATION[options])
    assert not [path for path in here.rglob("run/**/*") if path.is_file()]


@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize("name", WRONG_DATA)
def test_wrong_data(run: Path, here: Path, capsys, name: str, split: str) -> None:
    content, expected = WRONG_DATA[name]
    if content is not None:
        (here / name).write_text(content)
    before = contents(run)
    found = error_of(capsys, 1, "fit", "--config", "config.yaml", f"--data.{split}", name)
    assert_message(found, f"{name}: {expected.format(here=here)}" if isinstance(expected, str) else expected)
    assert contents(run) == before  # the run that is there loses nothing to a failed one


@pytest.mark.parametrize(
    ("words", "code", "expected"),
    [
        ("fitt", 2, f"unknown command 'fitt': expected one of {', '.join(cli.COMMANDS)}."),
        ("fit", 2, "model.base_model is required: set it in the configuration file or on the command line."),
        (
            "fit --config no.yaml",
            1,
            "configuration file 'no.yaml' does not exist. Give the path of a YAML file with --config.",
        ),
        ("fit -c=no.yaml", 1, "configuration file 'no.yaml' does not exist. Give the path of a YAML file with --config."),
        ("test --config config.yaml", 2, "data.test must name a source for this command, got nothing. Set data.test."),
        (
            "predict --config config.yaml --prompts prompts.jsonl",
            2,
            "ckpt_path is required: set it in the configuration file",
        ),
        (
            "predict --config config.yaml --ckpt_path last",
            2,
            "mtp predict needs the path of a .ckpt file, got 'last'. Change --ckpt_path.",
        ),
        (
            "predict --config config.yaml --ckpt_path {last}",
            2,
            "mtp predict needs prompts: give --prompts FILE or set data.",
        ),
        (
            "predict --config config.yaml --ckpt_path {last} --prompts no.jsonl",
            1,
            "no.jsonl: expected a file of prompts, nothing is there (looked in {here}). Check the path.",
        ),
        (
            "predict --config config.yaml --ckpt_path {last} --prompts prompts.jsonl --model.nummasks 2",
            2,
            "unknown key or option '--model.nummasks': did you mean 'model.num_masks'?",
        ),
        ("generate", 2, "model is required: set it in the configuration file or on the command line."),
        (
            "generate no.ckpt --prompt a",
            1,
            "checkpoint 'no.ckpt' does not exist. Give the path of a .ckpt file that mtp fit wrote.",
        ),
        ("generate base --prompt a", 1, "base is no folder that mtp export wrote: it has no mtp_config.json. Give such a"),
        ("generate {last}", 2, "give either --prompt TEXT or --prompts FILE."),
        ("generate {last} --prompt a --prompts prompts.jsonl", 2, "give either --prompt TEXT or --prompts FILE."),
        (
            "generate {last} --prompt a --decoding cubic",
            2,
            "decoding: expected 'quadratic', 'linear', 'autoregressive', got cubic.",
        ),
        ("generate {last} --prompt a --num_masks x", 2, "num_masks: expected int or 'auto', got x."),
        ("generate {last} --prompt a --num_maskz 2", 2, "unknown key or option '--num_maskz': did you mean 'num_masks'?"),
        (
            "generate {last} --prompt a --num_masks 0",
            2,
            "num_masks must be auto or from 1 to 3, the number this model was trained",
        ),
        (
            "generate {last} --prompt a --num_masks 4",
            2,
            "num_masks must be auto or from 1 to 3, the number this model was trained",
        ),
        (
            "generate {last} --prompt a --max_new_tokens 0",
            2,
            "max_new_tokens must be 1 or more, got 0. Change --max_new_tokens.",
        ),
        ("generate {last} --prompt a --max_steps 0", 2, "max_steps must be 1 or more, got 0. Change --max_steps."),
        (
            "generate {last} --prompt a --dtype half",
            2,
            "dtype must be auto or one of float64, float32, bfloat16, float16, got 'half'",
        ),
        (
            "generate {last} --prompt a --device tpu9",
            2,
            "device must be cpu, cuda or another one of this machine, got 'tpu9': ",
        ),
        (
            "generate {last} --prompts long.txt",
            2,
            "prompt 2 has 100 tokens and the model's context is 96: shorten it to 95 or less.",
        ),
    ],
)
def test_wrong_command_lines(run: Path, here: Path, capsys, words: str, code: int, expected: str) -> None:
    Path("long.txt").write_text("one\n" + "one " * 99 + "\n")
    found = error_of(capsys, code, *words.format(last=LAST).split())
    assert found.startswith(expected.format(here=here))


def test_an_empty_prompt(run: Path, capsys) -> None:
    word_tokenizer(bos=False).save_pretrained("base")  # otherwise an empty text is one token, which will do
    message = "the prompt is empty: it needs at least one token."
    assert error_of(capsys, 2, "generate", LAST, "--prompt", "") == message


@pytest.mark.parametrize("command", ["fit", "validate", "generate"])
def test_base_model_not_found(run: Path, capsys, command: str) -> None:
    before = contents(run)
    words = {
        "fit": ["--config", "config.yaml", "--model.base_model", "no_base"],
        "validate": ["--config", "config.yaml", "--model.base_model", "owner/no_base", "--ckpt_path", LAST],
        "generate": [LAST, "--prompt", "one", "--base_model", "./no_base"],
    }[command]
    found = error_of(capsys, 1, command, *words)
    assert re.match(r"base model '(\./|owner/)?no_base' could not be loaded: ", found)
    assert found.endswith(
        "Set model.base_model to a folder with config.json and weights, or to a hub id that this machine can reach."
    )
    assert contents(run) == before


@pytest.mark.parametrize("command", ["fit", "validate", "predict", "generate"])
def test_files_that_are_no_checkpoint(run: Path, capsys, command: str) -> None:
    whole = Path(LAST).read_bytes()
    unreadable = "checkpoint '{}' can't be read; it may be cut short or no checkpoint. Use another one."
    cases = {
        "truncated.ckpt": (whole[: len(whole) // 2], unreadable),
        "empty.ckpt": (b"", unreadable),
        "text.ckpt": (b"hello\n", unreadable),
        "code.ckpt": (b"cos\nsystem\n(S'echo run'\ntR.", unreadable),
    }
    for name, (content, _) in cases.items():
        Path(name).write_bytes(content)
    torch.save({"state_dict": {}}, "other.ckpt")
    cases["other.ckpt"] = (
        b"",
        "checkpoint '{}' was not written by mtp fit: it has no entry 'mtp_settings'. Use another one.",
    )
    before = contents(run)
    for name, (_, message) in cases.items():
        words = [name, "--prompt", "one"] if command == "generate" else ["--config", "config.yaml", "--ckpt_path", name]
        extra = ["--prompts", "prompts.jsonl"] if command == "predict" else []
        assert error_of(capsys, 1, command, *words, *extra) == message.format(name)
    assert contents(run) == before


@pytest.mark.parametrize("command", ["fit", "validate"])
def test_a_checkpoint_of_other_settings(run: Path, here: Path, capsys, command: str) -> None:
    save_base(here / "wider", "llama", word_tokenizer(), torch.float32, max_position_embeddings=CONTEXT, hidden_size=40)
    before = contents(run)
    path = "mtp_lightning.sampler_heads.GRUSamplerHead"
    head = "{'class_path': '" + path + "', 'init_args': {'hidden_size': %s, 'read_hidden': False}}"
    shape = "{'model_type': 'llama', 'hidden_size': %s, 'num_hidden_layers': 2, 'vocab_size': 17}"
    for key, value, name, there, here_ in (
        ("model.num_masks", 4, "num_masks", 3, 4),
        ("model.lora.rank", 4, "LoRA rank", 2, 4),
        ("model.sampler_head.hidden_size", 16, "sampler head", head % 8, head % 16),
        ("model.base_model", "wider", "base model", shape % 32, shape % 40),
    ):
        words = ["--config", "config.yaml", "--ckpt_path", LAST, f"--{key}", value]
        # Seen before the data is read.
        found = error_of(capsys, 1, command, *words, "--data.train", "no.jsonl", "--data.validation", "no.jsonl")
        changed = key.removesuffix(".hidden_size")
        assert found == (
            f"the checkpoint's {name} is {there}, the configuration's is {here_}. Change {changed} or --ckpt_path."
        )
    assert contents(run) == before


def test_generate_with_another_base(run: Path, here: Path, capsys) -> None:
    save_base(here / "wider", "llama", word_tokenizer(), torch.float32, max_position_embeddings=CONTEXT, hidden_size=40)
    assert error_of(capsys, 1, "generate", LAST, "--prompt", "one", "--base_model", "wider") == (
        "the checkpoint belongs to a base with hidden_size 32, and 'wider' has 40."
        " Give the base it was trained on with --base_model."
    )


@pytest.mark.parametrize(("words", "variable"), [(["--debug"], "0"), ([], "1")])
def test_debug_shows_the_traceback(capsys, monkeypatch: pytest.MonkeyPatch, words: list[str], variable: str) -> None:
    monkeypatch.setenv("MTP_DEBUG", variable)
    assert mtp("fitt", *words) == 2
    err = capsys.readouterr().err
    assert err.startswith("Traceback (most recent call last):")
    assert err.splitlines()[-1].startswith("mtp_lightning.errors.UsageError: unknown command 'fitt'")


def test_errors_that_nobody_foresaw(capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(words: list[str]) -> None:
        try:
            raise {"own": RunError("mend it"), "usage": UsageError("say it"), "bug": KeyError("a")}[words[0]]
        except Exception as error:
            raise ValueError("first line\n  second line") from (error if words[0] != "bug" else None)

    monkeypatch.setattr(cli, "_run", fails)
    assert error_of(capsys, 1, "bug") == "ValueError: first line second line (--debug shows where)"
    assert error_of(capsys, 1, "own") == "mend it"  # another library wrapped it
    assert error_of(capsys, 2, "usage") == "say it"


def test_a_share_without_reference_is_no_number(here: Path) -> None:
    write_rows(here / "short.jsonl", [{"input_ids": [9, 10]}])  # a block needs an anchor after its start
    assert fit("--data.validation", "short.jsonl", "--trainer.max_steps", 2) == 0
    assert math.isnan(float(validations(here / "run")[0]["val/share_of_reference"]))


@pytest.mark.parametrize(
    "words",
    ["generate m --prompt a --num_mask 3", "chat m --num_mask 3", "benchmark m --prompts p --num_mask 3",
     "export --ckpt_pat c --output o", "distill --base_mode b --prompts p --output o", "fit --confi c.yaml"],
)  # fmt: skip
def test_options_are_not_abbreviated(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    short = next(word for word in words.split()[1:] if word in ("--num_mask", "--ckpt_pat", "--base_mode", "--confi"))
    assert error_of(capsys, 2, *words.split()).startswith(f"unknown key or option '{short}'")


def test_benchmark_does_not_vary_autoregressive_decoding(capsys: pytest.CaptureFixture[str]) -> None:
    found = error_of(capsys, 2, "benchmark", "m", "--prompts", "p", "--decoding", "autoregressive")
    assert found.startswith("autoregressive decoding is what all others are compared with")
