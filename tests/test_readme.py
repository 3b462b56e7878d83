# SPDX-License-Identifier: Apache-2.0
"""What the README and the docs show works: command lines, the notebook, the README's Python and the files it names."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from command_line import mtp
from tiny import tiny_batch, tiny_model
from toy_tokenizers import word_tokenizer

from mtp_lightning.losses import LossTerm
from mtp_lightning.model import MTPModel
from mtp_lightning.sampler_heads import MLPSamplerHead
from mtp_lightning.types import IGNORE_INDEX

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = "\n".join(page.read_text() for page in sorted((ROOT / "docs").rglob("*.md")))


def blocks(text: str) -> list[tuple[str, str]]:
    """The code blocks: language and code."""
    return re.findall(r"^```(\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


PYTHON = [code for language, code in blocks(README) if language == "python"]
PLACEHOLDERS = {"configs/mine.yaml"}
"""Files that the reader writes."""


def command_lines() -> list[list[str]]:
    """The words of every ``mtp`` command in the code blocks, without comments."""
    shell = "\n".join(code for language, code in blocks(README + PAGES) if language in ("bash", "sh", "console", "shell"))
    lines = [line.removeprefix("$ ") for line in shell.replace("\\\n", " ").splitlines()]
    commands = [tuple(words[1:]) for line in lines if (words := shlex.split(line, comments=True)) and words[0] == "mtp"]
    return [list(words) for words in dict.fromkeys(commands)]


def focal_source() -> str:
    (source,) = [code for code in PYTHON if "class Focal" in code]
    return source


def test_the_readme_has_commands_and_python() -> None:
    assert {words[0] for words in command_lines()} >= {"fit", "validate", "predict", "generate"} and len(PYTHON) >= 2


@pytest.mark.parametrize("words", command_lines(), ids=" ".join)
def test_a_command_line_is_understood(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """It is parsed as the program parses it, up to where something would be loaded."""

    class Reached(Exception):
        """The command line is understood."""

    def stop(*args: Any, **kwargs: Any) -> None:
        raise Reached

    (tmp_path / "my_losses.py").write_text(focal_source())
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("mtp_lightning.commands.lightning_cli.MTPCLI.instantiate_classes", stop)
    monkeypatch.setattr("mtp_lightning.commands.lightning_cli.SettingsCLI.instantiate_classes", stop)
    monkeypatch.setattr("mtp_lightning.commands.base._is_complete", stop)
    monkeypatch.setattr("mtp_lightning.commands.init.facts_of", stop)
    monkeypatch.setattr("mtp_lightning.commands.export.export_checkpoint", stop)
    monkeypatch.setattr("mtp_lightning.commands.compare.read_runs", stop)
    monkeypatch.setattr("mtp_lightning.commands.distill.chosen_shard", stop)
    monkeypatch.setattr("mtp_lightning.commands.options.check_source", lambda source: None)  # the reader's file of prompts
    monkeypatch.setattr("mtp_lightning.commands.serve._vllm_version", lambda: "0.32.0")
    monkeypatch.setattr("mtp_lightning.saving.saved_folder.find_folder", stop)
    monkeypatch.setattr("mtp_lightning.model.MTPModel.from_pretrained", stop)
    monkeypatch.setenv("MTP_DEBUG", "1")
    assert mtp(*("configs/qwen.yaml" if word == "mtp.yaml" else word for word in words)) == 1
    assert capsys.readouterr().err.splitlines()[-1].endswith("Reached")


def test_the_files_it_names_exist() -> None:
    named = set(re.findall(r"\b(?:configs|callbacks|scripts|src|benchmarks|docs|tests)/[\w./-]*[\w/]", README))
    named |= {target for target in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in target}
    assert len(named) > 8
    missing = {name for name in named - PLACEHOLDERS if not (ROOT / name).exists()}
    assert missing == set()


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


@pytest.mark.slow  # trains for a minute
def test_the_notebook() -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    notebook = nbformat.read(ROOT / "docs" / "notebook.ipynb", as_version=4)
    nbclient.NotebookClient(notebook, timeout=1200).execute()  # raises where a cell does
    shown = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", ()))
    assert shown.count("same tokens: True") == 2
