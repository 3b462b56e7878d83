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

from mtp_lightning.callbacks import SampleText
from mtp_lightning.callbacks.sample_text import marked
from mtp_lightning.decoding.loop import decode
from mtp_lightning.decoding.options import DecodingOptions
from mtp_lightning.errors import UsageError
from mtp_lightning.text.detokenizer import Detokenizer
from mtp_lightning.training.module import MTPModule


def test_tokens_of_a_step_are_marked_together() -> None:
    pieces = [("x", 1), ("yz1", 3), ("", 2), ("[b]", 1)]
    assert marked(pieces, colour=False).plain == "x\u27e6yz1\u27e7[b]"
    coloured = marked(pieces, colour=True)
    assert coloured.plain == "xyz1[b]"
    assert len({span.style for span in coloured.spans}) == 3


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
    detokenizer = Detokenizer(module.tokenizer, skip_special_tokens=False)
    pieces = [("".join(map(detokenizer.add, step)), len(step)) for step in steps]
    shown = f"a{marked(pieces, colour=False)}"
    assert "\u27e6" in shown and text.endswith(f"\n\n````\n{shown}\n````")
    assert text.startswith(f"sample 0 (code), {12 / len(steps):.2f} tokens per step")


def test_wrong_options() -> None:
    with pytest.raises(UsageError, match="num_samples"):
        SampleText("p.txt", num_samples=0)
