# SPDX-License-Identifier: Apache-2.0
"""Drafts from a part of the vocabulary: those of the whole one with all else ruled out; and which part that is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hidden import fused
from tiny import VOCAB, greedy_text, tiny_model, token_row
from torch import Tensor, nn

from mtp_lightning.decoding import planner
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
from mtp_lightning.modeling.network import MTPNetwork
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


@pytest.mark.parametrize("head", [None, MLPSamplerHead, GRUSamplerHead])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("architecture", ["llama", "gemma3"])  # the second caps its logits
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


def test_a_shortlist_is_made_once_and_anew_when_something_changed() -> None:
    model = tiny_model("llama", dtype=torch.float32)
    first = listed(model, 6)
    assert first is not None and first.tokens.tolist() == list(range(6))  # nothing was counted: the first ids
    assert listed(model, 6) is first
    counts = torch.zeros(VOCAB, dtype=torch.int64)
    counts[[90, 4, 33]] = torch.tensor([5, 5, 9])
    model.label_counts = LabelCounts(counts)
    second, third = listed(model, 6), listed(model, 2)
    assert second is not None and second.tokens.tolist() == [0, 1, 2, 4, 33, 90]
    assert third is not None and third.tokens.tolist() == [4, 33]
    with torch.no_grad():
        model.base.get_output_embeddings().weight.data.mul_(-1.0)
    fourth, hidden = listed(model, 2), torch.randn(4, 32)
    assert fourth is not None
    with torch.inference_mode():
        torch.testing.assert_close(fourth(hidden), -third(hidden))
    model.clear_decode_cache()
    assert decode_cache(model)._shortlist is None
    model.double()
    fifth = listed(model, 2)
    assert fifth is not None and fifth(hidden.double()).dtype == torch.float64


def test_where_there_can_be_none_drafts_are_of_the_whole_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    def made(model: MTPModel, asked: Any = 5) -> Shortlist | None:
        with torch.inference_mode(), fused(model):
            return draft_shortlist(model, DecodingOptions(draft_vocabulary=asked))

    model = tiny_model("llama", 3, sampler_head=GRUSamplerHead())
    assert made(model) is not None and made(model, "all") is made(model, "auto") is made(model, VOCAB) is None
    prompt = token_row([6]).input_ids
    options = {"num_masks": 3, "max_new_tokens": 12}
    whole = list(decode(model, prompt, DecodingOptions(**options)))
    head: Any = model.base.get_output_embeddings()
    hook = head.register_forward_hook(lambda *_: None)  # as accelerate's: the weight may be elsewhere
    assert made(model) is None
    assert list(decode(model, prompt, DecodingOptions(**options, draft_vocabulary=5))) == whole
    hook.remove()
    head.__class__ = type("Linear8bitLt", (nn.Linear,), {})
    assert made(model) is None
    head.__class__ = nn.Linear
    monkeypatch.setattr(decode_cache_module, "MAX_COPY_BYTES", 5 * 32 * 8 - 1)
    assert made(model) is None and made(model, 4) is not None
    monkeypatch.undo()
    monkeypatch.setattr(MTPNetwork, "is_sharded", True)
    assert made(model) is None


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


def test_costs_are_those_of_the_shortlist_that_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    model, used = tiny_model("llama", 3, sampler_head=GRUSamplerHead()), []
    original = planner.measure_step_costs
    monkeypatch.setattr(
        planner, "measure_step_costs", lambda m, choice, usual: used.append(choice.shortlist) or original(m, choice, usual)
    )
    for asked in (5, "all", 5, 7):
        list(decode(model, token_row([4]).input_ids, DecodingOptions(max_new_tokens=4, draft_vocabulary=asked)))
    assert [None if each is None else len(each.tokens) for each in used] == [5, None, 7]
    assert [*decode_cache(model).calibrations] == [(False, 5), (False, VOCAB), (False, 7)]


def test_a_copy_has_the_counts_and_makes_its_own_list() -> None:
    import copy

    model = tiny_model("llama", 3)
    model.label_counts = LabelCounts(torch.arange(VOCAB))
    twin = copy.deepcopy(model)
    assert twin.label_counts is not None and twin.label_counts.counts.equal(torch.arange(VOCAB))
    mine, its = listed(model, 3), listed(twin, 3)
    assert mine is not None and its is not None and mine is not its and mine.tokens.equal(its.tokens)


# --- Which tokens --------------------------------------------------------------------------------------------------------


def test_labels_are_counted() -> None:
    counts = torch.tensor([0, 1, 0, 2])
    count_labels(counts, torch.tensor([[[3, -100], [1, 1]], [[-100, -100], [0, 3]]]))
    assert counts.tolist() == [1, 3, 0, 4]
    many = torch.randint(-1, 50, (4, 9, 8), generator=torch.Generator().manual_seed(0))
    found = torch.zeros(50, dtype=torch.int64)
    for each in many:
        count_labels(found, each)
    assert found.tolist() == many[many >= 0].bincount(minlength=50).tolist()


def test_the_most_frequent_tokens_and_their_share() -> None:
    counts = LabelCounts(torch.tensor([3, 0, 5, 3, 9]))
    assert counts.order.tolist() == [4, 2, 0, 3, 1]
    assert [counts.share(n) for n in (1, 2, 5)] == [9 / 20, 14 / 20, 1.0]


def test_the_usual_size_has_nearly_all_labels() -> None:
    def steep(total: float) -> LabelCounts:
        """Zipf's law: the share of token r falls as 1 / r^2."""
        shares = 1 / torch.arange(1, 1001).double() ** 2
        return LabelCounts((total * shares / shares.sum()).long())

    long = steep(1e9)
    assert long.default_size == 64 and long.share(20) > COVERAGE > long.share(19)
    middle = steep(2e4)  # a label more for each of 1000 tokens is 5 % of all
    assert middle.default_size == 384
    # Slower: token by token, from the most frequent one.
    seen = sorted(((n + 1, -i) for i, n in enumerate(middle.counts.tolist())), reverse=True)
    reached, needed = 0, 0
    while reached < COVERAGE * sum(n for n, _ in seen):
        reached, needed = reached + seen[needed][0], needed + 1
    assert middle.default_size == -(-needed // 64) * 64
    short = steep(2e3)  # has met most of it never
    assert short.default_size > 900
    assert [shortlist_size(each, 1000, "auto") for each in (long, short, None)] == [64, 1000, 1000]
    assert shortlist_size(middle, 768, "auto") == 384 and shortlist_size(middle, 767, "auto") == 767  # a half at most
    assert [shortlist_size(long, 1000, asked) for asked in ("all", 7, 4000)] == [1000, 7, 1000]


def test_evaluation_names_the_whole_vocabulary() -> None:
    model = tiny_model("llama", 3)
    for asked, named in (("auto", "all"), ("all", "all"), (9, 9)):
        found = resolve_auto(model, DecodingOptions(draft_vocabulary=asked))  # type: ignore[arg-type]
        assert (found.num_masks, found.draft_vocabulary) == (3, named)


@pytest.mark.parametrize(
    "value", [torch.zeros(5), torch.tensor([0, 1, -1, 0, 0]), torch.zeros(1, 5).long(), [1, 2, 3, 4, 5]]
)
def test_damaged_counts_are_refused(value: Any) -> None:
    with pytest.raises(RunError, match=f"the file: {LABEL_COUNTS}"):
        parse_label_counts(value, 5, "the file")
    assert parse_label_counts(None, 5, "the file") is None
