# SPDX-License-Identifier: Apache-2.0
"""A batch is its rows alone, token for token; the cache grows, is kept between calls, and costs what it holds."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from injected_drafts import RUNS, InjectedDrafts, K, expected_steps, shared_model
from tiny import CONTEXT, greedy_text, tiny_base, tiny_model, token_row
from torch import Tensor

from mtp_lightning.decoding import row_cache
from mtp_lightning.decoding.loop import decode, decode_rows
from mtp_lightning.decoding.options import DecodingOptions
from mtp_lightning.decoding.packed_linear import few_rows_differ, has_matrix_units
from mtp_lightning.decoding.row_cache import RowCache
from mtp_lightning.model import MTPModel
from mtp_lightning.sampler_heads import GRUSamplerHead

LENGTHS = [9, 1, 14, 4, 9, 7]
G = 20


def prompts(count: int = len(LENGTHS), seed: int = 50) -> list[Tensor]:
    return [token_row([n], seed=seed + r).input_ids for r, n in enumerate((LENGTHS * 2)[:count])]


def together(model: MTPModel, rows: list[Tensor], **options: Any) -> tuple[list[list[int]], list[list[int]], list[str]]:
    """Tokens, drafts kept in each step, and finish reasons of each row."""
    tokens: list[list[int]] = [[] for _ in rows]
    kept: list[list[int]] = [[] for _ in rows]
    reasons = [""] * len(rows)
    for steps in decode_rows(model, rows, DecodingOptions(**options)):
        for row, step, reason in steps:
            tokens[row] += step.tokens
            kept[row].append(len(step.tokens) - 1)
            reasons[row] = reason or ""
    return tokens, kept, reasons


def cut(text: list[int], stop: list[int]) -> list[int]:
    """A text up to its first end token."""
    return text[: next((i for i, token in enumerate(text, 1) if token in stop), len(text))]


@pytest.mark.parametrize(
    ("architecture", "kind"),
    [("gemma3", "quadratic"), ("qwen3_moe", "quadratic"), ("llama", "linear"), ("llama", "autoregressive")],
)
def test_rows_that_keep_different_numbers_and_finish_early(
    architecture: str, kind: str, inject: Callable[..., InjectedDrafts]
) -> None:
    """Greedy, against transformers' own text; drafts are injected, so that every row keeps other numbers."""
    model, base, rows = shared_model(architecture), tiny_base(architecture), prompts()
    texts = [greedy_text(base, row, G + K + 2) for row in rows]
    run: Callable[[int], int] = lambda at: (at * 5) % (K + 1)  # noqa: E731
    inject(model, [[*row.tolist(), *text] for row, text in zip(rows, texts, strict=True)], run)
    stop = [texts[0][5], texts[3][0], texts[5][11]]
    options = {"decoding": kind, "num_masks": 5, "max_new_tokens": G, "eos_token_id": stop, "seed": list(range(len(rows)))}
    tokens, kept, reasons = together(model, rows, **options)
    expected = [cut(text[:G], stop) for text in texts]
    assert tokens == expected
    assert reasons == ["stop" if text[-1] in stop else "length" for text in expected]
    assert len({len(text) for text in expected}) > 3
    for r, row in enumerate(rows):  # and the very steps that it takes alone
        alone = together(model, [row], **{**options, "seed": [r]})
        assert (tokens[r], kept[r], reasons[r]) == (alone[0][0], alone[1][0], alone[2][0])
        if reasons[r] == "length":
            assert kept[r] == expected_steps(run, 0 if kind == "autoregressive" else 5, kind, G, len(row))


@pytest.mark.parametrize(("architecture", "kind"), [("gemma3", "quadratic"), ("qwen3_moe", "linear")])
def test_sampled_batches_are_their_rows(architecture: str, kind: str) -> None:
    model, rows = shared_model(architecture, "gru"), prompts(10)
    options: dict[str, Any] = {"temperature": 0.9, "top_p": 0.95, "max_new_tokens": 8, "num_masks": 3}
    seeds = list(range(100, 110))
    plain, _, _ = together(model, rows, **options, decoding="autoregressive", seed=seeds)
    stop = [plain[4][2], plain[9][5]]
    expected = [cut(text, stop) for text in plain]
    assert together(model, rows, **options, decoding=kind, seed=seeds, eos_token_id=stop)[0] == expected
    for r in (4, 9):
        alone, _, _ = together(model, [rows[r]], **options, decoding=kind, seed=seeds[r], eos_token_id=stop)
        assert alone == [expected[r]]


