# SPDX-License-Identifier: Apache-2.0
"""Where a text ends: stop tokens, length limits, the end of the context, the number of steps."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from injected_drafts import RUNS, G, InjectedDrafts, K, N, expected_steps, new_tokens, prompt_and_text, shared_model
from tiny import CONTEXT, greedy_text, tiny_base, tiny_model, token_row
from tokenizers import AddedToken
from toy_tokenizers import byte_tokenizer

from mtp_lightning.decoding.limits import end_of_turn_token, end_tokens
from mtp_lightning.decoding.options import DecodingOptions
from mtp_lightning.errors import UsageError


@pytest.mark.parametrize("kind", ["quadratic", "linear", "autoregressive"])
@pytest.mark.parametrize("where", [0, *range(4, 9)])
def test_a_stop_token_ends_the_text_wherever_it_falls(kind: str, where: int, inject: Callable[..., InjectedDrafts]) -> None:
    """With whole drafts of 4 it falls on every place of a step in turn: first, inside the draft, the free token."""
    model, (prompt, text) = shared_model("llama"), prompt_and_text("llama")
    drafts = inject(model, [[*prompt.tolist(), *text]], RUNS["always"])
    stop = text[where]
    expected = greedy_text(tiny_base(), prompt, G, eos_token_id=stop)
    assert expected[-1] == stop and stop not in expected[:-1]
    out = model.generate(prompt[None], decoding=kind, num_masks=4, max_new_tokens=G, eos_token_id=stop)
    assert out.sequences[0, N:].tolist() == expected and out.finish_reasons == ["stop"]
    # Tokens after the end do not count as gained.
    assert sum(out.accepted_per_step[0]) + len(drafts.steps) == len(expected)
    assert out.acceptance_length.tolist() == [len(expected) / len(drafts.steps)]


def test_stop_tokens_come_from_the_base_and_may_be_many() -> None:
    prompt, text = prompt_and_text("llama")
    model = tiny_model(num_masks=K)
    assert end_tokens(model, DecodingOptions()) == set()
    model.base.config.eos_token_id = text[9]
    assert end_tokens(model, DecodingOptions()) == {text[9]}
    model.base.generation_config.eos_token_id = [text[4], text[9]]
    assert end_tokens(model, DecodingOptions()) == {text[4], text[9]}
    assert end_tokens(model, DecodingOptions(eos_token_id=[3, 4])) == {3, 4}
    for wrong in ("</s>", [3, "</s>"]):
        model.base.generation_config.eos_token_id = wrong
        with pytest.raises(UsageError, match="eos_token_id"):
            end_tokens(model, DecodingOptions())
    model.base.generation_config.eos_token_id = [text[4], text[9]]
    expected = greedy_text(tiny_base(), prompt, G, eos_token_id=[text[4], text[9]])
    assert new_tokens(model, prompt, max_new_tokens=G) == expected


@pytest.mark.parametrize("kind", ["quadratic", "linear"])
@pytest.mark.parametrize("agree", ["always", "sometimes"])
def test_every_length_limit(agree: str, kind: str, inject: Callable[..., InjectedDrafts]) -> None:
    model, (prompt, text) = shared_model("llama"), prompt_and_text("llama")
    drafts = inject(model, [[*prompt.tolist(), *text]], RUNS[agree])
    for limit in (1, 2, 5, 6, 7, 15):
        out = model.generate(prompt[None], decoding=kind, num_masks=4, max_new_tokens=limit)
        assert out.sequences[0, N:].tolist() == list(text[:limit]) and out.finish_reasons == ["length"]
        assert out.accepted_per_step[0] == expected_steps(RUNS[agree], 4, kind, limit)
    # No mask is fed that could only predict tokens past the limit.
    assert all(step.lengths[0] + step.layouts[0].depth <= N + 15 for step in drafts.steps)


@pytest.mark.parametrize("kind", ["quadratic", "linear", "autoregressive"])
@pytest.mark.parametrize(
    ("architecture", "length"), [("llama", 1), ("gemma3", 2), ("gemma3", CONTEXT - 3), ("mistral-window", CONTEXT - 1)]
)
def test_short_prompts_and_prompts_near_the_whole_context(
    architecture: str, length: int, kind: str, inject: Callable[..., InjectedDrafts]
) -> None:
    model, prompt = shared_model(architecture), token_row([length], seed=2).input_ids
    num_tokens = min(12, CONTEXT - length)
    text = greedy_text(tiny_base(architecture), prompt, num_tokens)
    drafts = inject(model, [[*prompt.tolist(), *text]], RUNS["sometimes"])
    out = model.generate(prompt[None], decoding=kind, num_masks=5, max_new_tokens=12 if length < 9 else 100)
    assert out.sequences[0].tolist() == [*prompt.tolist(), *text] and out.finish_reasons == ["length"]
    assert all(int(step.position_ids.max()) < CONTEXT for step in drafts.steps)
    if kind == "autoregressive":
        assert len(drafts.steps) == num_tokens


def test_max_steps_counts_the_prompts_step() -> None:
    model, (prompt, text) = shared_model("llama"), prompt_and_text("llama")
    for steps in (1, 2, 5):
        out = model.generate(prompt[None], max_steps=steps, max_new_tokens=G, num_masks=1)
        new = out.sequences[0, N:].tolist()
        assert out.num_steps.tolist() == [steps] and new == list(text[: len(new)]) and out.finish_reasons == ["length"]


def test_a_token_of_line_breaks_ends_no_turn() -> None:
    tokenizer = byte_tokenizer(["<eos>", "<end>"], "<eos>")
    tokenizer.add_tokens([AddedToken("\n\n", special=False, normalized=False)])
    template = "{% for m in messages %}{{ m.role }}:\n{{ m.content }}END{% endfor %}"
    for end, expected in (("\n\n", None), ("\n\n<end>", "<end>")):
        tokenizer.chat_template = template.replace("END", end)
        token = end_of_turn_token(tokenizer)
        assert (None if token is None else tokenizer.decode([token])) == expected
