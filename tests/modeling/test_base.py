# SPDX-License-Identifier: Apache-2.0
"""Bases in GGUF files, and with a PEFT adapter."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import save_base
from huggingface_hub.errors import LocalEntryNotFoundError
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from saved import hub_snapshot
from toy_tokenizers import word_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from mtp_lightning.commands.distill import base_of
from mtp_lightning.errors import RunError, UsageError
from mtp_lightning.modeling import base as base_module
from mtp_lightning.modeling import base_adapter, base_source
from mtp_lightning.modeling.base import load_base, load_config, load_tokenizer


def with_wrong_end(load: Callable[..., Any]) -> Callable[..., Any]:
    """Tokenizers whose end token is their begin token."""

    def loaded(*names: Any, **options: Any) -> Any:
        tokenizer = load(*names, **options)
        tokenizer.eos_token = tokenizer.bos_token
        return tokenizer

    return loaded


def test_a_gguf_file_opens_dequantised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gguf")
    from gguf_files import write_gguf

    path = tmp_path / "tiny.gguf"
    written = write_gguf(path)
    (tmp_path / "config.json").write_text("{}")  # of another model in the same folder
    base = load_base(str(path))
    state, expected = base.state_dict(), written.state_dict()
    assert state.keys() == expected.keys()
    assert [name for name in expected if not state[name].equal(expected[name])] == []
    assert load_base(str(path), dtype="bfloat16").dtype == torch.bfloat16
    assert base.name_or_path == str(path) and load_config(str(path)).hidden_size == 32
    ids = torch.tensor([[3, 4, 5, 6]])
    with torch.no_grad():
        assert base(ids).logits.equal(written(ids).logits)
    for swapped in (False, True):  # as transformers 5.17 reads it
        if swapped:
            monkeypatch.setattr(base_module.AutoTokenizer, "from_pretrained", with_wrong_end(AutoTokenizer.from_pretrained))
        tokenizer = load_tokenizer(str(path))
        assert tokenizer.eos_token_id == base.generation_config.eos_token_id == 2
    encoded = tokenizer.apply_chat_template([{"role": "user", "content": "ab"}], return_dict=False)
    assert encoded[0] == tokenizer.convert_tokens_to_ids("<|im_start|>") and len(tokenizer("ab").input_ids) == 1


def test_wrong_gguf_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.gguf"
    for open_base in (load_config, load_base, load_tokenizer):
        with pytest.raises(RunError, match="x.gguf"):
            open_base(str(path))
    path.write_bytes(b"GGUF, but no more")
    for open_base in (load_config, load_base, load_tokenizer):
        with pytest.raises(RunError, match="x.gguf"):
            open_base(str(path))


def test_the_hub_is_not_asked_for_a_folder_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base_source, "hf_hub_download", lambda *_, **__: pytest.fail("asked"))
    with pytest.raises(RunError, match="bases/none"):
        base_source.hub_file("bases/none", "config.json")


def test_a_gguf_file_is_not_quantised_again(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    from gguf_files import write_gguf

    write_gguf(tmp_path / "x.gguf")
    with pytest.raises(UsageError, match="quantization"):
        load_base(str(tmp_path / "x.gguf"), quantization="4bit")


@pytest.mark.parametrize("place", ["folder", "hub"])
def test_an_adapter_is_merged_into_its_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, place: str) -> None:
    save_base(tmp_path / "base", "llama", word_tokenizer(), torch.float32)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    peft = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    peft.save_pretrained(tmp_path / "adapter")
    name, folder = str(tmp_path / "adapter"), tmp_path / "adapter"
    if place == "hub":
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
        name, folder = "owner/adapter", hub_snapshot(tmp_path / "hub", "owner/adapter", folder)
    ids = torch.tensor([[3, 4, 5, 6]])
    with torch.no_grad():
        expected = peft.merge_and_unload()(ids).logits
        merged = load_base(name)
        assert merged(ids).logits.equal(expected)
        assert not load_base(str(tmp_path / "base"))(ids).logits.equal(expected)
    assert merged.name_or_path == name
    assert sum(f"adapter {name} " in line for line in capsys.readouterr().err.splitlines()) == 1
    assert load_config(name).hidden_size == merged.config.hidden_size
    assert load_tokenizer(name)("one").input_ids == word_tokenizer()("one").input_ids
    assert base_of(name) == (name, None)  # what mtp distill loads
    (folder / "mtp_config.json").write_text("{}")  # a saved folder of this package
    with pytest.raises(RunError, match="adapter"):
        load_base(name)


IDS = torch.tensor([[3, 4, 5, 6]])


def save_adapter(folder: Path, base: Path, new_tokens: int = 0, **options: Any) -> torch.Tensor:
    """Save a random adapter of a base in ``folder``; returns its logits by PEFT."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    if new_tokens:
        model.resize_token_embeddings(model.config.vocab_size + new_tokens)
    torch.manual_seed(1)
    settings = {"r": 2, "target_modules": ["q_proj"], "init_lora_weights": False, **options}
    peft = get_peft_model(model, LoraConfig(**settings)).eval()
    peft.save_pretrained(folder)
    with torch.no_grad():
        return peft(IDS).logits


