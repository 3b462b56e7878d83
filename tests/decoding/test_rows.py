# SPDX-License-Identifier: Apache-2.0
"""A batch is its rows alone, token for token; the cache grows, is kept between calls, and costs what it holds."""

from __future__ import annotations

import contextlib
import gc
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from injected_drafts import RUNS, InjectedDrafts, K, expected_steps, shared_model
from tiny import CONTEXT, WINDOW, greedy_text, tiny_base, tiny_model, token_row
from torch import Tensor

from mtp_lightning.decoding import row_cache
from mtp_lightning.decoding.loop import decode, decode_rows
from mtp_lightning.decoding.options import DecodingOptions
from mtp_lightning.decoding.row_cache import RowCache
from mtp_lightning.decoding.step_masks import StepLayout, StepMasks
from mtp_lightning.model import MTPModel
from mtp_lightning.modeling.decoder import run_decoder
from mtp_lightning.sampler_heads import GRUSamplerHead

LENGTHS = [9, 1, 14, 4, 9, 7, 2, 22]
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


@pytest.mark.parametrize("kind", ["quadratic", "linear", "autoregressive"])
@pytest.mark.parametrize("architecture", ["llama", "gemma3", "qwen3_moe"])
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


@pytest.mark.parametrize("kind", ["quadratic", "linear"])
@pytest.mark.parametrize("architecture", ["llama", "gemma3", "qwen3_moe"])
def test_sampled_batches_are_their_rows(architecture: str, kind: str) -> None:
    model, rows = shared_model(architecture, "gru"), prompts(16)
    options: dict[str, Any] = {"temperature": 0.9, "top_p": 0.95, "max_new_tokens": 8, "num_masks": 3}
    seeds = list(range(100, 116))
    plain, _, _ = together(model, rows, **options, decoding="autoregressive", seed=seeds)
    stop = [plain[4][2], plain[9][5]]
    expected = [cut(text, stop) for text in plain]
    assert together(model, rows, **options, decoding=kind, seed=seeds, eos_token_id=stop)[0] == expected
    for r in (0, 4, 9, 15):
        assert together(model, rows[r : r + 1], **options, decoding=kind, seed=seeds[r], eos_token_id=stop)[0] == [
            expected[r]
        ]


@pytest.mark.parametrize("kind", ["quadratic", "linear"])
@pytest.mark.parametrize("kernel", ["sdpa", "eager", "flex_attention"])
def test_attention_kernels_of_ragged_batches(kernel: str, kind: str, inject: Callable[..., InjectedDrafts]) -> None:
    model, base, rows = tiny_model("gemma3", 3, attn_implementation=kernel), tiny_base("gemma3"), prompts(5)
    texts = [greedy_text(base, row, G + 5) for row in rows]
    inject(model, [[*row.tolist(), *text] for row, text in zip(rows, texts, strict=True)], RUNS["sometimes"])
    found, _, _ = together(model, rows, decoding=kind, max_new_tokens=G, seed=list(range(5)), num_masks=3)
    assert found == [text[:G] for text in texts]


@pytest.mark.parametrize("kind", ["quadratic", "linear"])
def test_rows_near_the_whole_context(kind: str, inject: Callable[..., InjectedDrafts]) -> None:
    """One row's context ends while others go on: no position past it is fed."""
    model, base = shared_model("mistral-window"), tiny_base("mistral-window")
    rows = [token_row([n], seed=n).input_ids for n in (CONTEXT - 1, CONTEXT - 4, 30, CONTEXT - 9)]
    texts = [greedy_text(base, row, min(G, CONTEXT - len(row))) for row in rows]
    drafts = inject(model, [[*row.tolist(), *text] for row, text in zip(rows, texts, strict=True)], RUNS["always"])
    assert together(model, rows, decoding=kind, num_masks=5, max_new_tokens=G, seed=list(range(4)))[0] == texts
    assert all(int(step.position_ids.max()) < CONTEXT for step in drafts.steps)


@pytest.mark.parametrize("kind", ["quadratic", "linear", "autoregressive"])
def test_a_growing_cache_keeps_its_rows(
    kind: str, inject: Callable[..., InjectedDrafts], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_cache, "CHUNK", 3)
    model, base, rows = shared_model("gemma3"), tiny_base("gemma3"), prompts(4)
    texts = [greedy_text(base, row, 33) for row in rows]
    inject(model, [[*row.tolist(), *text] for row, text in zip(rows, texts, strict=True)], RUNS["sometimes"])
    assert together(model, rows, decoding=kind, num_masks=2, max_new_tokens=30, seed=list(range(4)))[0] == [
        text[:30] for text in texts
    ]


