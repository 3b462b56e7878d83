# SPDX-License-Identifier: Apache-2.0
"""Bases in GGUF files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mtp_lightning.errors import RunError, UsageError
from mtp_lightning.modeling import base as base_module
from mtp_lightning.modeling.base import load_base, load_config, load_tokenizer


def test_a_gguf_file_opens_dequantised(tmp_path: Path) -> None:
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
    tokenizer = load_tokenizer(str(path))
    encoded = tokenizer.apply_chat_template([{"role": "user", "content": "ab"}], return_dict=False)
    assert encoded[0] == tokenizer.convert_tokens_to_ids("<|im_start|>") and len(tokenizer("ab").input_ids) == 1
    assert tokenizer.eos_token_id == base.generation_config.eos_token_id == 2


def test_wrong_gguf_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.gguf"
    for open_base in (load_config, load_base, load_tokenizer):
        with pytest.raises(RunError, match="x.gguf"):
            open_base(str(path))
    path.write_bytes(b"GGUF, but no more")
    for open_base in (load_config, load_base, load_tokenizer):
        with pytest.raises(RunError, match="x.gguf"):
            open_base(str(path))
    monkeypatch.setattr(base_module, "is_gguf_available", lambda: False)
    with pytest.raises(RunError, match="pip install gguf"):
        load_base(str(path))


def test_a_gguf_file_is_not_quantised_again(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    from gguf_files import write_gguf

    write_gguf(tmp_path / "x.gguf")
    with pytest.raises(UsageError, match="quantization"):
        load_base(str(tmp_path / "x.gguf"), quantization="4bit")
