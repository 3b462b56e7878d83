# SPDX-License-Identifier: Apache-2.0
"""Saved folders: what is written is what is read, PEFT alone gives the base, and a write is whole or not there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from saved import FILES, PROMPT, files_of, model_on_disk, set_config, trained_values
from tiny import greedy_text, tiny_model
from transformers import AutoModelForCausalLM

from mtp_lightning import MTPModel
from mtp_lightning.errors import RunError, UsageError
from mtp_lightning.modeling.gated_lora import LoRA
from mtp_lightning.modeling.masking import build_masked_input
from mtp_lightning.modeling.peft_private import lora_layers
from mtp_lightning.sampler_heads import GRUSamplerHead, MarkovSamplerHead, MLPSamplerHead, SamplerHead
from mtp_lightning.saving import export as exporting
from mtp_lightning.types import TokenRow


@pytest.mark.parametrize(
    ("architecture", "head", "lora"),
    [
        ("llama", GRUSamplerHead(8, read_hidden=True), LoRA(rank=4, alpha=3.0, dropout=0.1)),
        ("gemma3", MLPSamplerHead(), LoRA(rank=2, target_modules="all-linear")),
        ("qwen3_moe", None, LoRA(rank=2, gated=False)),
        ("llama", MarkovSamplerHead(rank=3), LoRA(rank=2)),
    ],
)
def test_what_is_saved_is_what_is_loaded(tmp_path: Path, architecture: str, head: SamplerHead, lora: LoRA) -> None:
    model = model_on_disk(tmp_path, architecture, head, lora)
    options = {"max_new_tokens": 24, "num_masks": model.num_masks, "draft_candidates": 5}
    before = model.generate(PROMPT, **options)
    model.save_pretrained(tmp_path / "saved")
    assert set(files_of(tmp_path / "saved")) == FILES
    loaded = MTPModel.from_pretrained(tmp_path / "saved")
    if architecture.endswith("moe"):
        loaded.base.set_experts_implementation("eager")
    assert loaded.lora == model.lora and loaded.num_masks == model.num_masks and not loaded.training
    old, new = trained_values(model), trained_values(loaded)
    assert old.keys() == new.keys() and all(new[name].equal(old[name]) for name in old)
    after = loaded.generate(PROMPT, **options)
    assert after.sequences.equal(before.sequences) and after.accepted_per_step == before.accepted_per_step
    assert loaded.tokenizer.get_vocab() == model.tokenizer.get_vocab()
    assert loaded.tokenizer.chat_template == model.tokenizer.chat_template
    loaded.save_pretrained(tmp_path / "again")
    assert files_of(tmp_path / "again") == files_of(tmp_path / "saved")


def test_dtype_and_device(kept: Path) -> None:
    model = MTPModel.from_pretrained(str(kept / "saved"), dtype="bfloat16", device="cpu")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in MTPModel.from_pretrained(kept / "saved", dtype=torch.float32).parameters()} == {torch.float32}
    with pytest.raises(UsageError, match="tpu9"):
        MTPModel.from_pretrained(kept / "saved", device="tpu9")
    with pytest.raises(UsageError, match="give device or device_map, not both"):
        MTPModel.from_pretrained(kept / "saved", device="cpu", device_map="auto")


def test_peft_alone_gives_exactly_the_base(tmp_path: Path, kept: Path) -> None:
    ids = torch.randint(9, 15, (2, 20), generator=torch.Generator().manual_seed(0))
    base = AutoModelForCausalLM.from_pretrained(kept / "base")
    with torch.no_grad():
        expected = base(ids).logits
        said = greedy_text(base, ids[0], 12)
        model = PeftModel.from_pretrained(base, str(kept / "saved"))
        assert len(lora_layers(model)) == 14  # the adapter is there
        assert all(layer.lora_B["default"].weight.abs().sum() > 0 for layer in lora_layers(model))
        assert model(ids).logits.equal(expected)
        out = model.generate(input_ids=ids[:1], max_new_tokens=12, do_sample=False, pad_token_id=0)
        assert out[0, 20:].tolist() == said
        assert AutoPeftModelForCausalLM.from_pretrained(str(kept / "saved"))(ids).logits.equal(expected)
        assert AutoModelForCausalLM.from_pretrained(str(kept / "saved"))(ids).logits.equal(expected)
        # A reader that does not know activated LoRA, or finds its tokens in the text, gives the base too.
        for tokens in (None, ids[0, 3:5].tolist()):
            shutil.copytree(kept / "saved", tmp_path / "other", dirs_exist_ok=True)
            config = json.loads((tmp_path / "other" / "adapter_config.json").read_text())
            config["alora_invocation_tokens"] = tokens
            (tmp_path / "other" / "adapter_config.json").write_text(json.dumps(config))
            reader = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(kept / "base"), str(tmp_path / "other"))
            assert reader(ids).logits.equal(expected)
        # A standard LoRA acts everywhere.
        standard = model_on_disk(tmp_path, head=None, lora=LoRA(rank=4, gated=False))
        standard.save_pretrained(tmp_path / "saved")
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        expected = base(ids).logits
        changed = PeftModel.from_pretrained(base, str(tmp_path / "saved"))(ids).logits
        assert not torch.allclose(changed, expected)


def test_a_folder_is_replaced_whole(saved_copy: Path, kept: Path) -> None:
    (saved_copy / "notes.txt").write_text("mine")
    (saved_copy / "old.json").write_text("{}")
    files = json.loads((saved_copy / "mtp_config.json").read_text())["files"]
    set_config(saved_copy, files={**files, "old.json": exporting.file_digest(saved_copy / "old.json")})
    model = MTPModel.from_pretrained(kept / "saved")
    model.save_pretrained(saved_copy)
    assert files_of(saved_copy) == {**files_of(kept / "saved"), "notes.txt": b"mine"}  # what was ours and is no more is gone
    assert [path.name for path in saved_copy.parent.iterdir()] == ["saved"]


def test_a_folder_of_something_else_is_refused(kept: Path, tmp_path: Path) -> None:
    model = MTPModel.from_pretrained(kept / "saved")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(RunError, match="mine exists and was not written by mtp export"):
        model.save_pretrained(tmp_path / "mine")
    assert files_of(tmp_path / "mine") == {"thesis.txt": b"years of work"}
    with pytest.raises(RunError, match="thesis.txt' is a file"):
        model.save_pretrained(tmp_path / "mine" / "thesis.txt")
    (tmp_path / "empty").mkdir()
    model.save_pretrained(tmp_path / "empty")
    assert set(files_of(tmp_path / "empty")) == FILES


def test_a_base_without_a_name(tmp_path: Path) -> None:
    model = tiny_model()
    with pytest.raises(UsageError, match="base_model"):
        model.save_pretrained(tmp_path / "saved")
    assert not list(tmp_path.iterdir())
    model.save_pretrained(tmp_path / "saved", base_model="owner/base", revision="main")
    config = json.loads((tmp_path / "saved" / "mtp_config.json").read_text())
    assert (config["base_model"], config["revision"]) == ("owner/base", "main")


def test_with_noise_tokens_the_folder_is_a_plain_lora_for_peft(tmp_path: Path) -> None:
    """Stock PEFT, with its LoRA on at the noise positions only, gives our logits."""
    model = model_on_disk(tmp_path, mask_tokens="noise")
    model.save_pretrained(tmp_path / "saved")
    settings = json.loads((tmp_path / "saved" / "mtp_config.json").read_text())
    assert settings["mask_tokens"] == "noise" and settings["peft_alone"] == "lora_everywhere"
    assert "plain LoRA" in (tmp_path / "saved" / "README.md").read_text()
    ids = torch.tensor([9, 10, 11, 12, 13, 9, 14])
    batch = build_masked_input([TokenRow(ids, ids, torch.zeros_like(ids), 0)], model.num_masks)
    loaded = MTPModel.from_pretrained(tmp_path / "saved")
    with torch.no_grad():
        states = loaded.hidden_states(batch)
        expected, at_tokens = model.unembed(states.mtp)[0, 2], model.unembed(states.ntp)[0]

    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float64)
    stock = PeftModel.from_pretrained(base, tmp_path / "saved")
    start, noise = int(batch.starts[0, 2]), batch.noise[0, 2] % model.unembed.vocab_size
    with torch.no_grad():
        with stock.disable_adapter():
            prefix = stock(ids[None, : start + 1], use_cache=True)
        logits = stock(noise[None], past_key_values=prefix.past_key_values).logits[0]
        everywhere = stock(ids[None]).logits[0]
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)  # float64, other shapes
    assert not torch.allclose(everywhere, at_tokens)  # as the card warns

    before, after = (each.generate(PROMPT, max_new_tokens=12, num_masks=2) for each in (model, loaded))
    assert after.sequences.equal(before.sequences) and after.accepted_per_step == before.accepted_per_step
    set_config(tmp_path / "saved", mask_tokens="other")
    with pytest.raises(RunError, match="mask_tokens"):
        MTPModel.from_pretrained(tmp_path / "saved")
