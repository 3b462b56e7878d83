# SPDX-License-Identifier: Apache-2.0
"""Steps as graphs: the text is the same, graphs are shared by texts and die with what they read, Python has no part in them.

Most tests record the operations of a step and run the recording: that is what a CUDA graph does, without a GPU, and what is
compiled for a CPU. Whatever a recording has taken from the host would be the first text's in all others.
"""

from __future__ import annotations

import copy
import gc
import random
import shutil
import warnings
import weakref
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tiny import greedy_text, tiny_base, tiny_model, token_row
from torch import Tensor
from transformers import LogitsProcessorList, MinLengthLogitsProcessor

from mtp_lightning.decoding import executor, planner, proposer
from mtp_lightning.decoding.execution import step as decoding_step
from mtp_lightning.decoding.execution import step_graph
from mtp_lightning.decoding.execution.decode_cache import decode_cache, rounded_slots
from mtp_lightning.decoding.execution.step import Drafts
from mtp_lightning.decoding.execution.step_graph import StepGraph, recorded
from mtp_lightning.decoding.loop import decode, decode_rows
from mtp_lightning.decoding.options import DecodingOptions
from mtp_lightning.decoding.planning.budget import Budget
from mtp_lightning.decoding.planning.draft_plan import Plan
from mtp_lightning.decoding.planning.step_costs import StepCosts
from mtp_lightning.decoding.planning.text_lookup import LookupDraft
from mtp_lightning.decoding.row_cache import RowCache
from mtp_lightning.decoding.state import DecodeState
from mtp_lightning.model import MTPModel
from mtp_lightning.sampler_heads import GRUSamplerHead, MLPSamplerHead

LENGTHS, G = [9, 1, 14], 20
COPIES = {"lift_fresh", "lift_fresh_copy"}
"""Tensors made from numbers of the host: a CUDA graph can't hold them."""


