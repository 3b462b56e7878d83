# SPDX-License-Identifier: Apache-2.0
"""transformers' own ``generate`` with ``custom_generate``: a function or a saved folder, against its own loop."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from bigram import bigram_base, bigram_text, planted_drafts
from saved import PROMPT, saved_model
from tiny import tiny_model
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LogitsProcessor,
    PreTrainedModel,
    StoppingCriteria,
    TextStreamer,
)

from mtp_lightning import MTPModel
from mtp_lightning.errors import UsageError
from mtp_lightning.sampler_heads import GRUSamplerHead

PADDED = torch.tensor([[5, 6, 7, 8, 9], [0, 0, 11, 12, 13], [0, 0, 0, 0, 3]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [0, 0, 0, 0, 1]])


@pytest.fixture(scope="module")
def model() -> MTPModel:
    return tiny_model(sampler_head=GRUSamplerHead(8))


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kept")
    saved_model(folder)
    return folder


class NoRepeat(LogitsProcessor):
    """Never the same token twice in a row; depends on the text and, with padding, on where it begins."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores.scatter_(1, input_ids[:, -1:], -torch.inf)
        scores[:, input_ids.shape[1] % scores.shape[1]] += 3
        return scores


class UpTo(StoppingCriteria):
    """Stops after a token divisible by 7."""

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return input_ids[:, -1] % 7 == 0


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "end token": {"eos_token_id": [19, 40, 41]},
    "penalty": {"repetition_penalty": 1.7},
    "several processors": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "bad_words_ids": [[7], [8, 9]]},
    "at least": {"eos_token_id": list(range(60)), "min_new_tokens": 6},
    "custom processor": {"logits_processor": [NoRepeat()]},
    "criterion": {"stopping_criteria": [UpTo()]},
    "criterion and end token": {"stopping_criteria": [UpTo()], "eos_token_id": [19, 40]},
    "total length": {"max_new_tokens": None, "max_length": 11},
}


@pytest.mark.parametrize(
    ("case", "decoding"),
    [*((case, "quadratic") for case in CASES), ("criterion and end token", "linear"), ("plain", "autoregressive")],
)
def test_it_is_what_transformers_generates(model: MTPModel, case: str, decoding: str) -> None:
    options = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0, **CASES[case]}
    for inputs in ({"input_ids": PROMPT}, {"input_ids": PADDED, "attention_mask": MASK}):
        expected = model.base.generate(**inputs, **options)
        found = model.base.generate(
            **inputs, **options, custom_generate=model.custom_generate, decoding=decoding, num_masks=2, draft_candidates=9
        )
        assert found.equal(expected)


def test_fewer_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mtp_lightning.decoding.execution.step.draft_block", planted_drafts(60, 12))
    model = tiny_model(base=bigram_base(60, 12))
    steps: list[int] = []
    model.base.get_decoder().register_forward_pre_hook(lambda *_: steps.append(1))
    common = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    found = model.base.generate(PROMPT, **common, custom_generate=model.custom_generate, num_masks=3)
    assert found[0, 3:].tolist() == bigram_text(11, 20, 60, 12)
    assert len(steps) == model.generate(PROMPT, max_new_tokens=20, num_masks=3).num_steps.item() < 12


def test_sampling_is_our_sampling(model: MTPModel) -> None:
    """A draw differs from transformers' own; it is the one of ``MTPModel.generate`` with the same options and seed."""
    for options in (
        {"temperature": 0.7, "top_p": 0.9, "top_k": 20},
        {"temperature": 1.3, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.2},
    ):
        ours = {**options, "top_k": options["top_k"] or None}
        expected = model.generate(PADDED, MASK, max_new_tokens=12, seed=5, **ours).sequences
        common = {"max_new_tokens": 12, "do_sample": True, "pad_token_id": 0, "seed": 5, **options}
        inputs = {"input_ids": PADDED, "attention_mask": MASK}
        found = model.base.generate(**inputs, **common, custom_generate=model.custom_generate)
        for row, (theirs, own) in enumerate(zip(found, expected, strict=True)):
            n = int(MASK[row].sum())
            assert theirs[5:].equal(own[n : n + 12])
        other = model.base.generate(**inputs, **{**common, "seed": 6}, custom_generate=model.custom_generate)
        assert not other.equal(found)


