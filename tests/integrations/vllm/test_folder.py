# SPDX-License-Identifier: Apache-2.0
"""What the server reads of a saved folder, and that it drafts as our own decoder does."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from saved import saved_model

from mtp_lightning.decoding.execution.step import draft_block
from mtp_lightning.decoding.options import DecodingOptions
from mtp_lightning.decoding.token_choice import TokenChoice
from mtp_lightning.errors import RunError, UsageError
from mtp_lightning.integrations.vllm.drafting import draft_greedily
from mtp_lightning.integrations.vllm.folder import packed_lora, read_parts
from mtp_lightning.modeling.gated_lora import LoRA
from mtp_lightning.modeling.peft_private import lora_layers


def test_parts_are_the_models(tmp_path: Path) -> None:
    model = saved_model(tmp_path, lora=LoRA(rank=4, alpha=12))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B" in name:
                parameter.normal_()
    model.save_pretrained(tmp_path / "saved")
    parts = read_parts(str(tmp_path / "saved"), model.base.config, "base")
    layers = {name: layer for name, layer in model.base.named_modules() if layer in set(lora_layers(model.base))}
    assert parts.lora.keys() == layers.keys() and len(layers) == 14
    for name, (A, B) in parts.lora.items():
        torch.testing.assert_close(B @ A, layers[name].get_delta_weight("default"))
    assert torch.equal(parts.mask_embeddings, model.mask_embeddings)


def test_packed_layers_are_their_parts() -> None:
    (A1, B1), (A3, B3) = ((torch.randn(r, 5), torch.randn(out, r)) for r, out in ((2, 4), (3, 6)))
    A, B = packed_lora([(A1, B1), None, (A3, B3)], [4, 2, 6])
    x = torch.randn(7, 5)
    parts = [x @ A1.t() @ B1.t(), torch.zeros(7, 2), x @ A3.t() @ B3.t()]
    torch.testing.assert_close(x @ A.t() @ B.t(), torch.cat(parts, 1))


@pytest.mark.parametrize("num_candidates", [5, None])
@pytest.mark.parametrize("with_head", [True, False])
@pytest.mark.parametrize("with_logits", [True, False])
def test_drafts_are_the_decoders(tmp_path: Path, num_candidates: int | None, with_head: bool, with_logits: bool) -> None:
    model = saved_model(tmp_path, **({} if with_head else {"head": None}))
    head = model.sampler_head
    if head is not None:
        torch.nn.init.normal_(head.output.weight)
        model.save_pretrained(tmp_path / "saved")
    parts = read_parts(str(tmp_path / "saved"), model.base.config, "base")
    hidden, verified = torch.randn(6, 3, 32, dtype=torch.float64), torch.arange(6)
    choice = TokenChoice(DecodingOptions(), [0] * 6, torch.device("cpu"), num_candidates)
    with torch.no_grad():
        logits = model.unembed(hidden) if with_logits else None
        expected = draft_block(model, hidden, verified, verified, choice, True, logits).tokens
        drafts = draft_greedily(parts.sampler_head, model.embed, model.unembed, hidden, logits, verified, num_candidates)
    assert torch.equal(drafts, expected)


def test_refused_folders(tmp_path: Path) -> None:
    model = saved_model(tmp_path)
    with pytest.raises(RunError, match="hidden_size"):
        read_parts(str(tmp_path / "saved"), SimpleNamespace(**{**model.base.config.to_dict(), "hidden_size": 64}), "base")
    saved_model(tmp_path, lora=LoRA(rank=2, gated=False))
    with pytest.raises(UsageError, match="gated"):
        read_parts(str(tmp_path / "saved"), model.base.config, "base")
    config = json.loads((tmp_path / "saved" / "mtp_config.json").read_text())
    config["lora"]["gated"], config["sampler_head"]["class_path"] = True, "sent_by_someone.Head"
    (tmp_path / "saved" / "mtp_config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match="sent_by_someone"):
        read_parts(str(tmp_path / "saved"), model.base.config, "base")
