# SPDX-License-Identifier: Apache-2.0
"""The complete configurations and the fragments for them: they fit together, and each runs on a tiny base or the demo's."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from command_line import ParseOnly, mtp, read_metrics, save_base, write_rows
from toy_tokenizers import CHATML, byte_tokenizer

from mtp_lightning.commands.cli import main
from mtp_lightning.modeling.base import load_tokenizer
from mtp_lightning.text.prompts import read_prompts

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))  # strategies/ holds fragments for them: test_strategies.py
FRAGMENTS = sorted((ROOT / "callbacks").rglob("*.yaml"))
DEMO = Path(str(files("mtp_lightning").joinpath("demo")))
HUB = {"qwen.yaml": "qwen3", "tulu3_8b.yaml": "llama"}
"""Configurations whose base and data are on the hub, and the architecture to stand in for the base."""

SHORT: tuple[object, ...] = (
    *("--trainer.callbacks.num_prompts", 3, "--trainer.callbacks.max_new_tokens", 8),
    *("--trainer.max_steps", 2, "--trainer.val_check_interval", 2, "--trainer.enable_progress_bar", "false"),
)


def test_there_are_configurations_and_fragments() -> None:
    assert {"demo.yaml", *HUB} <= {path.name for path in CONFIGS}
    assert len(FRAGMENTS) >= 3


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_fragment_adds_its_callback_to_every_configuration(path: Path) -> None:
    own = ParseOnly("--config", path).settings.trainer.callbacks
    assert own
    for fragment in FRAGMENTS:
        added = [entry["class_path"] for entry in yaml.safe_load(fragment.read_text())["trainer"]["callbacks+"]]
        together = ParseOnly("--config", path, "--config", fragment).settings.trainer.callbacks
        assert [entry.class_path for entry in together] == [entry.class_path for entry in own] + added


@pytest.mark.parametrize("path", CONFIGS + FRAGMENTS, ids=lambda path: path.name)
def test_callbacks_are_always_added(path: Path) -> None:
    content = yaml.safe_load(path.read_text())
    assert "callbacks+" in content["trainer"] and "callbacks" not in content["trainer"]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_a_configuration_says_for_which_machine_it_is_and_how_to_launch_it(path: Path) -> None:
    comment = [line for line in path.read_text().splitlines() if line.startswith("# ")]
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


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Chats, and for each architecture of ``HUB`` a tiny bfloat16 base with a chat template."""
    folder = tmp_path_factory.mktemp("stand_in")
    tokenizer = byte_tokenizer(["<eos>", "<|im_start|>", "<|im_end|>"], "<|im_end|>")
    tokenizer.chat_template = CHATML
    for architecture in set(HUB.values()):
        save_base(folder / architecture, architecture, tokenizer, torch.bfloat16, max_position_embeddings=2048)
    chat = [{"role": "user", "content": "abcab"}, {"role": "assistant", "content": "abcabcabcabc"}]
    write_rows(folder / "chats.jsonl", [{"messages": chat[:1] + [{**chat[1], "content": "ab" * n}]} for n in range(3, 23)])
    return folder


@pytest.fixture
def current(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty current folder, whose checkpoints are deleted afterwards: 100 MB each with the recipes' heads."""
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for path in tmp_path.rglob("*.ckpt"):
        path.unlink()


def run_folder(config: str) -> Path:
    content = yaml.safe_load((ROOT / "configs" / config).read_text())
    return Path(content["trainer"]["logger"][0]["init_args"]["save_dir"])


def assert_complete(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run's files are there, and it ended with the acceptance table."""
    out = capsys.readouterr().out
    assert "Acceptance by real decoding" in out
    assert {"config.yaml", "metrics.csv", "acceptance.json", "acceptance.png"} <= {path.name for path in run.iterdir()}
    assert (run / "checkpoints" / "best.ckpt").is_file() and (run / "checkpoints" / "last.ckpt").is_file()
    assert list(run.glob("events.out.tfevents.*"))
    line = read_metrics(run)[-1]
    assert 1 <= float(line["val/acceptance_length"]) and math.isfinite(float(line["val/loss"]))
    assert len([name for name in line if name.startswith("val/acceptance_length/")]) == 3  # one prompt a domain
    assert json.loads((run / "acceptance.json").read_text())["latest"]["overall"]["num_prompts"] == 3


@pytest.mark.parametrize("config", HUB)
def test_a_recipe_on_a_tiny_base(stand_in: Path, current: Path, config: str, capsys) -> None:
    base, run = stand_in / HUB[config], run_folder(config)
    words = ["--config", ROOT / "configs" / config, *SHORT, "--model.base_model", base]
    words += ["--data.train", stand_in / "chats.jsonl", "--data.num_workers", 0]
    words += ["--trainer.accelerator", "cpu", "--trainer.devices", 1, "--trainer.strategy", "auto"]
    assert mtp("fit", *words, "--trainer.accumulate_grad_batches", 1) == 0
    assert_complete(run, capsys)
    last = run / "checkpoints" / "last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == 2
    trained = read_metrics(run)[-1]
    assert mtp("validate", *words, "--ckpt_path", last) == 0
    assert "Acceptance by real decoding" in capsys.readouterr().out
    validated = read_metrics(run)[-1]
    figures = {name for name in trained if name.startswith("val/") and "speed_up" not in name}
    assert {name: validated[name] for name in figures} == {name: trained[name] for name in figures}
    assert mtp("generate", last, "--prompt", "ab", "--max_new_tokens", 6, "--json") == 0
    line = json.loads(capsys.readouterr().out)
    assert len(line["token_ids"]) == 6 or line["finish_reason"] == "stop"


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


def test_a_short_demo(current: Path, capsys) -> None:
    words: list[Any] = ["--config", ROOT / "configs" / "demo.yaml", *SHORT, "--trainer.limit_val_batches", 1]
    words += ["--trainer.callbacks.num_speed_pairs", 1]
    assert mtp("fit", *words) == 0
    run = run_folder("demo.yaml")
    assert_complete(run, capsys)
    assert float(read_metrics(run)[-1]["val/forced_reference"]) > 2  # it is text that the base finds likely
    saved, given = ParseOnly("--config", run / "config.yaml").settings, ParseOnly(*words).settings
    for key in ("model", "data", "trainer"):
        assert saved[key].as_dict() == given[key].as_dict()
    last = run / "checkpoints" / "last.ckpt"
    assert mtp("validate", *words, "--ckpt_path", last) == 0
    assert "Acceptance by real decoding" in capsys.readouterr().out
    # The configuration that a run saved does for predict too.
    assert mtp("predict", "--config", run / "config.yaml", "--ckpt_path", last, "--max_new_tokens", 2) == 0
    assert len(capsys.readouterr().out.splitlines()) == len((DEMO / "prompts.jsonl").read_text().splitlines())


def test_mtp_test_runs_on_the_demo_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo's test prompts carry what the base itself goes on with, so that they are rows with loss too."""
    monkeypatch.chdir(tmp_path)
    config = str(Path(__file__).parents[1] / "configs" / "demo.yaml")
    words = ["--config", config, "--trainer.callbacks.num_prompts=3", "--trainer.callbacks.max_new_tokens=4"]
    main(["fit", *words, "--trainer.max_steps=1", "--trainer.val_check_interval=1", "--data.eval_max_rows=4"])
    main(["test", *words, "--ckpt_path=runs/demo/checkpoints/best.ckpt"])
