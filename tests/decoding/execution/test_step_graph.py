# SPDX-License-Identifier: Apache-2.0
"""Steps as graphs: the text is the same, graphs are shared by texts and die with what they read, Python has no part in them.

Most tests record the operations of a step and run the recording: that is what a CUDA graph does, without a GPU, and what is
compiled for a CPU. Whatever a recording has taken from the host would be the first text's in all others.
"""

from __future__ import annotations

import copy
import functools
import shutil
import warnings
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hidden import join_layers
from random_plans import use_random_plans
from tiny import greedy_text, tiny_base, tiny_model, token_row
from torch import Tensor
from transformers import LogitsProcessorList, MinLengthLogitsProcessor

from mtp_lightning.decoding import compiled_executor
from mtp_lightning.decoding.execution import step_graph
from mtp_lightning.decoding.execution.decode_cache import decode_cache, rounded_slots
from mtp_lightning.decoding.execution.step_graph import StepGraph, recorded
from mtp_lightning.decoding.loop import decode, decode_rows
from mtp_lightning.decoding.options import DecodingOptions
from mtp_lightning.decoding.row_cache import RowCache
from mtp_lightning.model import MTPModel
from mtp_lightning.sampler_heads import GRUSamplerHead, MarkovSamplerHead, MLPSamplerHead

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
    monkeypatch.setitem(compiled_executor.EAGER_RUNS, "cpu", 0)
    return found


@functools.cache
def shared_model(architecture: str, head: str = "gru") -> MTPModel:
    """One model for many tests that only read it."""
    if head == "noise":
        return tiny_model(architecture, 4, mask_tokens="noise")
    heads = {"gru": GRUSamplerHead, "mlp": MLPSamplerHead, "markov": MarkovSamplerHead}
    return tiny_model(architecture, 4, heads[head]())


def model_of(architecture: str, head: str = "gru") -> MTPModel:
    """A shared model without graphs of earlier tests."""
    model = shared_model(architecture, head)
    model.clear_decode_cache()
    return model


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