def test_a_warper_after_top_p_keeps_its_place(model: MTPModel) -> None:
    """Processors that can't be taken apart are called in transformers' order: tokens below the threshold never come."""
    common = {"max_new_tokens": 12, "do_sample": True, "pad_token_id": 0, "temperature": 2.0}
    common |= {"top_k": 0, "epsilon_cutoff": 0.05}
    found = model.base.generate(PROMPT, **common, custom_generate=model.custom_generate, seed=0)
    for n in range(3, 15):
        with torch.no_grad():
            chance = (model.base(found[:, :n]).logits[0, -1] / 2.0).softmax(-1)
        assert chance[found[0, n]] >= 0.05 or chance.max() == chance[found[0, n]]


def test_several_returned_sequences(model: MTPModel) -> None:
    common = {"max_new_tokens": 8, "do_sample": True, "pad_token_id": 0, "custom_generate": model.custom_generate}
    found = model.base.generate(PROMPT, num_return_sequences=3, seed=1, **common)
    assert found.shape == (3, 11) and len({tuple(row) for row in found.tolist()}) == 3
    whole = model.base.generate(PROMPT, return_dict_in_generate=True, seed=1, **common)
    assert whole.sequences.equal(found[:1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 2}, "num_beams"),
        ({"output_scores": True, "return_dict_in_generate": True}, "output_scores"),
        ({"num_masks": 9}, "num_masks"),
        ({"inputs_embeds": torch.zeros(1, 3, 32).double()}, "inputs_embeds"),
    ],
)
def test_what_it_can_not_do(model: MTPModel, options: dict[str, Any], message: str) -> None:
    inputs = {} if "inputs_embeds" in options else {"input_ids": PROMPT}
    with pytest.raises(UsageError, match=message):
        model.base.generate(
            **inputs, **options, max_new_tokens=5, do_sample=False, pad_token_id=0, custom_generate=model.custom_generate
        )


def test_a_base_of_another_model(model: MTPModel) -> None:
    with pytest.raises(UsageError, match="another model"):
        tiny_model().base.generate(PROMPT, max_new_tokens=5, pad_token_id=0, custom_generate=model.custom_generate)


def from_folder(base: PreTrainedModel, folder: Path, **options: Any) -> Tensor:
    common = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0, "trust_remote_code": True}
    return base.generate(input_ids=PROMPT, custom_generate=str(folder), **{**common, **options})


def test_a_saved_folder(kept: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = AutoModelForCausalLM.from_pretrained(kept / "base")
    expected = base.generate(PROMPT, max_new_tokens=20, do_sample=False, pad_token_id=0)
    logits = base(PROMPT).logits
    folder = kept / "saved"
    sizes: list[int] = []
    base.get_decoder().register_forward_pre_hook(
        lambda _, args, given: sizes.append(0 if given.get("inputs_embeds") is None else given["inputs_embeds"].shape[1]),
        with_kwargs=True,
    )
    ways = (({"num_masks": 3}, 16), ({"num_masks": 1}, 4), ({"num_masks": 3, "decoding": "linear"}, 7))
    for options, most in (*ways, ({"decoding": "autoregressive"}, 3)):
        sizes.clear()
        assert from_folder(base, folder, mtp_model=str(folder), **options).equal(expected)
        assert max(sizes) == most  # drafts and masks were fed
    assert base(PROMPT).logits.equal(logits) and list(base.state_dict())  # the base is as it was, and no part of itself
    with pytest.raises(UsageError, match="mtp_model=FOLDER"):
        from_folder(base, folder)
    with pytest.raises(UsageError, match="another"):
        from_folder(base, folder, mtp_model="another")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    streamer = TextStreamer(tokenizer, skip_prompt=True)
    from_folder(base, folder, mtp_model=str(folder), streamer=streamer)
    assert capsys.readouterr().out == tokenizer.decode(expected[0, 3:]) + "\n"


@pytest.mark.slow
def test_a_process_that_knows_transformers_alone(kept: Path) -> None:
    code = (
        "import sys, torch\n"
        "sys.modules.update(lightning=None, pytorch_lightning=None)\n"
        "from transformers import AutoModelForCausalLM\n"
        f"base = AutoModelForCausalLM.from_pretrained({str(kept / 'base')!r})\n"
        f"folder, ids = {str(kept / 'saved')!r}, torch.tensor({PROMPT.tolist()})\n"
        "common = dict(max_new_tokens=20, do_sample=False, pad_token_id=0)\n"
        "expected = base.generate(ids, **common)\n"
        "out = base.generate(ids, custom_generate=folder, mtp_model=folder, trust_remote_code=True, **common)\n"
        "print(out.equal(expected), 'mtp_lightning' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["True", "True"], done.stderr
