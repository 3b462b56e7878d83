# SPDX-License-Identifier: Apache-2.0
"""Decoding gives the base model's greedy text token for token, in the number of steps that its drafts allow.

Random adapters draft nothing right, so most tests inject drafts: the true continuation with an error at a known place. What
a draft would have been made from, the hidden states of its block, is compared with the paper's separate prompt each time.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from injected_drafts import (
    RUNS,
    G,
    InjectedDrafts,
    K,
    N,
    every_count,
    expected_steps,
    new_tokens,
    prompt_and_text,
    shared_model,
)
from tiny import ARCHITECTURES, greedy_text, tiny_base, tiny_model, token_row, tolerance

from mtp_lightning.decoding.loop import decode
from mtp_lightning.decoding.options import DecodingOptions
from mtp_lightning.losses import BaseCrossEntropy
from mtp_lightning.modeling.masking import build_masked_input
from mtp_lightning.sampler_heads import MLPSamplerHead


@pytest.mark.parametrize("kind", ["quadratic", "linear"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_text_is_the_bases_for_every_number_of_masks(
    architecture: str, kind: str, inject: Callable[..., InjectedDrafts]
) -> None:
    """Injected drafts: every number of kept tokens occurs; and each block's states are those of its prompt alone."""
    model = shared_model(architecture)
    prompt, text = prompt_and_text(architecture)
    accepted: set[tuple[int, int]] = set()
    for J in range(1, K + 1):
        for number, (run, length) in enumerate(every_count(J, kind)):
            # The states are compared in one text a J: each costs a forward pass of its own.
            drafts = inject(model, [[*prompt.tolist(), *text]], run, tolerance(model.base) if number == 0 else None)
            out = model.generate(prompt[None], decoding=kind, num_masks=J, max_new_tokens=length)
            assert out.sequences[0, N:].tolist() == list(text[:length]), (J, number)
            assert out.accepted_per_step[0] == expected_steps(run, J, kind, length)
            assert number > 0 or drafts.compared > 1
            accepted |= {(J, a) for a in out.accepted_per_step[0]}
    assert accepted == {(J, a) for J in range(1, K + 1) for a in range(J + 1)}


@pytest.mark.parametrize("kind", ["quadratic", "linear"])
@pytest.mark.parametrize(("architecture", "head"), [("gemma3", "mlp"), ("qwen3_moe", "none"), ("llama", "gru")])
def test_greedy_text_is_the_bases_with_its_own_drafts(architecture: str, head: str, kind: str) -> None:
    model, (prompt, text) = shared_model(architecture, head), prompt_and_text(architecture)
    for J, listed in ((8, "all"), (3, 5)):
        options = {"decoding": kind, "num_masks": J, "draft_candidates": listed}
        assert new_tokens(model, prompt, max_new_tokens=12, **options) == list(text[:12])


def test_a_base_whose_layers_all_have_a_window() -> None:
    """Its configuration lists layer types, and none of them is full attention."""
    model = tiny_model("gemma3", num_masks=3, layer_types=["sliding_attention"] * 3)
    prompt = token_row([N]).input_ids
    text = greedy_text(model.base, prompt, 12)
    assert new_tokens(model, prompt, max_new_tokens=12) == list(text)


@pytest.mark.parametrize("kind", ["quadratic", "linear"])
def test_a_standard_lora_decodes_its_own_text(kind: str, inject: Callable[..., InjectedDrafts]) -> None:
    """The gate always on: the text is that of the adapted model."""
    from mtp_lightning.modeling.gated_lora import LoRA

    model = tiny_model(num_masks=3, lora=LoRA(rank=4, gated=False))
    prompt = token_row([N]).input_ids
    sequence = prompt
    for _ in range(G + K + 2):
        with torch.no_grad(), model.gate.over_last(len(sequence)):
            sequence = torch.cat([sequence, model.base(sequence[None], use_cache=False).logits[0, -1:].argmax(-1)])
    assert sequence[N:].tolist() != list(prompt_and_text("llama")[1])
    inject(model, [sequence.tolist()], RUNS["sometimes"])
    out = model.generate(prompt[None], decoding=kind, num_masks=3, max_new_tokens=G)
    assert out.sequences[0].tolist() == sequence[: N + G].tolist()
    assert out.accepted_per_step[0] == expected_steps(RUNS["sometimes"], 3, kind)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch(side: str) -> None:
    model, prompts = shared_model("gemma3", "mlp"), [token_row([n], seed=4).input_ids for n in (7, 3, 1, 11)]
    ids = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True, padding_value=-1, padding_side=side)
    out = model.generate(ids.masked_fill(ids < 0, 5), (ids >= 0).long(), max_new_tokens=10)
    for r, p in enumerate(prompts):
        assert out.sequences[r, : len(p) + 10].tolist() == [*p.tolist(), *greedy_text(tiny_base("gemma3"), p, 10)]
    assert out.sequences.shape == (4, 21) and len(out.accepted_per_step) == 4
    assert not out.sequences[2, 11:].any()  # no end token is known: padded with 0


