# SPDX-License-Identifier: Apache-2.0
"""Drafts from a part of the vocabulary: those of the whole one with all else ruled out; and which part that is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hidden import fused
from tiny import VOCAB, greedy_text, tiny_model, token_row
from torch import Tensor, nn

from mtp_lightning.decoding.execution import decode_cache as decode_cache_module
from mtp_lightning.decoding.execution.decode_cache import decode_cache
from mtp_lightning.decoding.execution.step import Drafts, draft_block
from mtp_lightning.decoding.executor import draft_shortlist
from mtp_lightning.decoding.limits import resolve_auto
from mtp_lightning.decoding.loop import decode
from mtp_lightning.decoding.options import DecodingOptions
from mtp_lightning.decoding.shortlist import Shortlist, shortlist_size
from mtp_lightning.decoding.token_choice import TokenChoice
from mtp_lightning.errors import RunError
from mtp_lightning.model import MTPModel
from mtp_lightning.modeling.label_counts import COVERAGE, LABEL_COUNTS, LabelCounts, count_labels, parse_label_counts
from mtp_lightning.sampler_heads import GRUSamplerHead, MLPSamplerHead

LISTED = torch.tensor([2, 3, 11, 40, 95])
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "coupled": {"temperature": 1.3},
    "top": {"temperature": 0.8, "top_k": 4, "top_p": 0.8},
    "rejection": {"temperature": 1.3, "top_p": 0.9, "verification": "rejection"},
}


class RuledOut:
    """The whole unembedding with every other token ruled out: what a shortlist computes, the long way."""

    def __init__(self, model: MTPModel) -> None:
        self.whole = model.unembed
        self.vocab_size = self.whole.vocab_size

    def __call__(self, hidden: Tensor) -> Tensor:
        logits = self.whole(hidden)
        return torch.full_like(logits, float("-inf")).index_copy(-1, LISTED, logits.index_select(-1, LISTED))


@pytest.mark.parametrize(
    ("architecture", "way", "head"),
    [
        ("llama", "greedy", GRUSamplerHead),
        ("llama", "rejection", MLPSamplerHead),
        ("gemma3", "coupled", None),  # gemma3 caps its logits
        ("gemma3", "top", GRUSamplerHead),
    ],
)
def test_drafts_are_those_of_the_whole_vocabulary_with_the_rest_ruled_out(
    architecture: str, way: str, head: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(architecture, 4, sampler_head=head and head())
    model.unembed.scale = 0.7  # as Cohere and Granite have it
    assert (model.unembed.softcap is not None) == (architecture == "gemma3")
    hidden = torch.randn(3, 4, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def drafts(shortlist: Shortlist | None) -> Drafts:
        choice = TokenChoice(DecodingOptions(**WAYS[way]), [5, 6, 7], torch.device("cpu"))
        choice.shortlist, choice.return_draft_probs = shortlist, True
        with torch.inference_mode(), fused(model):
            return draft_block(model, hidden, torch.tensor([3, 50, 9]), torch.tensor([9, 9, 12]), choice, head is not None)

    found, free = drafts(Shortlist(model.unembed, LISTED)), drafts(None)
    monkeypatch.setattr(MTPModel, "unembed", RuledOut(model))
    expected = drafts(None)
    assert torch.equal(found.tokens, expected.tokens) and len(found.tokens.unique()) > 1
    assert found.probabilities is not None and expected.probabilities is not None
    # float64 sums of the same numbers, in products of other shapes.
    torch.testing.assert_close(found.probabilities, expected.probabilities, rtol=1e-9, atol=1e-9)
    assert not torch.equal(free.tokens, found.tokens)
    if way == "rejection":
        assert found.scores is not None and expected.scores is not None and found.scores.shape == (3, 4, VOCAB)
        torch.testing.assert_close(found.scores, expected.scores, rtol=1e-9, atol=1e-9)
        assert bool((found.scores.gather(-1, found.tokens[..., None]) > float("-inf")).all())
    else:
        assert found.scores is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_logits_of_the_listed_tokens(dtype: torch.dtype) -> None:
    """Also where the layer has a bias, where weights are packed, and under autocast."""
    model = tiny_model("llama", dtype=dtype)
    head: Any = model.base.get_output_embeddings()
    head.bias = nn.Parameter(torch.randn(VOCAB).to(dtype))
    shortlist, hidden = Shortlist(model.unembed, LISTED), torch.randn(2, 3, 32).to(dtype)
    bound = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.1}[dtype]  # sums of 32 products of about 1
    with torch.inference_mode():
        for rows in (hidden, hidden[:1, :1]):
            expected = model.unembed(rows).index_select(-1, LISTED)
            torch.testing.assert_close(shortlist(rows), expected, rtol=bound, atol=bound)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(shortlist(hidden), model.unembed(hidden).index_select(-1, LISTED))


def listed(model: MTPModel, size: int) -> Shortlist | None:
    with torch.inference_mode(), fused(model):
        return decode_cache(model).shortlist(model, size)


def test_a_shortlist_is_kept_until_counts_or_weights_change() -> None:
    model, hidden = tiny_model("llama", dtype=torch.float32), torch.randn(4, 32)
    first = listed(model, 6)
    assert first is not None and first.tokens.tolist() == list(range(6))  # nothing was counted: the first ids
    assert listed(model, 6) is first
    model.label_counts = LabelCounts(torch.zeros(VOCAB, dtype=torch.int64).index_fill_(0, torch.tensor([90, 4]), 5))
    second = listed(model, 3)
    assert second is not None and second.tokens.tolist() == [0, 4, 90]
    with torch.no_grad():
        model.base.get_output_embeddings().weight.data.mul_(-1.0)
    third = listed(model, 3)
    assert third is not None
    with torch.inference_mode():
        torch.testing.assert_close(third(hidden), -second(hidden))
    model.clear_decode_cache()
    assert decode_cache(model)._shortlist is None


def test_without_a_shortlist_drafts_are_of_the_whole_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    def shortlist(model: MTPModel, size: Any = 5) -> Shortlist | None:
        with torch.inference_mode(), fused(model):
            return draft_shortlist(model, DecodingOptions(draft_vocabulary=size))

    model, prompt = tiny_model("llama", 3, sampler_head=GRUSamplerHead()), token_row([6]).input_ids
    assert shortlist(model) is not None
    assert shortlist(model, "all") is shortlist(model, "auto") is shortlist(model, VOCAB) is None
    options = {"num_masks": 3, "max_new_tokens": 12}
    expected = list(decode(model, prompt, DecodingOptions(**options)))
    head: Any = model.base.get_output_embeddings()
    hook = head.register_forward_hook(lambda *_: None)  # as accelerate's: the weight may be elsewhere
    assert shortlist(model) is None
    assert list(decode(model, prompt, DecodingOptions(**options, draft_vocabulary=5))) == expected
    hook.remove()
    head.__class__ = type("Linear8bitLt", (nn.Linear,), {})
    assert shortlist(model) is None
    head.__class__ = nn.Linear
    monkeypatch.setattr(decode_cache_module, "MAX_COPY_BYTES", 5 * 32 * 8 - 1)
    assert shortlist(model) is None and shortlist(model, 4) is not None


@pytest.mark.parametrize("verification", ["coupled", "rejection"])
def test_auto_lists_what_had_nearly_all_labels(verification: str) -> None:
    model = tiny_model("llama", 3, sampler_head=GRUSamplerHead(), vocab_size=256)
    frequent = torch.arange(100, 150)
    model.label_counts = LabelCounts(torch.zeros(256, dtype=torch.int64).index_fill_(0, frequent, 1000))
    with torch.inference_mode(), fused(model):
        shortlist = draft_shortlist(model, DecodingOptions())
    assert shortlist is not None and shortlist.tokens.tolist() == [*range(14), *range(100, 150)]
    prompt = token_row([6]).input_ids
    expected = greedy_text(model.base, prompt, 12)
    for num_masks in (3, "auto"):
        out = model.generate(prompt[None], max_new_tokens=12, num_masks=num_masks)
        assert out.sequences[0, 6:].tolist() == expected
        list(decode(model, prompt, DecodingOptions(num_masks=num_masks, temperature=1.0, verification=verification, seed=1)))
    assert [*decode_cache(model).calibrations] == [(False, 64)]


# --- Which tokens --------------------------------------------------------------------------------------------------------


def test_labels_are_counted() -> None:
    counts = torch.tensor([0, 1, 0, 2])
    count_labels(counts, torch.tensor([[[3, -100], [1, 1]], [[-100, -100], [0, 3]]]))
    assert counts.tolist() == [1, 3, 0, 4]
    ordered = LabelCounts(torch.tensor([3, 0, 5, 3, 9]))
    assert ordered.order.tolist() == [4, 2, 0, 3, 1]
    assert [ordered.share(n) for n in (1, 2, 5)] == [9 / 20, 14 / 20, 1.0]


def test_the_default_size_has_nearly_all_labels() -> None:
    def zipf(total: float) -> LabelCounts:
        """The share of token r falls as 1 / r^2."""
        shares = 1 / torch.arange(1, 1001).double() ** 2
        return LabelCounts((total * shares / shares.sum()).long())

    many, few = zipf(1e9), zipf(2e3)
    assert many.default_size == 64 and many.share(20) > COVERAGE > many.share(19)
    assert few.default_size > 900  # most tokens have no label
    assert [shortlist_size(each, 1000, "auto") for each in (many, few, None)] == [64, 1000, 1000]
    assert shortlist_size(many, 128, "auto") == 64 and shortlist_size(many, 127, "auto") == 127  # half at most
    assert [shortlist_size(many, 1000, size) for size in ("all", 7, 4000)] == [1000, 7, 1000]


def test_evaluation_names_the_whole_vocabulary() -> None:
    model = tiny_model("llama", 3)
    for draft_vocabulary, resolved in (("auto", "all"), (9, 9)):
        found = resolve_auto(model, DecodingOptions(draft_vocabulary=draft_vocabulary))  # type: ignore[arg-type]
        assert (found.num_masks, found.draft_vocabulary) == (3, resolved)


@pytest.mark.parametrize("value", [torch.zeros(5), torch.tensor([0, 1, -1, 0, 0]), torch.zeros(1, 5).long()])
def test_damaged_counts_are_refused(value: Any) -> None:
    with pytest.raises(RunError, match=f"the file: {LABEL_COUNTS}"):
        parse_label_counts(value, 5, "the file")
    assert parse_label_counts(None, 5, "the file") is None
