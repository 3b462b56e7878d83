# SPDX-License-Identifier: Apache-2.0
"""The base's answers: equal to transformers' own, for any batch; sampled by the row's seed with the right probabilities."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from tiny import CONTEXT, greedy_text, tiny_base
from transformers import GenerationConfig

from mtp_lightning.decoding.packed_linear import can_pack
from mtp_lightning.distill.base_answers import NamedPrompt, SeededDraw, base_answers, base_batches
from mtp_lightning.distill.options import AnswerOptions
from mtp_lightning.errors import UsageError
from mtp_lightning.text.prompts import Prompt


def prompts(lengths: list[int]) -> list[NamedPrompt]:
    generator = torch.Generator().manual_seed(0)
    return [
        NamedPrompt(f"r{row}", Prompt("", torch.randint(97, (length,), generator=generator).tolist(), ""))
        for row, length in enumerate(lengths)
    ]


def answered(base, items, options: AnswerOptions, batch_size: int, done: tuple = ()) -> dict:
    return {
        answer.row_id: (answer.token_ids, answer.ended)
        for batch in base_answers(base, None, items, options, batch_size, done)
        for answer in batch
    }


LENGTHS = [3, 9, 1, 5, 40, 60, 2, 7, 62]


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_greedy_answers_are_the_bases_own_for_any_batch(architecture: str) -> None:
    """Padding, neighbours and what the base's generation config says change nothing (float64)."""
    base = tiny_base(architecture)
    items = prompts(LENGTHS)
    room = [min(8, CONTEXT - length) for length in LENGTHS]
    expected = [
        greedy_text(base, torch.tensor(item.prompt.input_ids), tokens) for item, tokens in zip(items, room, strict=True)
    ]
    base.generation_config = GenerationConfig(repetition_penalty=5.0, do_sample=True, temperature=3.0, top_k=2)
    for batch_size in (1, 4, 100):
        found = answered(base, items, AnswerOptions(max_new_tokens=8), batch_size)
        assert [found[item.row_id] for item in items] == [(tokens, False) for tokens in expected]


def test_an_answer_ends_with_the_first_end_token() -> None:
    base = tiny_base("llama")
    items = prompts([3, 4, 5, 6])
    texts = [greedy_text(base, torch.tensor(item.prompt.input_ids), 8) for item in items]
    ends = {texts[0][3], texts[2][5]}
    base.generation_config = GenerationConfig(eos_token_id=sorted(ends))
    found = answered(base, items, AnswerOptions(max_new_tokens=8), 4)
    for item, text in zip(items, texts, strict=True):
        end = next((place for place, token in enumerate(text) if token in ends), None)
        assert found[item.row_id] == (text if end is None else text[: end + 1], end is not None)
    assert {ended for _, ended in found.values()} == {True, False}


def test_sampled_answers_depend_on_the_rows_seed_alone() -> None:
    base, items = tiny_base("llama"), prompts(LENGTHS)
    options = AnswerOptions(max_new_tokens=8, temperature=0.9, top_k=20, top_p=0.95, seed=3)
    alone = answered(base, items, options, 1)
    assert answered(base, items, options, 4) == alone
    base.generation_config = GenerationConfig()
    assert answered(base, items[::2], options, 3) == {item.row_id: alone[item.row_id] for item in items[::2]}  # other shards
    other = answered(base, items, AnswerOptions(max_new_tokens=8, temperature=0.9, top_k=20, top_p=0.95, seed=4), 4)
    assert sum(other[name] != alone[name] for name in alone) >= 7
    assert answered(base, items, options, 4, done=("r0", "r4")) == {n: a for n, a in alone.items() if n not in ("r0", "r4")}


def test_noise_draws_from_the_distribution() -> None:
    """20,000 rows of the same logits: each share within 4.5 standard errors; a token of probability 0 never comes."""
    logits = torch.tensor([1.0, 0.0, -1.0, 2.0, -torch.inf, 0.5])
    n = 20_000
    drawn = SeededDraw(list(range(n)), torch.device("cpu"))(torch.empty(0), logits.expand(n, -1)).argmax(-1)
    counts = Counter(drawn.tolist())
    for token, p in enumerate(logits.softmax(-1).tolist()):
        assert abs(counts[token] / n - p) <= 4.5 * (p * (1 - p) / n) ** 0.5, token


def test_top_k_and_top_p_limit_what_is_drawn() -> None:
    base, (item,) = tiny_base("llama"), prompts([5])
    with torch.no_grad():
        p = base(torch.tensor([item.prompt.input_ids])).logits[0, -1].softmax(-1)
    order = p.argsort(descending=True).tolist()
    rows = [NamedPrompt(number, item.prompt) for number in range(300)]

    def firsts(**options) -> set[int]:
        base.generation_config = GenerationConfig()
        found = answered(base, rows, AnswerOptions(max_new_tokens=1, temperature=1.0, **options), 300)
        return {tokens[0] for tokens, _ in found.values()}

    assert firsts(top_k=3) == set(order[:3])
    nucleus = int((p.sort(descending=True).values.cumsum(0) < 0.5).sum()) + 1
    assert firsts(top_p=0.5) <= set(order[:nucleus]) and len(firsts()) > nucleus


def test_batches_are_sorted_and_full_prompts_go_alone() -> None:
    found = base_batches(prompts(LENGTHS), 3, context=64, new_tokens=8)
    assert [[len(item.prompt.input_ids) for item in batch] for batch in found] == [
        [1, 2, 3],
        [5, 7, 9],
        [40],
        [60],
        [62],
    ]


def test_each_step_of_a_batch_is_reported() -> None:
    """The last batch has less room than asked for; a batch that is done is not answered, and reports nothing."""
    base, items, steps = tiny_base("llama"), prompts([3, 4, CONTEXT - 2, 5, 5]), []
    batches = base_answers(
        base, None, items, AnswerOptions(max_new_tokens=3), 2, ("r1", "r3", "r4"), lambda *step: steps.append(step)
    )
    assert len(list(batches)) == 2
    assert steps == [(1, 3, 0), (1, 3, 1), (1, 3, 2), (1, 2, 0), (1, 2, 1)]


def test_row_seeds() -> None:
    options = AnswerOptions(seed=1)
    seeds = [options.row_seed(name) for name in (1, "1", 2, "x")]
    assert len(set(seeds)) == 4 and all(0 <= seed < 2**31 for seed in seeds)
    assert options.row_seed(1) == AnswerOptions(seed=1, temperature=1).row_seed(1) != AnswerOptions(seed=2).row_seed(1)


def test_greedy_answers_take_no_top_p() -> None:
    with pytest.raises(UsageError, match="temperature"):
        AnswerOptions(top_p=0.9)


def test_weights_are_packed_while_the_base_answers_and_not_afterwards() -> None:
    base = tiny_base("llama", dtype=torch.float32)
    layers = [layer for layer in base.modules() if type(layer) is torch.nn.Linear]
    packed = []

    def look(*_: int) -> None:
        packed.append(sum("forward" in vars(layer) for layer in layers))

    texts = [
        answer.token_ids
        for batch in base_answers(base, None, prompts([3, 5]), AnswerOptions(4), 2, (), look)
        for answer in batch
    ]
    assert packed == [len(layers) if can_pack(layers[0].weight) else 0] * 4
    assert not any("forward" in vars(layer) for layer in layers)
    assert texts == [greedy_text(base, torch.tensor(item.prompt.input_ids), 4) for item in prompts([3, 5])]