# --- What a step writes and sees ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_writes_of_rows_of_different_lengths(dtype: torch.dtype, fixed: bool) -> None:
    """Against loops, bit for bit, while steps change their size, the buffers grow and rows leave."""
    generator = torch.Generator().manual_seed(0)
    cache = RowCache(tiny_base("llama"), 4)
    shapes = [(2, 8, 8), (3, 4, 6)]  # heads, and the width of keys and of values: layers need not be alike
    cache.lengths, cache.fixed = [3, 0, 7, 5], fixed
    cache.reserve(12, 99)
    tokens = cache.tokens.clone()
    held = [[torch.zeros(4, H, cache.capacity, d, dtype=dtype) for d in widths] for H, *widths in shapes]
    steps = [(1, 1, 1, [0, 1, 2, 3]), (5, 3, 2, [0, 1, 2, 3]), (1, 1, 1, [0, 3, 2]), (1, 1, 1, [0, 1, 2])]
    for size, num_tokens, kept, rows in [*steps, (7, 1, 7, [0, 2]), (2, 2, 1, [0, 1])]:
        if size == 7:
            cache.reserve(cache.capacity + 1, 99)
            tokens = row_cache._grown(tokens, 1, cache.capacity)
            held = [[row_cache._grown(each, 2, cache.capacity) for each in layer] for layer in held]
        B = len(cache.lengths)
        fed = torch.randint(97, (B, num_tokens), generator=generator)
        cache.begin_step(size, fed, torch.tensor(cache.lengths)[:, None])
        for number, (H, *widths) in enumerate(shapes):
            # As attention layers give them: views of [B, Q, H * d].
            new = [torch.randn(B, size, H * d, generator=generator).to(dtype).view(B, size, H, d) for d in widths]
            found = cache.layers[number].update(*(each.transpose(1, 2) for each in new))
            end = cache.capacity if fixed else max(cache.lengths) + size
            layer = cache.layers[number]
            for buffer, own, states, given in zip(held[number], (layer.keys, layer.values), new, found, strict=True):
                for r, h, q in itertools.product(range(B), range(H), range(size)):
                    buffer[r, h, cache.lengths[r] + q] = states[r, q, h]
                assert torch.equal(own, buffer) and torch.equal(given, buffer[:, :, :end])
        for r, q in itertools.product(range(B), range(num_tokens)):
            tokens[r, cache.lengths[r] + q] = fed[r, q]
        assert torch.equal(cache.tokens, tokens)
        cache.lengths = [length + kept for length in cache.lengths]
        cache.keep_rows(rows)
        held = [[each[rows] for each in layer] for layer in held]
        tokens = tokens[rows]
        for layer, buffers in zip(cache.layers, held, strict=True):  # only what counts is kept
            for own, buffer in zip((layer.keys, layer.values), buffers, strict=True):
                for r, length in enumerate(cache.lengths):
                    assert torch.equal(own[r, :, :length], buffer[r, :, :length])
                buffer.copy_(own)
        tokens.copy_(cache.tokens)


def sees(layout: StepLayout, length: int, query: int, slot: int, window: int | None) -> bool:
    """Whether a row that holds so many tokens sees what is in a slot: the rule once more, for one query and one slot."""
    fed = [(index, -1, index) for index in range(layout.num_tokens)]  # token that it comes after, block, position
    for block, (start, masks) in enumerate(layout.blocks):
        fed += [(start, block, start + j) for j in range(1, masks + 1)]
    after, own, position = fed[query]
    if slot < length:
        return window is None or length + position - slot < window
    if slot >= length + len(fed):
        return False
    other, block, at = fed[slot - length]
    seen = other <= after if block == -1 else block == own and at <= position
    return seen and (window is None or position - at < window)


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("architecture", ["llama", "mistral-window", "gemma3"])
@torch.inference_mode()
def test_masks_of_steps_that_follow_each_other(architecture: str, kernel: str) -> None:
    """Steps of one position and others in turn; rows leave, lengths become equal, and the cache grows."""
    base = tiny_base(architecture, attn_implementation=kernel)
    masks, cache = StepMasks(base, CONTEXT), RowCache(base, 3)
    plain, drafts = StepLayout(1, 0, ()), StepLayout(2, 0, ())
    block, two = StepLayout(2, 0, ((0, 1), (1, 2))), StepLayout(2, 0, ((1, 3),))
    for lengths, layouts in (
        ([0], [plain]), ([1], [plain]),
        ([9, 3, 7], [plain]), ([10, 4, 8], [plain]), ([12, 4, 9], [block]), ([13, 5, 10], [plain]), ([5, 10, 13], [plain]),
        ([14, 11], [plain]), ([15, 12], [block, two]), ([16, 16], [plain]), ([17, 17], [plain]), ([17, 18], [plain]),
        ([34, 35], [plain]), ([36, 36], [block]), ([61, 63], [plain]), ([60, 63], [block]), ([62, 63], [drafts]),
        ([40], [plain]), ([41], [plain]),
    ):  # fmt: skip
        cache.lengths = lengths
        B, Q = len(lengths), layouts[0].size
        cache.reserve(max(lengths) + Q, 99)
        of_row = [layouts[r % len(layouts)] for r in range(B)]
        choice = None if len(layouts) == 1 else torch.tensor([layouts.index(each) for each in of_row])
        slots = None if len(set(lengths)) == 1 else torch.tensor(lengths)[:, None]
        positions, given = masks.get(tuple(layouts), choice, cache, slots)
        first, end = cache.reach(Q)
        windows = {"full_attention": None, "sliding_attention": WINDOW}
        by_window = {windows[name]: mask for name, mask in given.items()} if isinstance(given, dict) else {}
        for window in cache.windows:
            mask = by_window[window] if by_window else given
            seen = [
                [[[sees(each, length, query, slot, window) for slot in range(first[window], end)] for query in range(Q)]]
                for length, each in zip(lengths, of_row, strict=True)
            ]
            assert torch.equal(mask.expand(B, -1, -1, -1) == 0, torch.tensor(seen))
            assert set(mask.unique().tolist()) <= {0, -torch.inf if kernel == "sdpa" else torch.finfo(base.dtype).min}
        places = [[*range(each.num_tokens), *(s + j for s, m in each.blocks for j in range(1, m + 1))] for each in of_row]
        expected = torch.tensor([[min(n + at, CONTEXT - 1) for at in row] for n, row in zip(lengths, places, strict=True)])
        assert torch.equal(positions.expand(B, -1), expected)


