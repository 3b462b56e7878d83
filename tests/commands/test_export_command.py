# SPDX-License-Identifier: Apache-2.0
"""``mtp export``: from a run of ``mtp fit`` to a saved folder that every command opens."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from command_line import error_of, mtp, save_base, write_rows
from safetensors.torch import load_file
from saved import files_of
from tiny_run import LAST
from toy_tokenizers import word_tokenizer
from trained_run import as_if_trained_here, json_lines, without_times

from mtp_lightning import MTPModel


def test_a_checkpoint_becomes_a_folder(run: Path, here: Path, capsys) -> None:
    assert mtp("export", "--ckpt_path", LAST, "--output", "saved") == 0
    assert capsys.readouterr().out == "saved to saved\n"
    config = json.loads(Path("saved/mtp_config.json").read_text())
    assert (config["base_model"], config["revision"], config["acceptance"]) == (str(here / "base"), None, None)
    assert "Not measured. `mtp benchmark FOLDER --prompts FILE` does." in Path("saved/README.md").read_text()
    state = torch.load(LAST, weights_only=True)["state_dict"]
    tensors = load_file("saved/mtp_heads.safetensors") | load_file("saved/adapter_model.safetensors")
    assert len(tensors) == len(state) and all(tensor.dtype == torch.float32 for tensor in tensors.values())
    words = ["--prompts", "prompts.jsonl", "--json", "--max_new_tokens", 24, "--dtype", "float64", "--num_masks", 3]
    for name in (LAST, "saved"):
        assert mtp("generate", name, *words) == 0
    lines = without_times(json_lines(capsys))
    assert len(lines) == 4 and lines[:2] == lines[2:]
    # Opened and saved again, with nothing lost.
    MTPModel.from_pretrained("saved").save_pretrained("again")
    assert files_of(Path("again")) == files_of(Path("saved"))


def test_the_card_has_the_runs_acceptance(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(whole, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    latest = json.loads(Path("run/acceptance.json").read_text())["latest"]
    checkpoint = torch.load(LAST, weights_only=True)
    # Weights of the step that was measured, and of another step.
    torch.save({**checkpoint, "global_step": latest["step"]}, LAST)
    assert mtp("export", "--ckpt_path", LAST, "--output", "saved") == 0
    card = Path("saved/README.md").read_text()
    measured = (
        "Measured on 2 prompts of `prompts.jsonl`, at most 6 tokens each: quadratic decoding, 2 masks, sampler head, greedy."
    )
    assert measured in card
    for name, figures in (*latest["domains"].items(), ("overall", latest["overall"])):
        assert f"\n| {name} | {figures['num_prompts']} | {figures['acceptance_length']:.2f} |" in card
    torch.save({**checkpoint, "global_step": 2}, LAST)
    assert mtp("export", "--ckpt_path", LAST, "--output", "earlier") == 0
    sentence = f"greedy. That was after {latest['step']} training steps; these weights are those of step 2."
    assert sentence in Path("earlier/README.md").read_text()
    shutil.copy("run/acceptance.json", "figures.json")
    torch.save({**checkpoint, "global_step": latest["step"]}, "elsewhere.ckpt")
    assert mtp("export", "--ckpt_path", "elsewhere.ckpt", "--output", "given", "--acceptance", "figures.json") == 0
    assert Path("given/README.md").read_text() == card


def test_smaller_weights_and_a_base_that_moved(run: Path, here: Path, capsys) -> None:
    as_if_trained_here()
    Path("base").rename("moved")
    words = ["export", "--ckpt_path", LAST, "--output", "saved"]
    assert f"base model '{here / 'base'}' could not be loaded" in error_of(capsys, 1, *words)
    assert not Path("saved").exists()
    assert mtp(*words, "--base_model", "moved", "--dtype", "bfloat16") == 0
    tensors = load_file("saved/mtp_heads.safetensors") | load_file("saved/adapter_model.safetensors")
    assert all(tensor.dtype == torch.bfloat16 for tensor in tensors.values())
    assert MTPModel.from_pretrained("saved").base_model == str(here / "moved")


@pytest.mark.parametrize(
    ("words", "code", "name"),
    [
        ("--ckpt_path no.ckpt --output saved", 1, "'no.ckpt' does not exist"),
        ("--ckpt_path {last} --output saved --dtype auto", 2, "dtype"),
        ("--ckpt_path {last} --output base", 1, "base exists and was not written by mtp export"),
        ("--ckpt_path {last} --output saved --base_model wider", 1, "hidden_size"),
        ("--ckpt_path {last} --output saved --acceptance broken.json", 1, "broken.json"),
    ],
)
def test_wrong_command_lines(run: Path, here: Path, capsys, words: str, code: int, name: str) -> None:
    save_base(here / "wider", "llama", word_tokenizer(), torch.float32, max_position_embeddings=96, hidden_size=40)
    write_rows(here / "broken.json", [{"latest": {}}])
    before = files_of(here)
    assert name in error_of(capsys, code, "export", *words.format(last=LAST).split())
    assert files_of(here) == before