@pytest.mark.parametrize(("kernel", "kind"), [("sdpa", "linear"), ("eager", "quadratic"), ("flex_attention", "quadratic")])
def test_attention_kernels(kernel: str, kind: str, inject: Callable[..., InjectedDrafts]) -> None:
    model, base, rows = tiny_model("gemma3", 3, attn_implementation=kernel), tiny_base("gemma3"), prompts(5)
    texts = [greedy_text(base, row, G + 5) for row in rows]
    inject(model, [[*row.tolist(), *text] for row, text in zip(rows, texts, strict=True)], RUNS["sometimes"])
    found, _, _ = together(model, rows, decoding=kind, max_new_tokens=G, seed=list(range(5)), num_masks=3)
    assert found == [text[:G] for text in texts]
    assert model.base.config._attn_implementation == kernel  # FlexAttention is replaced while decoding only


@pytest.mark.parametrize("kind", ["quadratic", "linear"])
def test_rows_near_the_whole_context(kind: str, inject: Callable[..., InjectedDrafts]) -> None:
    """One row's context ends while others go on: no position past it is fed."""
    model, base = shared_model("mistral-window"), tiny_base("mistral-window")
    rows = [token_row([n], seed=n).input_ids for n in (CONTEXT - 1, CONTEXT - 4, 30, CONTEXT - 9)]
    texts = [greedy_text(base, row, min(G, CONTEXT - len(row))) for row in rows]
    drafts = inject(model, [[*row.tolist(), *text] for row, text in zip(rows, texts, strict=True)], RUNS["always"])
    assert together(model, rows, decoding=kind, num_masks=5, max_new_tokens=G, seed=list(range(4)))[0] == texts
    assert all(int(step.position_ids.max()) < CONTEXT for step in drafts.steps)


@pytest.mark.parametrize("kind", ["quadratic", "autoregressive"])
def test_a_growing_cache_keeps_its_rows(
    kind: str, inject: Callable[..., InjectedDrafts], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_cache, "CHUNK", 3)
    model, base, rows = shared_model("gemma3"), tiny_base("gemma3"), prompts(4)
    texts = [greedy_text(base, row, 33) for row in rows]
    inject(model, [[*row.tolist(), *text] for row, text in zip(rows, texts, strict=True)], RUNS["sometimes"])
    found, _, _ = together(model, rows, decoding=kind, num_masks=2, max_new_tokens=30, seed=list(range(4)))
    assert found == [text[:30] for text in texts]


# --- A cache that is kept -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "kind"), [("gemma3", "quadratic"), ("mistral-window", "linear"), ("llama", "autoregressive")]
)
def test_a_kept_cache_goes_on_from_the_common_beginning(architecture: str, kind: str) -> None:
    model, base = tiny_model(architecture, 3, sampler_head=GRUSamplerHead()), tiny_base(architecture)
    fed: list[int] = []
    model.register_forward_pre_hook(lambda _, args: fed.append(args[0].tokens.shape[1]))
    cache, options = RowCache(model.base, 1), DecodingOptions(kind, 3, max_new_tokens=9)

    def say(prompt: list[int], num_tokens: int = 9) -> list[int]:
        fed.clear()
        found: list[int] = []
        for step in decode(model, torch.tensor(prompt), options, cache):
            found += step.tokens
            if len(found) >= num_tokens:
                break  # a reader that stops early
        assert found == greedy_text(base, torch.tensor(prompt), 9)[: len(found)]
        return found

    first = token_row([8], seed=1).input_ids.tolist()
    answer = say(first)
    assert fed[0] == 8
    history = [*first, *answer, 4, 5, 6]
    answer = say(history, 4)
    assert fed[0] == 4  # the last token said was not fed before
    history += [*answer, 7]
    say(history)
    assert fed[0] == 2
    say(history)  # the same once more: one token has to be fed
    assert fed[0] == 1
    say([*history[:6], 90, 91, *history[6:12]])  # another history
    assert fed[0] == 8
    say([history[0] + 1, 3])
    assert fed[0] == 2


# --- What it costs ------------------------------------------------------------------------------------------------------