@torch.inference_mode()
def test_masks_of_known_layouts_are_made_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is copied there where rows gained unequally: a step would wait for it."""
    base = tiny_base("gemma3")
    masks, cache, layouts = StepMasks(base, CONTEXT), RowCache(base, 3), [StepLayout(1, 0, ()), StepLayout(2, 0, ((0, 1),))]
    cache.reserve(40, 40)
    for number, lengths in enumerate(([9, 3, 7], [11, 4, 8], [12, 12, 12], [13, 15, 13])):
        cache.lengths = lengths
        slots = None if len(set(lengths)) == 1 else torch.tensor(lengths)[:, None]
        with monkeypatch.context() as patch:
            if number:
                patch.setattr(torch, "tensor", None)
            for layout in layouts:
                masks.get((layout,), None, cache, slots)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
@torch.inference_mode()
def test_masks_in_the_kernels_form_change_no_bit(architecture: str, dtype: torch.dtype) -> None:
    """The hidden states that a boolean mask gives."""
    base = tiny_base(architecture, dtype)
    for layout in (StepLayout(1, 0, ()), StepLayout(2, 0, ((0, 2), (1, 2)))):
        found = []
        for boolean in (False, True):
            torch.manual_seed(0)
            masks, cache = StepMasks(base, CONTEXT), RowCache(base, 3)
            cache.reserve(20, 20)
            for lengths, each in (([0, 0, 0], StepLayout(11, 10, ())), ([11, 4, 8], layout), ([12, 5, 9], layout)):
                cache.lengths = lengths
                slots = torch.tensor(lengths)[:, None] if lengths[0] else None
                positions, mask = masks.get((each,), None, cache, slots)
                if boolean:
                    mask = {name: m == 0 for name, m in mask.items()} if isinstance(mask, dict) else mask == 0
                cache.begin_step(each.size, torch.zeros(3, each.num_tokens, dtype=torch.int64), slots)
                hidden = run_decoder(base, torch.randn(3, each.size, 32).to(dtype), mask, positions, cache)
            found.append(hidden)
        assert found[0].isfinite().all() and torch.equal(*found)


# --- A cache that is kept -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["quadratic", "linear", "autoregressive"])
@pytest.mark.parametrize("architecture", ["llama", "gemma3", "mistral-window"])
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


@pytest.mark.parametrize("num_tokens", [800, pytest.param(4000, marks=pytest.mark.slow)])
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


def test_buffers_are_moved_seldom(monkeypatch: pytest.MonkeyPatch) -> None:
    model, grown = tiny_model("llama", 3, max_position_embeddings=700), []
    original = row_cache._grown
    monkeypatch.setattr(row_cache, "_grown", lambda *args: grown.append(args[2]) or original(*args))
    steps = sum(1 for _ in decode(model, token_row([5]).input_ids, DecodingOptions("autoregressive", max_new_tokens=600)))
    assert steps == 600 and len(set(grown)) < 12


def test_a_cache_whose_growth_was_interrupted_is_still_good(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama", 3)
    prompts = [token_row([n], seed=n).input_ids for n in (5, 40)]
    expected = [[step.tokens for step in decode(model, p, DecodingOptions(num_masks=3, max_new_tokens=9))] for p in prompts]
    grown = row_cache._grown
    for buffers in range(1, 6):  # the tokens, and keys and values of two layers
        cache, left = RowCache(model.base, 1), [buffers]

        def interrupted(buffer: Tensor, dim: int, size: int, left: list[int] = left) -> Tensor:
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
            return grown(buffer, dim, size)

        list(decode(model, prompts[0], DecodingOptions(num_masks=3, max_new_tokens=2), cache))
        held = cache.capacity
        with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
            patch.setattr(row_cache, "_grown", interrupted)
            cache.reserve(CONTEXT, 4 * CONTEXT)
        assert (cache.capacity == held) == (buffers < 5)
        for prompt, text in zip(prompts, expected, strict=True):
            steps = decode(model, prompt, DecodingOptions(num_masks=3, max_new_tokens=9), cache)
            assert [step.tokens for step in steps] == text
