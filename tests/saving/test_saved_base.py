# SPDX-License-Identifier: Apache-2.0
"""The base of a saved folder: another one is refused, and the same one may come in any dtype, loaded or quantised."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from command_line import save_base
from saved import PROMPT, saved_model, trained_values
from tiny import greedy_text
from toy_tokenizers import byte_tokenizer, word_tokenizer
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from mtp_lightning import MTPModel
from mtp_lightning.errors import RunError, UsageError
from mtp_lightning.modeling.peft_private import lora_layers


def test_a_base_of_another_shape(kept: Path, tmp_path: Path) -> None:
    for key, value, options in (
        ("hidden_size", 40, {"hidden_size": 40}),
        ("num_hidden_layers", 3, {"num_hidden_layers": 3}),
        ("num_attention_heads", 8, {"num_attention_heads": 8, "num_key_value_heads": 2}),
    ):
        save_base(tmp_path / key, "llama", word_tokenizer(), torch.float32, **options)
        with pytest.raises(RunError, match=rf"the folder belongs to a base with {key} \d+, and '.*{key}' has {value}\."):
            MTPModel.from_pretrained(kept / "saved", base_model=str(tmp_path / key))
    save_base(tmp_path / "qwen", "qwen3", word_tokenizer(), torch.float32)
    with pytest.raises(RunError, match="belongs to a base with model_type llama, and '.*qwen' has qwen3"):
        MTPModel.from_pretrained(kept / "saved", base_model=str(tmp_path / "qwen"))


def test_a_base_of_another_vocabulary(kept: Path, tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(["<a>"], "<a>")
    save_base(tmp_path / "larger", "llama", tokenizer, torch.float64)
    with pytest.raises(RunError, match=f"a base with vocab_size 17, and '.*larger' has {len(tokenizer)}"):
        MTPModel.from_pretrained(kept / "saved", base_model=str(tmp_path / "larger"))
    # The same number of tokens, in another order.
    save_base(tmp_path / "other", "llama", word_tokenizer(), torch.float64)
    path = tmp_path / "other" / "tokenizer.json"
    settings = json.loads(path.read_text())
    words = settings["model"]["vocab"]
    words["one"], words["two"] = words["two"], words["one"]
    path.write_text(json.dumps(settings))
    with pytest.raises(RunError, match="a base with another vocabulary than that of '.*other'"):
        MTPModel.from_pretrained(kept / "saved", base_model=str(tmp_path / "other"))


def test_a_base_of_other_weights(kept: Path, tmp_path: Path) -> None:
    save_base(tmp_path / "anew", "llama", word_tokenizer(), torch.float64, seed=3)
    with pytest.raises(RunError, match=r"'.*anew' has the shape of the base .*, but other weights \(\d+ of 128 looked at\)"):
        MTPModel.from_pretrained(kept / "saved", base_model=str(tmp_path / "anew"))
    with pytest.raises(RunError, match="but other weights"):
        MTPModel.from_pretrained(
            kept / "saved", base=AutoModelForCausalLM.from_pretrained(tmp_path / "anew"), base_model="another"
        )


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("saved_in", ["float64", "bfloat16", "float16"])
def test_the_same_base_in_any_dtype(kept: Path, tmp_path: Path, saved_in: str, dtype: str) -> None:
    MTPModel.from_pretrained(kept / "saved", dtype=saved_in).save_pretrained(tmp_path / "saved")
    MTPModel.from_pretrained(tmp_path / "saved", dtype=dtype)


def test_a_base_that_is_loaded_already(kept: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(kept / "base")
    expected = greedy_text(base, PROMPT[0], 20)
    model = MTPModel.from_pretrained(kept / "saved", base=base)
    assert model.base is base and greedy_text(base, PROMPT[0], 20) == expected
    assert model.generate(PROMPT, max_new_tokens=20).sequences[0, 3:].tolist() == expected
    with pytest.raises(UsageError, match="base carries LoRA layers already"):
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
    for decoding in ("quadratic", "linear", "autoregressive"):
        options = {"max_new_tokens": 20, "decoding": decoding, "num_masks": 2}
        assert model.generate(PROMPT, **options).sequences.equal(whole.generate(PROMPT, **options).sequences)
        assert model.generate(PROMPT, **options).accepted_per_step == whole.generate(PROMPT, **options).accepted_per_step


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
