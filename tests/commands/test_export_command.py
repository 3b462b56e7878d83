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
    as_if_trained_here()
    assert mtp("export", "--ckpt_path", LAST, "--output", "saved") == 0
    out, err = capsys.readouterr()
    assert out == "saved to saved\n" and "--base_name" in err
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


def test_an_exported_model_is_replaced_only_if_asked(run: Path, here: Path, capsys) -> None:
    assert mtp("export", "--ckpt_path", "run", "--output", "saved") == 0
    before = files_of(Path("saved"))
    assert "--overwrite" in error_of(capsys, 2, "export", "--ckpt_path", LAST, "--output", "saved")
    assert files_of(Path("saved")) == before
    assert mtp("export", "--ckpt_path", LAST, "--output", "saved", "--overwrite", "--dtype", "bfloat16") == 0
    assert files_of(Path("saved")) != before
    assert "--ckpt_path saved" in error_of(capsys, 2, "export", "--ckpt_path", "saved", "--output", "again")


def test_the_card_has_the_runs_acceptance(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(whole, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    latest = json.loads(Path("run/acceptance.json").read_text())["latest"]
    checkpoint = torch.load(LAST, weights_only=True)
    # Weights of the step that was measured, and of another step.
    torch.save({**checkpoint, "global_step": latest["step"]}, LAST)
    assert mtp("export", "--ckpt_path", LAST, "--output", "saved") == 0
    card = Path("saved/README.md").read_text()
    assert "Measured on 2 prompts of `prompts.jsonl`, at most 6 tokens each, greedy." in card
    assert "quadratic decoding, 2 masks in every step, sampler head" in card and "(`--num_masks auto`" in card
    assert f"Trained for {latest['step']} optimizer steps on `train.jsonl`." in card
    assert str(tmp_path) not in card
    for name, figures in (*latest["domains"].items(), ("overall", latest["overall"])):
        assert f"\n| {name} | {figures['num_prompts']} | {figures['acceptance_length']:.2f} |" in card
    torch.save({**checkpoint, "global_step": 2}, LAST)
    assert mtp("export", "--ckpt_path", LAST, "--output", "earlier") == 0
    sentence = f"plain decoding. That was after {latest['step']} training steps; these weights are those of step 2."
    assert sentence in Path("earlier/README.md").read_text()
    shutil.copy("run/acceptance.json", "figures.json")
    torch.save({**checkpoint, "global_step": latest["step"]}, "elsewhere.ckpt")
    assert mtp("export", "--ckpt_path", "elsewhere.ckpt", "--output", "given", "--acceptance", "figures.json") == 0
    assert Path("given/README.md").read_text().split("## Lineage")[0] == card.split("## Lineage")[0]


def test_smaller_weights_and_a_base_that_moved(run: Path, here: Path, capsys) -> None:
    as_if_trained_here()
    Path("base").rename("moved")
    words = ["export", "--ckpt_path", LAST, "--output", "saved"]
    assert f"no folder {here / 'base'} here" in error_of(capsys, 1, *words)
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
        ("--ckpt_path {last} --output saved --benchmark broken.json", 1, "broken.json"),
        ("--ckpt_path {last} --output saved --base_name /a/b/c", 2, "base_name"),
        ("--ckpt_path {last} --output saved --format sglang", 2, "mask_tokens"),
    ],
)
def test_wrong_command_lines(run: Path, here: Path, capsys, words: str, code: int, name: str) -> None:
    save_base(here / "wider", "llama", word_tokenizer(), torch.float32, max_position_embeddings=96, hidden_size=40)
    write_rows(here / "broken.json", [{"latest": {}}])
    before = files_of(here)
    assert name in error_of(capsys, code, "export", *words.format(last=LAST).split())
    assert files_of(here) == before


def test_a_public_name_a_benchmark_and_an_upload(run: Path, here: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    as_if_trained_here()
    (here / "base" / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A base\n")
    words = ["--prompts", "prompts.jsonl", "--max_new_tokens", 6, "--dtype", "float64"]
    assert mtp("benchmark", LAST, *words) == 0
    report = json.loads(Path("benchmark/benchmark.json").read_text())
    uploads: list[tuple[object, ...]] = []
    monkeypatch.setattr("mtp_lightning.saving.export.upload", lambda *arguments: uploads.append(arguments))
    options = ["--benchmark", "benchmark/benchmark.json", "--push", "me/mtp", "--private"]
    capsys.readouterr()
    export = ["export", "--ckpt_path", LAST, "--output", "saved", *options]
    assert "--base_name" in error_of(capsys, 2, *export)  # a path would be published
    assert not Path("saved").exists() and not uploads
    assert mtp(*export, "--base_name", "owner/base") == 0
    assert uploads == [(Path("saved"), "me/mtp", True)]
    files = files_of(Path("saved"))
    assert not [name for name, content in files.items() if str(here).encode() in content]
    card, config = files["README.md"].decode(), json.loads(files["mtp_config.json"])
    assert "\nbase_model: owner/base\n" in card and "\nlicense: apache-2.0\n" in card
    assert config["lineage"]["license"] == "apache-2.0" and config["base_model"] == "owner/base"
    *_, protocol, default = report["settings"]
    ratio, length = default["overall"]["speed_up"]["median"], protocol["overall"]["acceptance_length"]
    assert f"| overall | 2 | {length:.2f} |" in card and f"| {ratio:.2f}x |" in card
    assert MTPModel.from_pretrained("saved", base_model="base").lineage == config["lineage"]


def test_the_speed_of_earlier_versions_is_left_out(run: Path, here: Path) -> None:
    group = {"num_prompts": 1, "acceptance_length": 1.5, "repeated_8grams": 0.0, "speed_up": {"median": 0.33}}
    group |= {"non_repeating": {"num_prompts": 1, "acceptance_length": 1.5}, "lossless": {"equal": 1, "checked": 1}}
    options = {"decoding": "quadratic", "num_masks": 3, "sampler_head": True, "max_new_tokens": 6}
    latest = {"options": options, "prompts": "/home/ada/p.jsonl", "overall": group, "domains": {}}
    for speed, shown in ((None, "| - |"), ("auto", "| 0.33x |")):
        Path("figures.json").write_text(json.dumps({"latest": latest | {"speed_num_masks": speed}}))
        assert mtp("export", "--ckpt_path", LAST, "--output", "saved", "--overwrite", "--acceptance", "figures.json") == 0
        card = Path("saved/README.md").read_text()
        assert card.count(shown) == 1 and "`p.jsonl`" in card and "/home" not in card
