# SPDX-License-Identifier: Apache-2.0
"""The base of a saved folder: layers must fit, another one is a warning; loaded already, offloaded or quantised."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from command_line import save_base
from saved import PROMPT, saved_model, trained_values
from tiny import greedy_text
from toy_tokenizers import word_tokenizer
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from mtp_lightning import MTPModel
from mtp_lightning.errors import RunError, UsageError
from mtp_lightning.modeling.peft_private import lora_layers


def test_a_base_of_another_shape_is_refused(kept: Path, tmp_path: Path) -> None:
    save_base(tmp_path / "base", "llama", word_tokenizer(), torch.float32, num_hidden_layers=3)
    with pytest.raises(RunError, match=r"base with num_hidden_layers \d+, and '.*base' has 3\."):
        MTPModel.from_pretrained(kept / "saved", base_model=str(tmp_path / "base"))


def test_another_base_of_the_same_shape_gets_a_warning_and_its_own_text(kept: Path, tmp_path: Path) -> None:
    """Another architecture, other weights and one more token."""
    tokenizer = word_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    save_base(tmp_path / "other", "qwen3", tokenizer, torch.float64, seed=3)
    with pytest.warns(UserWarning, match="trained on base model '.*base', and '.*other' is used"):
        model = MTPModel.from_pretrained(kept / "saved", base_model=str(tmp_path / "other"))
    expected = greedy_text(AutoModelForCausalLM.from_pretrained(tmp_path / "other"), PROMPT[0], 20)
    assert model.generate(PROMPT, max_new_tokens=20).sequences[0, 3:].tolist() == expected
    assert model.tokenizer.get_vocab() == tokenizer.get_vocab()


def test_a_base_that_is_loaded_already(kept: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(kept / "base")
    expected = greedy_text(base, PROMPT[0], 20)
    model = MTPModel.from_pretrained(kept / "saved", base=base)
    assert model.base is base and greedy_text(base, PROMPT[0], 20) == expected
    assert model.generate(PROMPT, max_new_tokens=20).sequences[0, 3:].tolist() == expected
    with pytest.raises(UsageError, match="base has LoRA layers already"):
        MTPModel.from_pretrained(kept / "saved", base=base)
    with pytest.raises(UsageError, match="base is loaded already: leave device and device_map out"):
        MTPModel.from_pretrained(kept / "saved", base=base, device="cpu")


def test_an_offloaded_base(kept: Path, tmp_path: Path) -> None:
    """Layers on disk, fetched by accelerate when they run."""
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    places = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    places |= {"model.layers.0": "cpu", "model.layers.1": "disk"}
    base = AutoModelForCausalLM.from_pretrained(kept / "base", device_map=places, offload_folder=tmp_path / "offloaded")
    assert {p.device.type for p in base.parameters()} == {"cpu", "meta"}
    model = MTPModel.from_pretrained(kept / "saved", base=base)
    whole = MTPModel.from_pretrained(kept / "saved")
    found, expected = (each.generate(PROMPT, max_new_tokens=20, num_masks=2) for each in (model, whole))
    assert found.sequences.equal(expected.sequences) and found.accepted_per_step == expected.accepted_per_step


def test_device_map_auto(kept: Path) -> None:
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    model = MTPModel.from_pretrained(kept / "saved", device_map="auto")
    out = model.generate(PROMPT.to(model.base.device), max_new_tokens=20)
    assert out.sequences.cpu().equal(MTPModel.from_pretrained(kept / "saved").generate(PROMPT, max_new_tokens=20).sequences)


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_a_quantised_base(tmp_path: Path, bits: str) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    # On a CPU bitsandbytes wants sizes that are multiples of 32.
    saved_model(tmp_path, dtype=torch.float32, hidden_size=64, intermediate_size=128, head_dim=32)
    model = MTPModel.from_pretrained(tmp_path / "saved", quantization=bits)
    options = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}
    settings = BitsAndBytesConfig(**options) if bits == "4bit" else BitsAndBytesConfig(load_in_8bit=True)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=settings)
    given = MTPModel.from_pretrained(tmp_path / "saved", base=base)
    assert {type(layer.base_layer).__name__ for layer in lora_layers(model.base)} == {
        "Linear4bit" if bits == "4bit" else "Linear8bitLt"
    }
    out, same = (each.generate(PROMPT, max_new_tokens=12) for each in (model, given))
    assert out.sequences.shape == (1, 15) and out.sequences.equal(same.sequences)
    model.save_pretrained(tmp_path / "again")
    again = MTPModel.from_pretrained(tmp_path / "again", quantization=bits)
    assert trained_values(again).keys() == trained_values(model).keys()
