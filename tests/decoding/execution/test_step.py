# SPDX-License-Identifier: Apache-2.0
"""One decoding step: it never waits for the device, and its draft ends early where it is unlikely."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from injected_drafts import shared_model
from step_cost_examples import FREE
from tiny import token_row
from torch.utils._python_dispatch import TorchDispatchMode

from mtp_lightning.decoding import planner
from mtp_lightning.decoding.execution import step as decoding_step
from mtp_lightning.decoding.loop import decode
from mtp_lightning.decoding.options import DecodingOptions

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
        ("quadratic", {"temperature": 0.8, "top_p": 0.9, "verification": "rejection", "draft_candidates": 9}),
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


def test_the_host_reads_once_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner, "step_seconds", lambda *args: FREE)
    steps = decode(shared_model("llama", "gru"), token_row([6]).input_ids, DecodingOptions(max_new_tokens=12))
    next(steps)
    calls: list[str] = []
    for name in ("tolist", "item", "cpu"):
        real = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda *args, real=real, name=name: calls.append(name) or real(*args))
    count = sum(1 for _ in steps)
    assert count and len(calls) == count