@pytest.mark.parametrize(
    ("architecture", "kind"), [("llama", "linear"), ("gemma3", "quadratic"), ("mistral-window", "autoregressive")]
)
def test_same_text(architecture: str, kind: str, recordings: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that finish early, against transformers' own text, layers joined; a second call records nothing."""
    join_layers(monkeypatch)
    model, base, rows = model_of(architecture), tiny_base(architecture), prompts()
    stop = greedy_text(base, rows[1], G)[7]
    expected = [greedy_text(base, row, G, eos_token_id=stop) for row in rows]
    assert len({len(text) for text in expected}) > 1
    options = {"decoding": kind, "num_masks": 3, "compile": True, "eos_token_id": stop}
    assert texts(model, rows, **options) == expected
    num_graphs = len(recordings)
    assert texts(model, rows, **options) == expected
    assert len(recordings) == num_graphs > 0
    for graph in recordings:
        assert not COPIES & {getattr(node.target, "_opname", "") for node in graph.graph.nodes}


def test_experts_that_the_host_picks(recordings: list[Any]) -> None:
    """transformers' eager experts are looped over as the router says: a recording would always take the same."""
    model, rows = model_of("qwen3_moe"), prompts(1)
    with pytest.warns(UserWarning, match="steps could not be compiled"):
        assert texts(model, rows, num_masks=2, compile=True) == [greedy_text(tiny_base("qwen3_moe"), rows[0], G)]
    assert not recordings


@pytest.mark.parametrize(
    ("kind", "masks", "head", "options"),
    [
        ("quadratic", 4, "gru", {}),
        ("quadratic", 3, "noise", {}),
        ("linear", 3, "markov", {"temperature": 1.0, "top_p": 0.9, "seed": 6}),
        pytest.param("quadratic", "auto", "mlp", {"draft_candidates": 40}, marks=pytest.mark.slow),
        pytest.param("linear", 4, "gru", {"draft_candidates": 9, "sampler_head": False}, marks=pytest.mark.slow),
        pytest.param("quadratic", "auto", "gru", {"temperature": 0.7, "top_p": 0.9, "seed": 5}, marks=pytest.mark.slow),
    ],
)
def test_compiled_steps_are_the_eager_ones(
    kind: str, masks: Any, head: str, options: dict[str, Any], recordings: list[Any]
) -> None:
    """The text of several rows, and of one row the drafts too."""
    model, rows, options = model_of("gemma2", head), prompts(), {"decoding": kind, "num_masks": masks, **options}
    assert texts(model, rows, compile=True, **options) == texts(model, rows, **options)
    eager, graphed = (
        list(decode(model, rows[0], DecodingOptions(max_new_tokens=G, compile=c, **options))) for c in (False, True)
    )
    if masks != "auto":
        full = len(eager) - 4  # the last steps may feed fewer masks
        assert [step.tokens for step in eager[:full]] == [step.tokens for step in graphed[:full]]
    assert recordings


@pytest.mark.parametrize(("kind", "temperature"), [("quadratic", 0.0), pytest.param("linear", 1.0, marks=pytest.mark.slow)])
def test_any_plan_and_lookup_drafts(
    kind: str, temperature: float, monkeypatch: pytest.MonkeyPatch, recordings: list[Any]
) -> None:
    """Each row verifies its own lookup drafts, also after another row has finished."""
    model, rows = model_of("gemma3"), prompts()
    options: dict[str, Any] = {"temperature": temperature, "seed": 3}
    expected = texts(model, rows, decoding="autoregressive", **options)
    stop = next(token for token in expected[1][5:] if token not in expected[0] + expected[1][:5] + expected[2])
    expected[1] = expected[1][: expected[1].index(stop) + 1]
    plans = use_random_plans(monkeypatch, 0)
    assert texts(model, rows, decoding=kind, compile=True, eos_token_id=stop, **options) == expected
    assert recordings and len(set(plans)) > 5


def test_graphs_are_shared_by_texts_of_one_size() -> None:
    model = copy.deepcopy(model_of("llama"))
    for row in prompts():
        texts(model, [row], num_masks=2, compile=True)
    (cache,) = decode_cache(model)._caches.values()
    assert cache.capacity == rounded_slots(64) == 256
    assert len(graphs_of(cache)) == 2  # with drafts, and the step after a prompt of one token, which has none
    texts(model, prompts(2), num_masks=2, compile=True)
    assert len(decode_cache(model)._caches) == 2
    model.clear_decode_cache()
    assert not decode_cache(model)._caches


def test_changed_weights_and_hooks_are_noticed(recordings: list[Any]) -> None:
    model, row = copy.deepcopy(model_of("llama")), prompts(1)[0]
    norm: Any = model.base.get_decoder().norm

    @torch.no_grad()
    def change_in_place() -> None:
        for weight in model.base.parameters():
            if weight.ndim == 2:
                weight.mul_(-0.7)

    def replace() -> None:
        norm.weight = torch.nn.Parameter(norm.weight.detach() * torch.linspace(-1, 2, len(norm.weight)))

    before = texts(model, [row], num_masks=2, compile=True)
    for change in (change_in_place, replace):
        change()
        after = texts(model, [row], decoding="autoregressive")
        assert texts(model, [row], num_masks=2, compile=True) == after != before
        before = after
    made = len(recordings)
    norm.register_forward_hook(lambda module, args, out: out.flip(-1))
    hooked = texts(model, [row], decoding="autoregressive")
    assert texts(model, [row], num_masks=2, compile=True) == hooked != before
    assert len(recordings) == made


def test_autocast_is_left_alone(recordings: list[Any]) -> None:
    model, row = tiny_model("llama", 2, GRUSamplerHead(), dtype=torch.float32), prompts(1)[0]
    plain = texts(model, [row], num_masks=2)
    assert texts(model, [row], num_masks=2, compile=True) == plain
    made = len(recordings)
    with torch.autocast("cpu", torch.bfloat16):
        cast = texts(model, [row], num_masks=2)
        assert texts(model, [row], num_masks=2, compile=True) == cast
    assert len(recordings) == made
    assert texts(model, [row], num_masks=2, compile=True) == plain


def test_a_nan_of_an_earlier_text_is_gone() -> None:
    """A graph reads all slots, and nothing times NaN is NaN."""
    model, row = copy.deepcopy(model_of("llama")), prompts(1)[0]
    expected = texts(model, [row], num_masks=2, compile=True)
    (cache,) = decode_cache(model)._caches.values()
    with torch.inference_mode():
        for layer in cache.layers:
            layer.keys[:, :, 30:] = layer.values[:, :, 30:] = torch.nan
    assert texts(model, [row], num_masks=2, compile=True) == expected


def test_two_readers_have_their_own_caches() -> None:
    model, (one, other) = model_of("llama"), prompts(2)
    expected = [greedy_text(tiny_base("llama"), row, G) for row in (one, other)]
    options = DecodingOptions(num_masks=2, max_new_tokens=G, compile=True)
    found: list[list[int]] = [[], []]
    readers = [decode(model, row, options) for row in (one, other)]
    while any(len(tokens) < G for tokens in found):
        for tokens, reader in zip(found, readers, strict=True):
            step = next(reader, None)
            tokens += step.tokens if step else []
    assert found == expected


def test_steps_that_the_host_looks_into_are_left_as_they_are(recordings: list[Any]) -> None:
    model, rows = model_of("llama"), prompts(2)
    processor = LogitsProcessorList([MinLengthLogitsProcessor(3, 0)])
    for options in (
        {"logits_processor": processor},
        {"temperature": 1.0, "verification": "rejection", "seed": 1},
    ):
        plain = texts(model, rows, num_masks=2, **options)
        assert texts(model, rows, num_masks=2, compile=True, **options) == plain
    assert not recordings


def test_a_compiler_that_fails_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(step: Any, inputs: Any) -> Any:
        raise RuntimeError("no compiler here\nand a long story")

    monkeypatch.setitem(step_graph.CAPTURES, "cpu", fail)
    model, row = copy.deepcopy(model_of("llama")), prompts(1)[0]
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
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.float64, marks=pytest.mark.slow)])
def test_compiled(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the compiler itself; float32 weights are packed."""
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