def live_bytes() -> int:
    """Bytes of all tensors' memory that Python holds."""
    # Plain tensors alone: what torch.compile traced with in another test has no memory, and says so by an error.
    tensors = [t for t in gc.get_objects() if type(t) in (Tensor, torch.nn.Parameter) and t.layout == torch.strided]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@pytest.mark.parametrize(
    ("architecture", "kind"), [("gemma3", "quadratic"), ("llama", "linear"), ("llama", "autoregressive")]
)
def test_reading_whole_chunks_changes_no_text(architecture: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in bfloat16 on a CPU; in float64 texts, kept drafts and reasons are those of exactly the slots that count."""
    model, options = shared_model(architecture), {"decoding": kind, "num_masks": K, "max_new_tokens": G}
    expected = together(model, prompts(), **options)
    monkeypatch.setattr(row_cache, "reads_whole_chunks", lambda base: True)
    assert RowCache(model.base, 1).reach(3)[1] == row_cache.CHUNK
    assert together(model, prompts(), **options) == expected


def test_slots_are_read_in_whole_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_cache, "few_rows_differ", lambda dtype: True)
    cache = RowCache(tiny_model("llama", 3, dtype=torch.bfloat16).base, 1)
    ends = {}
    for length in (0, 31, 150, 191, 192, 350, 383, 384, 511, 512, 703, 704, 800, 2000):
        cache.lengths = [length]
        cache.reserve(length + 1, 4000)
        ends[length + 1] = cache.reach(1)[1]
        assert ends[length + 1] <= min(cache.capacity, length + 1 + row_cache.READ_AHEAD)
    assert list(ends.values()) == [32, 32, 160, 192, 384, 384, 384, 416, 512, 544, 704, 896, 896, 2016]


@pytest.mark.skipif(
    not (has_matrix_units() or few_rows_differ(torch.bfloat16)),
    reason="tried with AMX, and on an AMD EPYC with AVX-512 alone",
)
@pytest.mark.parametrize("kind", ["quadratic", "linear"])
def test_bfloat16_text_is_that_of_plain_decoding(kind: str) -> None:
    """Steps of at most 25 positions; with AMX above 32 the products round in another way."""
    model = tiny_model("llama", 4, GRUSamplerHead(8), dtype=torch.bfloat16).eval()
    for row in prompts(16):
        options = {"max_new_tokens": G, "eos_token_id": []}
        plain, fast = (
            [t for s in decode(model, row, DecodingOptions(d, 4, **options)) for t in s.tokens]
            for d in ("autoregressive", kind)
        )
        assert fast == plain


@pytest.mark.parametrize("num_tokens", [300, pytest.param(4000, marks=pytest.mark.slow)])
def test_memory_of_long_texts_is_the_caches(num_tokens: int) -> None:
    """Between steps nothing is held that grows with their number, but the cache and the masks of the layouts."""
    model = tiny_model("llama", 3, sampler_head=GRUSamplerHead(), max_position_embeddings=5000)
    prompt = token_row([5]).input_ids
    cache, beyond, at = RowCache(model.base, 1), [], []
    length = 0
    for number, step in enumerate(decode(model, prompt, DecodingOptions(max_new_tokens=num_tokens, num_masks=3), cache)):
        length += len(step.tokens)
        if number % (num_tokens // 10) == 10:
            gc.collect()
            beyond.append(live_bytes() - cache.num_bytes)
            at.append(length)
    assert length == num_tokens and len(at) > 5
    # A table of the masks, 16 positions by capacity of one byte each, and the token ids are what else grows.
    assert beyond[-1] - beyond[0] <= (at[-1] - at[0]) * 1.5 * (16 + 8)
    assert cache.num_bytes < 1.3 * (num_tokens + 100) * 2 * 2 * 2 * 8 * 8


@pytest.mark.parametrize("num_grown", [1, 4])
def test_a_cache_whose_growth_was_interrupted_is_still_good(num_grown: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The buffers that grow are the tokens, and keys and values of two layers."""
    model, options = tiny_model("llama", 3), DecodingOptions(num_masks=3, max_new_tokens=9)
    cache, prompts = RowCache(model.base, 1), [token_row([n], seed=n).input_ids for n in (5, 40)]
    list(decode(model, prompts[0], options, cache))
    grown, calls = row_cache._grown, itertools.count()

    def interrupted(*args: Any) -> Tensor:
        if next(calls) == num_grown:
            raise KeyboardInterrupt
        return grown(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(row_cache, "_grown", interrupted)
        cache.reserve(CONTEXT, 4 * CONTEXT)
    for prompt in prompts:
        assert list(decode(model, prompt, options, cache)) == list(decode(model, prompt, options))