@pytest.fixture(autouse=True)
def recordings(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Graphs that are recordings, made at a shape's first step."""
    found: list[Any] = []

    def record(step: step_graph.Step, inputs: Sequence[Tensor]) -> step_graph.Replay:
        graph = recorded(step, inputs)
        step_graph._compare(step, lambda: graph(*inputs), inputs)
        found.append(graph)
        return lambda: graph(*inputs)

    monkeypatch.setitem(step_graph.CAPTURES, "cpu", record)
    monkeypatch.setitem(executor.EAGER_RUNS, "cpu", 0)
    return found


@pytest.fixture(scope="module")
def models() -> dict[str, MTPModel]:
    return {}


def model_of(models: dict[str, MTPModel], architecture: str, head: str = "gru") -> MTPModel:
    key = f"{architecture} {head}"
    if key not in models:
        kinds: dict[str, Any] = {"gru": GRUSamplerHead, "mlp": MLPSamplerHead}
        models[key] = tiny_model(architecture, 4, kinds[head]())
    models[key].clear_decode_cache()
    return models[key]


def prompts(count: int = len(LENGTHS)) -> list[Tensor]:
    return [token_row([n], seed=50 + r).input_ids for r, n in enumerate(LENGTHS[:count])]


def texts(model: MTPModel, rows: list[Tensor], **options: Any) -> list[list[int]]:
    new: list[list[int]] = [[] for _ in rows]
    for steps in decode_rows(model, rows, DecodingOptions(max_new_tokens=G, **options)):
        for row, step, _ in steps:
            new[row] += step.tokens
    return new


def graphs_of(cache: RowCache) -> list[StepGraph]:
    return [each for each in cache.graphs.values() if isinstance(each, StepGraph)]


def scripted(monkeypatch: pytest.MonkeyPatch, rows: list[Tensor], answers: list[list[int]], wrong: int) -> None:
    """Drafts from a script that is right but for every ``wrong``-th position: made by the device, as graphs want it."""
    script = torch.zeros(len(rows), 64 + G, dtype=torch.int64)
    for r, (row, answer) in enumerate(zip(rows, answers, strict=True)):
        text = torch.tensor([*row.tolist(), *answer])
        script[r, : len(text)] = torch.where(torch.arange(len(text)) % wrong == r % wrong, (text + 1) % 97, text)

    def draft(model: MTPModel, hidden: Tensor, verified: Tensor, positions: Tensor, choice: Any, head: bool) -> Drafts:
        J = hidden.shape[1]
        at = (positions[:, None] + torch.arange(1, J + 1)).clamp(max=script.shape[1] - 1)
        tokens = script[: len(positions)].gather(1, at)
        return Drafts(tokens, None, torch.full(tokens.shape, 0.8) if choice.return_draft_probs else None)

    monkeypatch.setattr(decoding_step, "draft_block", draft)


@pytest.mark.parametrize(
    ("architecture", "kind"),
    [("llama", "linear"), ("gemma3", "quadratic"), ("mistral-window", "autoregressive"), ("qwen2", "quadratic")],
)
def test_same_text(
    architecture: str, kind: str, models: dict[str, MTPModel], monkeypatch: pytest.MonkeyPatch, recordings: list[Any]
) -> None:
    """Rows of a batch that keep different numbers of drafts and finish early, against transformers' own text."""
    model, rows = model_of(models, architecture), prompts()
    base = tiny_base(architecture)
    expected = [greedy_text(base, row, G + 6) for row in rows]
    stop = [expected[1][7]]
    cut = [text[:G][: next((i for i, token in enumerate(text[:G], 1) if token in stop), G)] for text in expected]
    assert len({len(text) for text in cut}) > 1
    scripted(monkeypatch, rows, expected, 3)
    options = {"decoding": kind, "num_masks": 3, "compile": True, "eos_token_id": stop, "seed": list(range(len(rows)))}
    assert texts(model, rows, **options) == cut
    assert recordings
    made = len(recordings)
    assert texts(model, rows, **options) == cut
    assert len(recordings) == made
    for graph in recordings:
        assert not COPIES & {getattr(node.target, "_opname", "") for node in graph.graph.nodes}


def test_experts_that_the_host_picks(models: dict[str, MTPModel], recordings: list[Any]) -> None:
    """transformers' eager experts are looped over as the router says: a recording would always take the same."""
    architecture = "qwen3_moe"
    model, rows = model_of(models, architecture), prompts(1)
    with pytest.warns(UserWarning, match="steps could not be compiled"):
        assert texts(model, rows, num_masks=2, compile=True) == [greedy_text(tiny_base(architecture), rows[0], G)]
    assert not recordings


@pytest.mark.parametrize(
    ("kind", "masks", "head", "listed"),
    [
        ("quadratic", 1, "gru", 9),
        ("quadratic", 4, "mlp", "all"),
        ("quadratic", "auto", "gru", "all"),
        ("linear", 4, "base", 9),
        ("linear", "auto", "mlp", 40),
    ],
)
def test_drafts_of_the_heads(
    kind: str, masks: Any, head: str, listed: Any, models: dict[str, MTPModel], recordings: list[Any]
) -> None:
    """The drafts too are those of steps that are no graphs, so what is kept is the same."""
    model = model_of(models, "gemma2", "gru" if head == "base" else head)
    options: dict[str, Any] = {"decoding": kind, "num_masks": masks, "sampler_head": head != "base", "max_new_tokens": G}
    options["draft_vocabulary"] = listed
    for row in prompts(2):
        found = [list(decode(model, row, DecodingOptions(**options, compile=each))) for each in (False, True)]
        assert [t for step in found[0] for t in step.tokens] == [t for step in found[1] for t in step.tokens]
        if masks != "auto":
            full = [[len(step.tokens) for step in steps[:-4]] for steps in found]  # the last ones may feed fewer masks
            common = min(map(len, full))
            assert full[0][:common] == full[1][:common]
    assert recordings


@pytest.mark.parametrize(("kind", "masks"), [("quadratic", 3), ("quadratic", "auto"), ("linear", 3), ("autoregressive", 1)])
def test_sampled_text(kind: str, masks: Any, models: dict[str, MTPModel], recordings: list[Any]) -> None:
    """Seeds are read anew by each text, and each temperature has graphs of its own."""
    model, rows = model_of(models, "qwen3-window"), prompts()
    for temperature, seed in ((0.7, 5), (0.7, 6), (1.0, 6)):
        options: dict[str, Any] = {"temperature": temperature, "top_p": 0.9, "seed": seed}
        expected = texts(model, rows, decoding="autoregressive", **options)
        assert texts(model, rows, decoding=kind, num_masks=masks, compile=True, **options) == expected
    assert recordings


@pytest.mark.parametrize(("kind", "temperature"), [("quadratic", 0.0), ("linear", 1.0)])
def test_drafts_that_the_text_offers(
    kind: str, temperature: float, models: dict[str, MTPModel], monkeypatch: pytest.MonkeyPatch, recordings: list[Any]
) -> None:
    """Found drafts are each row's own, also behind a row that has finished: of each as much is kept as is right."""
    model, rows = model_of(models, "gemma3"), prompts()
    options: dict[str, Any] = {"temperature": temperature, "seed": 3}
    expected = texts(model, rows, decoding="autoregressive", **options)
    stop = next(token for token in expected[1][5:] if token not in expected[0] + expected[1][:5] + expected[2])
    expected[1] = expected[1][: expected[1].index(stop) + 1]
    generator, planted, live = random.Random(0), dict[int, int](), set[int]()

    def propose(self: Any, state: DecodeState, plan: Plan, result: Any) -> None:
        planted.clear()
        for row in state.active:
            r, most = row.number, min(row.max_drafts, self.max_drafts)
            tokens = expected[r][row.length - len(rows[r]) :][: generator.randint(0, most)]
            row.lookup_draft = None
            if tokens:
                planted[r] = generator.randint(0, len(tokens))
                tokens[planted[r] :] = [(token + 1) % 97 for token in tokens[planted[r] :]]
                row.lookup_draft = LookupDraft(tokens, 3)

    def choose(self: Budget, room: int, limits: list[int], offers: list[LookupDraft | None]) -> Plan:
        for row, offer in zip(self.rows, offers, strict=True):
            row.chosen_lookup = offer
        live.add(len(self.rows))
        longest = max([0, *(len(row.chosen_lookup.tokens) for row in self.rows if row.chosen_lookup)])
        c, m = min(size for size in self.sizes if size >= longest), generator.choice([0, self.num_masks])
        return Plan(c, m, self.placements[-1])

    monkeypatch.setattr(Budget, "choose", choose)
    monkeypatch.setattr(proposer.NgramProposer, "propose", propose)
    monkeypatch.setattr(planner, "measure_step_costs", lambda *args: StepCosts((1, 81), (1.0, 3.0), 0.0, 0.0))
    new: list[list[int]] = [[] for _ in rows]
    options |= {"compile": True, "eos_token_id": stop, "max_new_tokens": G}
    verified = dict[int, int]()
    for steps in decode_rows(model, rows, DecodingOptions(kind, **options)):
        for r, step, _ in steps:
            if r in verified:
                assert len(step.tokens) == min(verified[r] + 1, len(expected[r]) - len(new[r]))
            new[r] += step.tokens
        verified = dict(planted)
    assert new == expected
    assert recordings and {3, 2} <= live


def test_graphs_are_shared_by_texts_of_one_size(models: dict[str, MTPModel]) -> None:
    model = copy.deepcopy(model_of(models, "llama"))
    for row in prompts():
        texts(model, [row], num_masks=2, compile=True)
    (cache,) = decode_cache(model)._caches.values()
    assert cache.capacity == rounded_slots(64) == 256
    made = graphs_of(cache)
    assert len(made) == 2  # with drafts, and the step after a prompt of one token, which has none
    texts(model, prompts(2), num_masks=2, compile=True)
    assert len(decode_cache(model)._caches) == 2
    model.clear_decode_cache()
    assert not decode_cache(model)._caches


def test_changed_weights_make_graphs_anew(models: dict[str, MTPModel]) -> None:
    model, row = copy.deepcopy(model_of(models, "llama")), prompts(1)[0]
    before = texts(model, [row], num_masks=2, compile=True)
    assert texts(model, [row], num_masks=2, compile=True) == before
    with torch.no_grad():
        for weight in model.base.parameters():
            if weight.ndim == 2:
                weight.mul_(-0.7)
    after = texts(model, [row], decoding="autoregressive")
    assert after != before
    assert texts(model, [row], num_masks=2, compile=True) == after


def test_another_shortlist_lets_go_of_the_one_before(models: dict[str, MTPModel]) -> None:
    """And of the graphs that read it."""
    model, row = copy.deepcopy(model_of(models, "llama")), prompts(1)[0]
    lists = weakref.WeakSet[Any]()
    for size in (5, 7, 5, 7):
        texts(model, [row], num_masks=2, compile=True, draft_vocabulary=size)
        lists.add(decode_cache(model)._shortlist[2])  # type: ignore[index]
        gc.collect()
        assert len(lists) == 1


def test_a_replaced_weight_and_a_hook_are_seen(models: dict[str, MTPModel], recordings: list[Any]) -> None:
    model, row = copy.deepcopy(model_of(models, "llama")), prompts(1)[0]
    before = texts(model, [row], num_masks=2, compile=True)
    norm: Any = model.base.get_decoder().norm
    norm.weight = torch.nn.Parameter(norm.weight.detach() * torch.linspace(-1, 2, len(norm.weight)))
    after = texts(model, [row], decoding="autoregressive")
    assert after != before
    assert texts(model, [row], num_masks=2, compile=True) == after
    made = len(recordings)
    norm.register_forward_hook(lambda module, args, out: out.flip(-1))
    hooked = texts(model, [row], decoding="autoregressive")
    assert hooked != after
    assert texts(model, [row], num_masks=2, compile=True) == hooked
    assert len(recordings) == made


def test_autocast_is_left_alone(models: dict[str, MTPModel], recordings: list[Any]) -> None:
    model, row = tiny_model("llama", 2, GRUSamplerHead(), dtype=torch.float32), prompts(1)[0]
    plain = texts(model, [row], num_masks=2)
    assert texts(model, [row], num_masks=2, compile=True) == plain
    made = len(recordings)
    with torch.autocast("cpu", torch.bfloat16):
        cast = texts(model, [row], num_masks=2)
        assert texts(model, [row], num_masks=2, compile=True) == cast
    assert len(recordings) == made
    assert texts(model, [row], num_masks=2, compile=True) == plain


def test_a_nan_of_an_earlier_text_is_gone(models: dict[str, MTPModel]) -> None:
    """A graph reads all slots, and nothing times NaN is NaN."""
    model, row = copy.deepcopy(model_of(models, "llama")), prompts(1)[0]
    expected = texts(model, [row], num_masks=2, compile=True)
    (cache,) = decode_cache(model)._caches.values()
    with torch.inference_mode():
        for layer in cache.layers:
            layer.keys[:, :, 30:] = layer.values[:, :, 30:] = torch.nan
    assert texts(model, [row], num_masks=2, compile=True) == expected


def test_a_cache_that_was_another_models(models: dict[str, MTPModel]) -> None:
    one, other = (tiny_model("llama", 2, GRUSamplerHead(), seed=seed) for seed in (0, 3))
    row, options = prompts(1)[0], DecodingOptions(num_masks=2, max_new_tokens=G, compile=True)
    cache = RowCache(one.base, 1)
    for seed, model in ((0, one), (3, other), (0, one)):
        cache.lengths = [0]
        said = [token for step in decode(model, row, options, cache) for token in step.tokens]
        assert said == greedy_text(tiny_base("llama", seed=seed), row, G)


def test_a_kept_cache_keeps_its_graphs(models: dict[str, MTPModel]) -> None:
    """As a chat has it: the cache goes on from turn to turn."""
    model, row = model_of(models, "gemma3"), prompts(1)[0]
    cache, options = RowCache(model.base, 1), DecodingOptions(num_masks=2, max_new_tokens=8, compile=True)
    held: list[list[StepGraph]] = []
    for turn in range(3):
        said = [token for step in decode(model, row, options, cache) for token in step.tokens]
        assert said == greedy_text(tiny_base("gemma3"), row, 8)
        row = torch.cat([row, torch.tensor(said), token_row([2], seed=turn).input_ids])
        held.append(graphs_of(cache))
    assert held[0]
    assert held[0] == held[1] == held[2]
    cache.reserve(cache.capacity + 1, 10**6)  # other buffers
    assert not cache.graphs


def test_two_readers_have_their_own_caches(models: dict[str, MTPModel]) -> None:
    model, (one, other) = model_of(models, "llama"), prompts(2)
    expected = [greedy_text(tiny_base("llama"), row, G) for row in (one, other)]
    options = DecodingOptions(num_masks=2, max_new_tokens=G, compile=True)
    found: list[list[int]] = [[], []]
    readers = [decode(model, row, options) for row in (one, other)]
    while any(len(tokens) < G for tokens in found):
        for tokens, reader in zip(found, readers, strict=True):
            step = next(reader, None)
            tokens += step.tokens if step else []
    assert found == expected


def test_steps_that_the_host_looks_into_are_left_as_they_are(models: dict[str, MTPModel], recordings: list[Any]) -> None:
    model, rows = model_of(models, "llama"), prompts(2)
    processor = LogitsProcessorList([MinLengthLogitsProcessor(3, 0)])
    for options in (
        {"repetition_penalty": 1.3},
        {"logits_processor": processor},
        {"temperature": 1.0, "verification": "rejection", "seed": 1},
    ):
        plain = texts(model, rows, num_masks=2, **options)
        assert texts(model, rows, num_masks=2, compile=True, **options) == plain
    assert not recordings


def test_a_compiler_that_fails_is_said_once(models: dict[str, MTPModel], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(step: Any, inputs: Any) -> Any:
        raise RuntimeError("no compiler here\nand a long story")

    monkeypatch.setitem(step_graph.CAPTURES, "cpu", fail)
    model, row = copy.deepcopy(model_of(models, "llama")), prompts(1)[0]
    expected = [greedy_text(tiny_base("llama"), row, G)]
    with pytest.warns(UserWarning, match="could not be compiled, decoding continues without: no compiler here$") as said:
        assert texts(model, [row], num_masks=2, compile=True) == expected
    assert len(said) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert texts(model, [row], num_masks=2, compile=True) == expected


def test_a_recording_that_does_not_follow_its_input_is_refused() -> None:
    """What a step reads on the host is in the recording for good."""
    tokens = torch.zeros(1, 3, dtype=torch.int64)

    def step(tokens: Tensor) -> tuple[Tensor, ...]:
        return (tokens + sum(tokens[0].numpy().tolist()),)

    with pytest.raises(RuntimeError, match="decides on the host"):
        step_graph.compiled(step, [tokens])


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_compiled(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the compiler itself, and in float32 with weights that are laid out beforehand."""
    monkeypatch.setitem(step_graph.CAPTURES, "cpu", step_graph.compiled)
    model = tiny_model("llama", 2, GRUSamplerHead(), dtype=dtype, num_hidden_layers=1)
    rows = prompts(2)
    expected = [greedy_text(tiny_base("llama", dtype, num_hidden_layers=1), row, G) for row in rows]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="steps could not be compiled")
        for row, text in zip(rows, expected, strict=True):
            assert texts(model, [row], num_masks=2, compile=True) == [text]
    (cache,) = decode_cache(model)._caches.values()
    assert graphs_of(cache)