@pytest.fixture
def base_folder(tmp_path: Path) -> Path:
    save_base(tmp_path / "base", "llama", word_tokenizer(), torch.float64, tie_word_embeddings=True)
    return tmp_path / "base"


def test_trained_new_tokens_of_a_tied_base(tmp_path: Path, base_folder: Path) -> None:
    expected = save_adapter(tmp_path / "adapter", base_folder, 2, trainable_token_indices=[17, 18])
    with torch.no_grad():
        torch.testing.assert_close(load_base(str(tmp_path / "adapter"))(IDS).logits, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_an_adapter_on_one_of_two_tied_layers_acts_on_it_alone(tmp_path: Path, base_folder: Path, target: str) -> None:
    expected = save_adapter(tmp_path / "adapter", base_folder, target_modules=["q_proj", target])
    with torch.no_grad():
        # float64; merged, products are summed in another order
        torch.testing.assert_close(load_base(str(tmp_path / "adapter"))(IDS).logits, expected, rtol=1e-9, atol=1e-9)


def test_an_adapter_with_new_tokens(tmp_path: Path, base_folder: Path) -> None:
    expected = save_adapter(tmp_path / "adapter", base_folder, 2, modules_to_save=["embed_tokens", "lm_head"])
    (tmp_path / "adapter" / "config.json").write_text("{}")  # which some tools write beside it
    base = load_base(str(tmp_path / "adapter"))
    assert base.config.vocab_size == load_config(str(tmp_path / "adapter")).vocab_size == expected.shape[-1]
    with torch.no_grad():
        torch.testing.assert_close(base(IDS).logits, expected, rtol=1e-9, atol=1e-9)


def test_adapters_that_would_be_left_out(tmp_path: Path, base_folder: Path) -> None:
    folder = tmp_path / "adapter"
    save_adapter(folder, base_folder)
    weights = load_file(folder / "adapter_model.safetensors")
    save_file({name.replace("layers", "h"): value for name, value in weights.items()}, folder / "adapter_model.safetensors")
    with pytest.raises(RunError, match=re.escape(str(folder))):
        load_base(str(folder))
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": "/not/here"}))
    with pytest.raises(RunError, match=r"/not/here.*adapter_config\.json"):
        load_base(str(folder))
    with pytest.raises(UsageError, match="base_model"):
        base_of(str(folder), str(base_folder))
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(RunError, match="adapter_model.safetensors"):
        load_base(str(folder))
    with pytest.raises(RunError, match=re.escape(str(folder))):  # the folder of a training run: its checkpoints are in it
        load_config(str(tmp_path))
    save_adapter(base_folder, base_folder)  # into the folder of the whole model
    with pytest.raises(RunError, match="adapter_config.json"):
        load_base(str(base_folder))


def test_a_base_whose_files_lack_weights(base_folder: Path) -> None:
    weights = load_file(base_folder / "model.safetensors")
    renamed = {f"_orig_mod.{name}": value for name, value in weights.items()}
    save_file(renamed, base_folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RunError, match="_orig_mod"):
        load_base(str(base_folder))


def test_an_adapter_that_the_hub_refuses(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(name: str, allow_patterns: list[str], **options: Any) -> str:
        assert not any(fnmatch("checkpoint-500/optimizer.pt", pattern) for pattern in allow_patterns)
        raise LocalEntryNotFoundError("out of reach")

    monkeypatch.setattr(base_adapter, "hub_file", lambda name, file, revision: tmp_path if "adapter" in file else None)
    monkeypatch.setattr(base_adapter, "snapshot_download", refuse)
    with pytest.raises(RunError, match="owner/adapter"):
        load_config("owner/adapter")


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2", "gpt_neox", "gemma2"])
def test_a_folder_without_a_tokenizer(tmp_path: Path, kind: str) -> None:
    AutoConfig.for_model(kind).save_pretrained(tmp_path)
    with pytest.raises(RunError, match="has no tokenizer"):
        load_tokenizer(str(tmp_path))


def test_a_name_that_is_no_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("bases/nope", "./x", "../x", "/no/x", "a/b/c"):
        for load in (load_config, load_tokenizer):
            with pytest.raises(RunError, match=f"no folder {name} here"):
                load(name)
