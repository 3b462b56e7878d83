# SPDX-License-Identifier: Apache-2.0
"""The configurations and the callback fragments: they combine, and each configuration runs on a tiny base or the demo's."""

from __future__ import annotations

import math
from collections import Counter
from importlib import import_module
from importlib.resources import files
from pathlib import Path

import pytest
import torch
import yaml
from command_line import ParseOnly, mtp, read_metrics, save_base, write_rows
from lightning import Callback
from toy_tokenizers import CHATML, byte_tokenizer

from mtp_lightning.modeling.base import load_tokenizer
from mtp_lightning.text.prompts import read_prompts

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))  # strategies/ holds fragments for them: test_strategies.py
FRAGMENTS = sorted((ROOT / "callbacks").rglob("*.yaml"))
DEMO = Path(str(files("mtp_lightning").joinpath("demo")))
HUB = {"qwen.yaml": "qwen3", "tulu3_8b.yaml": "llama", "smollm2.yaml": "llama"}
"""Configurations whose base and data are not in the package, and the architecture to stand in for the base."""

SHORT: tuple[object, ...] = (
    *("--trainer.callbacks.num_prompts", 3, "--trainer.callbacks.max_new_tokens", 4),
    *("--trainer.max_steps", 1, "--trainer.val_check_interval", 1, "--trainer.enable_progress_bar", "false"),
)


def test_every_fragment_adds_its_callback() -> None:
    """Each file in callbacks/ adds one that can be made, drops none, and is in the table."""
    words, expected = ["--config", ROOT / "configs" / "demo.yaml"], []
    table = (ROOT / "callbacks" / "README.md").read_text()
    for fragment in FRAGMENTS:
        words += ["--config", fragment]
        content = yaml.safe_load(fragment.read_text())
        assert list(content) == ["trainer"] and list(content["trainer"]) == ["callbacks+"]
        (entry,) = content["trainer"]["callbacks+"]
        expected.append(entry["class_path"])
        package, _, name = entry["class_path"].rpartition(".")
        assert isinstance(getattr(import_module(package), name)(**entry["init_args"]), Callback)
        assert f"| `{fragment.name}` |" in table and f"`{entry['class_path']}`" in table
        assert "# Cost: " in fragment.read_text()
    found = [entry.class_path for entry in ParseOnly(*words).settings.trainer.callbacks]
    assert len(FRAGMENTS) >= 3 and len(found) > len(expected) and found[-len(expected) :] == expected


def test_a_configuration_adds_callbacks_and_names_its_machine_and_launch_command() -> None:
    assert {"demo.yaml", *HUB} <= {path.name for path in CONFIGS}
    for path in CONFIGS:
        text = path.read_text()
        trainer = yaml.safe_load(text)["trainer"]
        assert "callbacks+" in trainer and "callbacks" not in trainer
        comment = [line for line in text.splitlines() if line.startswith("# ")]
        launch = f"Launch: mtp fit --config {path.relative_to(ROOT)}"
        assert any("Machine: " in line for line in comment) and any(launch in line for line in comment)


def test_the_papers_run_to_the_letter() -> None:
    """Numbers of the paper's section 3."""
    config = ParseOnly("--config", ROOT / "configs" / "tulu3_8b.yaml").settings
    model, trainer = config.model, config.trainer
    assert (model.num_masks, model.lora.rank, model.lora.gated) == (8, 128, True)
    assert model.sampler_head.class_path.endswith("MLPSamplerHead")
    assert (trainer.devices, trainer.max_steps, trainer.accumulate_grad_batches, config.data.batch_size) == (8, 50000, 1, 1)
    assert (model.optimizer.init_args.lr, model.lr_scheduler.init_args.warmup_steps) == (2e-4, 5000)
    assert model.lr_scheduler.class_path.endswith("WarmupConstant")
    terms = {name: (term.class_path.rpartition(".")[2], term.init_args.weight) for name, term in model.losses.items()}
    assert sorted(terms.values()) == [("BaseCrossEntropy", 1.0), ("LatentConsistency", 1.0), ("SamplerCrossEntropy", 1.0)]
    for term in model.losses.values():
        if "CrossEntropy" in term.class_path:
            assert (term.init_args.positions, term.init_args.joint_mean) == ("all", True)
    assert (config.data.block_fraction, config.data.max_blocks_per_row, config.data.packing) == (1.0, None, False)


