# SPDX-License-Identifier: Apache-2.0
"""What the README shows works: its command lines, its Python, the files it names."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from command_line import mtp
from tiny import tiny_batch, tiny_model
from toy_tokenizers import word_tokenizer

from mtp_lightning.commands import cli
from mtp_lightning.commands import generate as generate_command
from mtp_lightning.commands import predict as predict_command
from mtp_lightning.commands.data import DataCLI
from mtp_lightning.commands.lightning_cli import MTPCLI
from mtp_lightning.losses import LossTerm
from mtp_lightning.model import MTPModel
from mtp_lightning.sampler_heads import MLPSamplerHead
from mtp_lightning.types import IGNORE_INDEX

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
PYTHON = [code for language, code in BLOCKS if language == "python"]
YOURS = {"configs/mine.yaml"}
"""Files that stand for the reader's own."""


def command_lines() -> list[list[str]]:
    """The words of every ``mtp`` command in the code blocks, without comments."""
    shell = "\n".join(code for language, code in BLOCKS if language in ("bash", "sh", "console", "shell"))
    lines = [line.removeprefix("$ ") for line in shell.replace("\\\n", " ").splitlines()]
    return [words[1:] for line in lines if (words := shlex.split(line, comments=True)) and words[0] == "mtp"]


def focal_source() -> str:
    (source,) = [code for code in PYTHON if "class Focal" in code]
    return source


def test_there_is_something_to_test() -> None:
    assert len(command_lines()) >= 5 and len(PYTHON) >= 2
    assert {words[0] for words in command_lines()} >= {"fit", "validate", "predict", "generate"}


@pytest.mark.parametrize("words", command_lines(), ids=" ".join)
def test_a_command_line_is_understood(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """Read as the program reads it, up to where something would be loaded."""
    assert words[0] in cli.COMMANDS
    (tmp_path / "my_losses.py").write_text(focal_source())
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(ROOT)
    reached: list[Any] = []
    for name in ("instantiate_classes", "after_instantiate_classes"):
        monkeypatch.setattr(MTPCLI, name, lambda self: None)
    monkeypatch.setattr(MTPCLI, "_run_subcommand", lambda self, subcommand: reached.append(subcommand))
    monkeypatch.setattr(predict_command.PredictCLI, "load_model", lambda *args: torch.nn.Identity())
    monkeypatch.setattr("mtp_lightning.commands.export.export_checkpoint", lambda *args: reached.append("export"))
    monkeypatch.setattr("mtp_lightning.commands.benchmark.measure", lambda *args: reached.append("benchmark"))
    monkeypatch.setattr("mtp_lightning.commands.chat.open_conversation", lambda *args: None)
    monkeypatch.setattr("mtp_lightning.commands.chat.run_conversation", lambda *args: reached.append("chat"))
    monkeypatch.setattr("mtp_lightning.commands.distill.chosen_shard", lambda *args: reached.append("distill") or sys.exit())
    monkeypatch.setattr(DataCLI, "instantiate_classes", lambda self: reached.append("data") or sys.exit())
    for module in (generate_command, predict_command):
        monkeypatch.setattr(module, "read_prompts", lambda *args, **options: [])
        monkeypatch.setattr(module, "print_generations", lambda *args, **options: reached.append("text"))
    monkeypatch.setattr(torch.nn.Identity, "tokenizer", word_tokenizer(), raising=False)
    monkeypatch.setattr(torch.nn.Identity, "context", 4096, raising=False)
    monkeypatch.setattr(MTPModel, "from_pretrained", lambda *args, **options: torch.nn.Identity())
    assert mtp(*words) == 0, capsys.readouterr().err
    assert reached == ["text" if words[0] in ("predict", "generate") else words[0]]


def test_the_files_it_names_exist() -> None:
    named = set(re.findall(r"\b(?:configs|callbacks|scripts|src|benchmarks|docs|tests)/[\w./-]*[\w/]", README))
    named |= {target for target in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in target}
    assert len(named) > 8
    missing = {name for name in named - YOURS if not (ROOT / name).exists()}
    # In a package-less form: `types.py`, `losses/base.py`.
    package = ROOT / "src" / "mtp_lightning"
    modules = set(re.findall(r"`([\w/]+\.py)`", README)) | set(re.findall(r"^  ([\w/]+(?:\.py|/))\s", README, re.MULTILINE))
    assert len(modules) > 8
    missing |= {name for name in modules - {"my_losses.py"} if not (package / name).exists() and not (ROOT / name).exists()}
    assert missing == set()


@pytest.mark.parametrize("code", PYTHON, ids=lambda code: code.strip().splitlines()[-1])
def test_python_compiles(code: str) -> None:
    compile(code, "README.md", "exec")


def test_the_loss_of_ones_own() -> None:
    names: dict[str, Any] = {}
    exec(focal_source(), names)
    term = names["Focal"](weight=2.0)
    assert isinstance(term, LossTerm) and term.weight == 2.0
    model, batch = tiny_model(sampler_head=MLPSamplerHead()), tiny_batch()
    output = model(batch, {"focal": term})
    counted = batch.mtp_labels != IGNORE_INDEX
    cross = F.cross_entropy(model.unembed(output.states.sampler[counted]), batch.mtp_labels[counted], reduction="none")
    weights = batch.block_weights[:, :, None].expand_as(counted)[counted]
    (total,) = [sums.total for sums in output.sums["focal"]]
    torch.testing.assert_close(total, ((1 - (-cross).exp()) ** 2 * cross * weights).sum())
    total.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.sampler_head.parameters())


def test_the_python_example(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    (code,) = [code for code in PYTHON if "from_pretrained" in code]
    model = tiny_model("llama", vocab_size=17)
    model.tokenizer = word_tokenizer()
    asked: list[str] = []
    monkeypatch.setattr(MTPModel, "from_pretrained", lambda name, **options: asked.append(name) or model)
    exec(code, {})
    assert asked and capsys.readouterr().out.split()
