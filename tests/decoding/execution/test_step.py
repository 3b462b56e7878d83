# SPDX-License-Identifier: Apache-2.0
"""One decoding step: it never waits for the device, and its draft ends early where it is unlikely."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from injected_drafts import shared_model
from tiny import tiny_model, token_row
from torch.utils._python_dispatch import TorchDispatchMode

from mtp_lightning.decoding.execution import step as decoding_step
from mtp_lightning.decoding.execution.step import draft_block
from mtp_lightning.decoding.options import DecodingOptions
from mtp_lightning.decoding.token_choice import TokenChoice
from mtp_lightning.sampler_heads import GRUSamplerHead

WAITING = {f"aten::{op}" for op in ("item", "_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "equal")}
"""Operations that make the host wait for a device's values."""


class NoWaiting(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.name().split(".")[0] not in WAITING
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("quadratic", {}),
        ("linear", {"temperature": 0.8, "top_k": 50, "top_p": 0.9}),
        ("quadratic", {"temperature": 0.8, "top_p": 0.9, "verification": "rejection", "draft_vocabulary": 9}),
    ],
)
def test_a_step_never_waits_for_the_device(kind: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = shared_model("llama", "gru"), torch.stack([token_row([6], seed=s).input_ids for s in (0, 1)])
    options = {"decoding": kind, "num_masks": 3, "max_new_tokens": 8, "seed": 1, **options}
    expected = model.generate(ids, **options)
    decode_step = decoding_step.decode_step

    def refuse(*args: Any) -> Any:
        raise AssertionError("a Python number is read from a tensor")

    def without_waiting(*args: Any) -> Any:
        with monkeypatch.context() as patch, NoWaiting():
            for name in ("tolist", "item", "__bool__", "__int__", "__float__", "__index__", "numpy", "cpu"):
                patch.setattr(torch.Tensor, name, refuse)
            return decode_step(*args)

    monkeypatch.setattr(decoding_step, "decode_step", without_waiting)
    found = model.generate(ids, **options)
    assert torch.equal(found.sequences, expected.sequences) and found.accepted_per_step == expected.accepted_per_step


def test_drafts_end_early_below_a_path_probability() -> None:
    model = tiny_model("llama", 8, sampler_head=GRUSamplerHead())
    choice = TokenChoice(DecodingOptions(), [0, 0], torch.device("cpu"))
    choice.return_draft_probs = True
    hidden = torch.randn(2, 8, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    arguments = (model, hidden, torch.tensor([3, 4]), torch.tensor([9, 9]), choice, True)
    with torch.inference_mode():
        full = draft_block(*arguments)
        assert full.tokens.shape == (2, 8) and full.probabilities is not None
        path_prob = full.probabilities.cumprod(1).max(0).values  # of the row that continues longest
        for count in (1, 3, 7):
            choice.min_path_prob = float(path_prob[count - 1]) * 1.0001
            part = draft_block(*arguments)
            length = int((path_prob >= choice.min_path_prob).sum()) + 1
            assert 1 <= length <= count and torch.equal(part.tokens, full.tokens[:, :length])