def assert_complete(config: str, capsys: pytest.CaptureFixture[str]) -> Path:
    """A run's files exist, and it printed the acceptance table; returns the run's folder."""
    content = yaml.safe_load((ROOT / "configs" / config).read_text())
    run = Path(content["trainer"]["default_root_dir"])
    assert "Acceptance by real decoding" in capsys.readouterr().out
    assert {"config.yaml", "metrics.csv", "acceptance.json", "acceptance.png"} <= {path.name for path in run.iterdir()}
    assert (run / "checkpoints" / "best.ckpt").is_file() and list(run.glob("events.out.tfevents.*"))
    assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 1
    line = read_metrics(run)[-1]
    assert 1 <= float(line["val/acceptance_length"]) and math.isfinite(float(line["val/loss"]))
    assert len([name for name in line if name.startswith("val/acceptance_length/")]) == 3  # one prompt a domain
    return run


@pytest.mark.parametrize("config", HUB)
def test_a_recipe_on_a_tiny_base(tmp_path: Path, config: str, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tokenizer = byte_tokenizer(["<eos>", "<|im_start|>", "<|im_end|>"], "<|im_end|>")
    tokenizer.chat_template = CHATML
    save_base(tmp_path / "base", HUB[config], tokenizer, torch.bfloat16, max_position_embeddings=2048)
    question = {"role": "user", "content": "abcab"}
    write_rows(
        tmp_path / "chats.jsonl",
        [{"messages": [question, {"role": "assistant", "content": "ab" * n}]} for n in range(3, 23)],
    )
    words = ["--config", ROOT / "configs" / config, *SHORT, "--model.base_model", "base"]
    words += ["--data.train", "chats.jsonl", "--data.num_workers", 0]
    words += ["--trainer.accelerator", "cpu", "--trainer.devices", 1, "--trainer.strategy", "auto"]
    assert mtp("fit", *words, "--trainer.accumulate_grad_batches", 1) == 0
    run = assert_complete(config, capsys)
    for path in run.rglob("*.ckpt"):
        path.unlink()  # 100 MB each with the recipes' heads


# the demo


def test_what_the_package_carries() -> None:
    sizes = {path.name: path.stat().st_size for path in DEMO.rglob("*") if path.is_file()}
    needed = {"config.json", "model.safetensors", "tokenizer.json", "README.md", "train.parquet", "validation.parquet"}
    assert needed | {"prompts.jsonl", "chat_prompts.jsonl"} <= set(sizes)
    assert sum(sizes.values()) <= 12_000_000


@pytest.mark.parametrize("name", ["prompts.jsonl", "chat_prompts.jsonl"])
def test_the_demos_prompts(name: str) -> None:
    tokenizer = load_tokenizer("package://demo/base")
    if name == "chat_prompts.jsonl":
        tokenizer.chat_template = CHATML  # they are for chat models
    prompts = read_prompts(f"package://demo/{name}", tokenizer)
    domains = Counter(prompt.domain for prompt in prompts)
    assert len(domains) >= 3 and "" not in domains and min(domains.values()) >= 8
    assert len({prompt.text for prompt in prompts}) == len(prompts) >= 24


def test_a_short_demo(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words: list[object] = ["--config", ROOT / "configs" / "demo.yaml", *SHORT, "--data.eval_max_rows", 4]
    assert mtp("fit", *words) == 0
    run = assert_complete("demo.yaml", capsys)
    assert float(read_metrics(run)[-1]["val/forced_reference"]) > 2  # it is text that the base finds likely
    best, saved = run / "checkpoints" / "best.ckpt", run / "config.yaml"
    # The configuration that a run saved serves the other commands too.
    assert mtp("test", "--config", saved, "--ckpt_path", best) == 0
    assert "Acceptance by real decoding" in capsys.readouterr().out