def test_a_paused_reader_holds_nothing_of_the_model() -> None:
    """Between two steps the model is the user's own: mode, forward passes, attention; it may be trained."""
    model, (prompt, text) = tiny_model("llama", 2, sampler_head=MLPSamplerHead()), prompt_and_text("llama")
    model.train()
    before = [(module.training, set(vars(module))) for module in model.modules()]
    optimizer = torch.optim.SGD([parameter for _, parameter in model.trained_parameters()], lr=0.1)
    tokens: list[int] = []
    for step in decode(model, prompt, DecodingOptions(max_new_tokens=G)):
        tokens += step.tokens
        assert [(module.training, set(vars(module))) for module in model.modules()] == before
        assert model.base.config._attn_implementation == "sdpa" and model.gate.num_mtp is None
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        optimizer.zero_grad()
        loss = model(build_masked_input([token_row([6])], 2), {"base": BaseCrossEntropy()}).sums["base"][0].total
        loss.backward()
        assert float(model.mask_embeddings.grad.norm()) > 0
        optimizer.step()
    assert tokens == list(text[:G])


def test_greedy_decoding_draws_no_random_number() -> None:
    """Sample texts at a validation would change the dropout of the steps after it."""
    model, (prompt, _) = shared_model("llama"), prompt_and_text("llama")
    before = torch.get_rng_state()
    list(decode(model, prompt, DecodingOptions(max_new_tokens=2, num_masks=1)))
    model.generate(prompt[None], max_new_tokens=2, num_masks=1)
    assert torch.equal(torch.get_rng_state(), before)
    model.generate(prompt[None], max_new_tokens=2, num_masks=1, temperature=1.0)
    assert not torch.equal(torch.get_rng_state(), before)


def test_threads_take_turns() -> None:
    model, (prompt, text) = tiny_model("llama", 2, sampler_head=MLPSamplerHead()).train(), prompt_and_text("llama")
    with ThreadPoolExecutor(4) as pool:
        texts = pool.map(lambda _: new_tokens(model, prompt, max_new_tokens=G), range(8))
        assert all(each == list(text[:G]) for each in texts)
    assert all(module.training for module in model.modules()) and model.base.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("kind", ["quadratic", "linear", "autoregressive"])
@pytest.mark.parametrize("agree", ["never", "sometimes"])
def test_a_step_is_one_forward_pass_of_the_base(kind: str, agree: str, inject: Callable[..., InjectedDrafts]) -> None:
    model, (prompt, text) = shared_model("llama"), prompt_and_text("llama")
    inject(model, [[*prompt.tolist(), *text]], RUNS[agree])
    sizes: list[int] = []
    decoder = model.base.get_decoder()
    handle = decoder.register_forward_pre_hook(lambda _, a, kw: sizes.append(kw["inputs_embeds"].shape[1]), with_kwargs=True)
    out = model.generate(prompt[None], decoding=kind, num_masks=3, max_new_tokens=G)
    handle.remove()
    assert out.sequences[0, N:].tolist() == list(text[:G])
    assert len(sizes) == int(out.num_steps[0]) == len(out.accepted_per_step[0])
    if kind == "quadratic":
        assert sizes[:2] == [N + 3, 1 + 3 + 4 * 3]  # k^2 + k masks after the first step
    elif kind == "linear":
        assert sizes[:2] == [N + 3, 1 + 3 + 3]
        if agree == "never":
            assert sizes[2] == 1 + 3  # nothing was drafted: one token and its masks
    else:
        assert sizes == [N] + [1] * (G - 1)


def test_tokens_are_yielded_as_they_are_verified(inject: Callable[..., InjectedDrafts]) -> None:
    model, (prompt, text) = shared_model("llama"), prompt_and_text("llama")
    inject(model, [[*prompt.tolist(), *text]], RUNS["sometimes"])
    parts = list(decode(model, prompt, DecodingOptions(num_masks=4, max_new_tokens=G)))
    assert [len(part.tokens) - 1 for part in parts] == expected_steps(RUNS["sometimes"], 4, "quadratic")
    assert [token for part in parts for token in part.tokens] == list(text[:G])
    assert parts[0].num_drafts == 0 and {part.num_drafts for part in parts[1:-2]} == {4}  # the last may be cut
