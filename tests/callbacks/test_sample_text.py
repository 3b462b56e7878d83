# SPDX-License-Identifier: Apache-2.0
"""SampleText: which pieces are marked, what is printed, and what loggers get."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lightning import Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from toy_tokenizers import byte_tokenizer

from mtp_lightning.callbacks import SampleText
from mtp_lightning.callbacks.sample_text import colour, mark_drafts, plain
from mtp_lightning.decoding.loop import decode
from mtp_lightning.decoding.options import DecodingOptions
from mtp_lightning.errors import UsageError
from mtp_lightning.training.module import MTPModule


def test_drafted_and_free_tokens_are_told_apart() -> None:
    tokenizer = byte_tokenizer(["<eos>"], "<eos>")

    def ids(text: str) -> list[int]:
        return tokenizer(text)["input_ids"]

    steps = [ids("x"), ids("yz1"), ids("2")]
    spans = mark_drafts(steps, tokenizer)
    assert spans == [("x", False), ("yz", True), ("1", False), ("2", False)]
    assert plain(spans) == "x\u27e6yz\u27e712"
    assert colour("p[b]", spans).plain == "p[b]xyz12"
    # A character of three bytes: its last byte comes for free, so it is free.
    euro = ids("\u20ac")
    assert len(euro) == 3
    assert mark_drafts([ids("x") + euro, ids("y")], tokenizer) == [("x", True), ("\u20ac", False), ("y", False)]
    # One that is never completed is left out.
    assert mark_drafts([ids("x"), euro[:2]], tokenizer) == [("x", False)]


def test_samples_are_printed_and_logged(
    fit: Callable[..., Trainer],
    module: MTPModule,
    prompts: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    loggers = [CSVLogger(tmp_path, name="", version=""), TensorBoardLogger(tmp_path, name="", version="")]
    fit(module, SampleText(prompts, num_samples=2, max_new_tokens=12), logger=loggers)
    out = capsys.readouterr().out
    assert out.count("sample 0 (code), ") == out.count("sample 1 (maths), ") == 2  # two validations
    assert "\u27e6" in out
    events = EventAccumulator(str(tmp_path)).Reload()
    tags = [f"val/sample_{number}/text_summary" for number in (0, 1)]
    assert set(tags) <= set(events.Tags()["tensors"])
    (first, last) = events.Tensors(tags[0])
    assert (first.step, last.step) == (1, 3)
    text = last.tensor_proto.string_val[0].decode()
    options = DecodingOptions(num_masks=module.model.num_masks, max_new_tokens=12)
    steps = [step.tokens for step in decode(module.model, torch.tensor(module.tokenizer("a")["input_ids"]), options)]
    marked = "a" + plain(mark_drafts(steps, module.tokenizer))
    assert "\u27e6" in marked and text.endswith(f"\n\n````\n{marked}\n````")
    assert text.startswith(f"sample 0 (code), {12 / len(steps):.2f} tokens per step")


def test_wrong_options() -> None:
    with pytest.raises(UsageError, match="num_samples"):
        SampleText("p.txt", num_samples=0)
