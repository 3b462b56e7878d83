# SPDX-License-Identifier: Apache-2.0
"""Decoding gives the base model's greedy text token for token, in the number of steps that its drafts allow.

Random adapters draft nothing right, so most tests inject drafts: the true continuation with an error at a known place. What
a draft would have been made from, the hidden states of its block, is compared with the paper's separate prompt each time.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from tiny import ARCHITECTURES, CONTEXT, VOCAB, greedy_text, naive_states, tiny_base, tiny_model, token_row, tolerance
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mtp_lightning import decoding_step
from mtp_lightning.decoding import DecodingOptions, decode, end_tokens
from mtp_lightning.decoding_step import Drafts, StepInput, num_accepted
from mtp_lightning.errors import UsageError
from mtp_lightning.losses import BaseCrossEntropy, SamplerCrossEntropy, term_value
from mtp_lightning.masking import build_masked_input
from mtp_lightning.model import MTPModel
from mtp_lightning.row_cache import RowCache
from mtp_lightning.sampler_heads import GRUSamplerHead, MLPSamplerHead
from mtp_lightning.shortlist import Shortlist
from mtp_lightning.step_masks import StepLayout, StepMasks
from mtp_lightning.token_choice import TokenChoice
from mtp_lightning.types import TokenRow

N, G, K = 7, 24, 8
"""Tokens of a prompt and of a text, and trained masks. N + G is past every window."""


@functools.cache
def prompt_and_text(architecture: str, seed: int = 0) -> tuple[Tensor, tuple[int, ...]]:
    """A prompt of N tokens and the base's greedy continuation, K + 2 tokens longer than G, by transformers."""
    prompt = token_row([N], seed=seed).input_ids
    text = greedy_text(tiny_base(architecture), prompt, G + K + 2)
    assert len(set(text[:G])) > 5  # a text that repeats one token would hide errors
    return prompt, tuple(text)


class InjectedDrafts:
    """Takes the place of ``draft_block``: drafts whose first ``run(position)`` tokens are true and the next one is not.

    The tokens after the wrong one are true again: a verification that looked past it would be caught.

    Args:
        model: the model that decodes.
        sequences: prompt and true text of each row, as long as the drafts reach; of several rows each has its number as
            its seed.
        run: number of true tokens in the draft of the block whose first mask stands at a position.
        bounds: tolerances for the block's hidden states; None: they are not compared.
    """

    def __init__(
        self,
        model: MTPModel,
        sequences: Sequence[Sequence[int]],
        run: Callable[[int], int],
        bounds: dict[str, float] | None = None,
    ) -> None:
        self.sequences, self.run, self.bounds = [torch.tensor(sequence) for sequence in sequences], run, bounds
        self.steps: list[StepInput] = []
        self.compared = 0
        model.register_forward_pre_hook(lambda _, args: self.steps.append(args[0]))

    def __call__(
        self, model: MTPModel, hidden: Tensor, verified: Tensor, positions: Tensor, choice: TokenChoice, sampler_head: bool
    ) -> Drafts:
        step, drafts = self.steps[-1], []
        for r, at in enumerate(positions.tolist()):
            layout = step.layouts[0 if step.choice is None else int(step.choice[r])]
            sequence = self.sequences[0 if len(self.sequences) == 1 else int(choice.seeds[r])]
            J = layout.block_after(at - step.ends[r])[1]
            drafts.append(self.draft(model, hidden[r, :J], int(verified[r]), at, sequence))
        filled = torch.full(hidden.shape[:2], VOCAB - 1)  # a row without a block after its last token: must not count
        for r, draft in enumerate(drafts):
            filled[r, : len(draft)] = draft
        return Drafts(filled, None)

    def draft(self, model: MTPModel, hidden: Tensor, verified: int, at: int, sequence: Tensor) -> Tensor:
        J = len(hidden)
        if J == 0 or at >= len(sequence):  # past the end of what is known: a row that has finished
            return torch.zeros(J, dtype=torch.int64)
        assert verified == sequence[at]
        if self.bounds is not None:
            _, expected = naive_states(model, sequence[:at], J)
            torch.testing.assert_close(hidden, expected, **self.bounds)
            self.compared += 1
        out = sequence[at + 1 : at + 1 + J].clone()
        out = torch.cat([out, torch.zeros(J - len(out), dtype=torch.int64)])  # past the end of what is known
        if (r := self.run(at)) < J:
            out[r] = (out[r] + 1) % VOCAB
        return out


def expected_steps(run: Callable[[int], int], J: int, kind: str, num_tokens: int = G, prompt: int = N) -> list[int]:
    """Draft tokens kept in each step, by counting: the rule of docs/method.md §6 without any model."""
    kept, length, draft_run, draft_size = [], 0, 0, 0
    while length < num_tokens:
        a = min(draft_run, draft_size)
        kept.append(a)
        length += a + 1
        whole = a == draft_size
        draft_size = max(0, min(J, num_tokens - length - 1)) if kind == "quadratic" or whole else 0
        draft_run = run(prompt + length - 1)
    return kept


def every_count(J: int, kind: str) -> list[tuple[Callable[[int], int], int]]:
    """Runs and lengths of a few texts, at most G tokens each, in whose steps every number of drafts 0..J is kept."""
    texts: list[tuple[dict[int, int], int]] = []  # the run of each block, and where the next block will stand
    for r in range(J, -1, -1):
        size = r + 1 + (kind == "linear" and r < J)  # linear: after an error a step has no draft
        t = next((t for t, (_, end) in enumerate(texts) if end + size <= N + G - 2), len(texts))
        runs, end = texts[t] if t < len(texts) else ({}, N)
        texts[t : t + 1] = [({**runs, end: r}, end + size)]
    return [(lambda at, runs=runs: runs.get(at, 0), end - N + 2) for runs, end in texts]


GREEDY = TokenChoice(DecodingOptions(), [0], torch.device("cpu"))
RUNS: dict[str, Callable[[int], int]] = {
    "never": lambda at: 0,
    "always": lambda at: K,
    "sometimes": lambda at: (at * 5) % (K + 1),
}


@functools.cache
def shared_model(architecture: str, head: str = "none") -> MTPModel:
    """One model for many tests that only read it."""
    heads = {"none": None, "mlp": MLPSamplerHead, "gru": GRUSamplerHead}
    made = heads[head]
    return tiny_model(architecture, K, sampler_head=None if made is None else made())


@pytest.fixture
def inject(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., InjectedDrafts]]:
    """Replace the drafts of a model for one test."""
    models = []

    def start(model: MTPModel, *args: Any) -> InjectedDrafts:
        monkeypatch.setattr(decoding_step, "draft_block", drafts := InjectedDrafts(model, *args))
        models.append(model)
        return drafts

    yield start
    for model in models:
        model._forward_pre_hooks.clear()


def new_tokens(model: MTPModel, prompt: Tensor, **options: Any) -> list[int]:
    return model.generate(prompt[None], **options).sequences[0, len(prompt) :].tolist()


@pytest.mark.parametrize("kind", ["quadratic", "linear"])
@pytest.mark.parametrize("agree", RUNS)
@pytest.mark.parametrize("J", [1, 2, 3, 8])
def test_never_always_sometimes(agree: str, kind: str, J: int, inject: Callable[..., InjectedDrafts]) -> None:
    model, run = shared_model("llama"), RUNS[agree]
    prompt, text = prompt_and_text("llama")
    inject(model, [[*prompt.tolist(), *text]], run)
    out = model.generate(prompt[None], decoding=kind, num_masks=J, max_new_tokens=G)
    assert out.sequences[0].tolist() == [*prompt.tolist(), *text[:G]]
    kept = expected_steps(run, J, kind)
    assert out.accepted_per_step == [kept]
    assert out.num_steps.tolist() == [len(kept)] and out.acceptance_length.tolist() == [G / len(kept)]
    assert out.finish_reasons == ["length"]
    if agree == "never":
        assert kept == [0] * G
    elif agree == "always":  # the prompt's step, then J + 1 tokens a step
        assert len(kept) == 1 + -(-(G - 1) // (J + 1)) and set(kept[1:-1]) <= {J}
    elif kind == "quadratic" and J == 3:
        assert {0, 1, 2, 3} <= set(kept)


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
            model._forward_pre_hooks.clear()
    assert accepted == {(J, a) for J in range(1, K + 1) for a in range(J + 1)}


@pytest.mark.parametrize("kind", ["quadratic", "linear"])
@pytest.mark.parametrize("head", ["none", "mlp", "gru"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_text_is_the_bases_with_its_own_drafts(architecture: str, head: str, kind: str) -> None:
    model, (prompt, text) = shared_model(architecture, head), prompt_and_text(architecture)
    for J in (1, 8) if head == "none" else (3,):
        for listed in ("all", 5):
            options = {"decoding": kind, "num_masks": J, "draft_vocabulary": listed}
            assert new_tokens(model, prompt, max_new_tokens=12, **options) == list(text[:12])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_autoregressive_decoding_takes_a_step_a_token(architecture: str) -> None:
    model, (prompt, text) = shared_model(architecture), prompt_and_text(architecture)
    out = model.generate(prompt[None], decoding="autoregressive", max_new_tokens=G)
    assert out.sequences[0, N:].tolist() == list(text[:G]) and out.num_steps.tolist() == [G]


@pytest.mark.parametrize("kind", ["quadratic", "linear"])
def test_a_standard_lora_decodes_its_own_text(kind: str, inject: Callable[..., InjectedDrafts]) -> None:
    """The gate always on: the text is that of the adapted model."""
    from mtp_lightning.gated_lora import LoRA

    model = tiny_model(num_masks=3, lora=LoRA(rank=4, gated=False))
    prompt = token_row([N]).input_ids
    sequence = prompt
    for _ in range(G + K + 2):
        with torch.no_grad(), model.gate.open(len(sequence)):
            sequence = torch.cat([sequence, model.base(sequence[None], use_cache=False).logits[0, -1:].argmax(-1)])
    assert sequence[N:].tolist() != list(prompt_and_text("llama")[1])
    inject(model, [sequence.tolist()], RUNS["sometimes"])
    out = model.generate(prompt[None], decoding=kind, num_masks=3, max_new_tokens=G)
    assert out.sequences[0].tolist() == sequence[: N + G].tolist()
    assert out.accepted_per_step[0] == expected_steps(RUNS["sometimes"], 3, kind)


@pytest.mark.parametrize("kernel", ["sdpa", "eager", "flex_attention"])
def test_attention_kernels(kernel: str, inject: Callable[..., InjectedDrafts]) -> None:
    model = tiny_model("gemma3", 3, attn_implementation=kernel)
    prompt, text = prompt_and_text("gemma3")
    inject(model, [[*prompt.tolist(), *text]], RUNS["sometimes"])
    assert new_tokens(model, prompt, num_masks=3, max_new_tokens=G) == list(text[:G])
    assert model.base.config._attn_implementation == kernel  # FlexAttention is set aside while decoding, and put back


# --- Real drafts: a model that has learnt the base's texts in part -----------------------------------------------------


@pytest.fixture(scope="module", params=["mlp", "gru"])
def fitted(request: pytest.FixtureRequest) -> tuple[MTPModel, list[Tensor]]:
    """A model trained for seconds on four texts of its base, and the texts: its drafts are often right and often not."""
    head = {"mlp": MLPSamplerHead, "gru": GRUSamplerHead}[request.param]()
    model = tiny_model("qwen3-window", 4, sampler_head=head)
    texts = [torch.tensor([*p.tolist(), *t[:G]]) for p, t in (prompt_and_text("qwen3-window", seed) for seed in range(4))]
    rows = [TokenRow(text, text, torch.zeros_like(text), r) for r, text in enumerate(texts)]
    batch = build_masked_input(rows, 4)
    terms = {"base": BaseCrossEntropy(), "sampler": SamplerCrossEntropy()}
    optimizer = torch.optim.AdamW([p for _, p in model.trained_parameters()], lr=1e-2)
    for _ in range(40):
        sums = model(batch, terms).sums
        optimizer.zero_grad()
        torch.stack([term_value(s, batch.counts) for s in sums.values()]).sum().backward()
        optimizer.step()
    return model, texts


@pytest.mark.parametrize("kind", ["quadratic", "linear"])
@pytest.mark.parametrize("sampler_head", [True, False])
def test_own_drafts_of_a_trained_model(fitted: tuple[MTPModel, list[Tensor]], kind: str, sampler_head: bool) -> None:
    model, texts = fitted
    kept = {}
    for listed in ("all", 64, 24, 8):
        counts = []
        for text, J in itertools.product(texts, (1, 2, 4) if listed == "all" else (4,)):
            options = {"decoding": kind, "num_masks": J, "sampler_head": sampler_head, "draft_vocabulary": listed}
            out = model.generate(text[None, :N], max_new_tokens=len(text) - N, **options)
            assert out.sequences[0].tolist() == text.tolist()
            counts += out.accepted_per_step[0][1:]
        kept[listed] = sum(counts)
        assert 0 in counts and (listed != "all" or 2 in counts)
    assert kept["all"] > 20 and kept[64] > 0  # the drafts are of both kinds


def test_the_sampler_head_is_conditioned_on_what_it_drew(fitted: tuple[MTPModel, list[Tensor]]) -> None:
    """The draft of a step is the head's greedy sequence from the naive states, token after token."""
    model, texts = fitted
    for text, i in itertools.product(texts, range(3, 20, 4)):
        _, hidden = naive_states(model, text[: i + 1], 4)
        drafts = {}
        for with_head in (True, False):
            places = torch.tensor([i + 1])
            made = decoding_step.draft_block(model, hidden[None], text[i + 1 : i + 2], places, GREEDY, with_head)
            drafts[with_head] = made.tokens[0].tolist()
        assert drafts[False] == model.unembed(hidden).argmax(-1).tolist()
        tokens = [int(text[i + 1])]
        for j in range(4):  # teacher forcing on the draft so far
            previous = model.embed(torch.tensor([*tokens, *[0] * (3 - j)]))[None]
            assert model.sampler_head is not None
            tokens.append(int(model.unembed(model.sampler_head(hidden[None], previous))[0, j].argmax()))
        assert drafts[True] == tokens[1:]


def test_more_masks_keep_what_fewer_keep_step_by_step(fitted: tuple[MTPModel, list[Tensor]]) -> None:
    """docs/method.md §6: at every start the run with j masks is min(run with j + 1 masks, j), in separate forward passes."""
    model, texts = fitted
    seen = []
    for text, i in itertools.product(texts[:2], range(0, len(texts[0]) - 6, 2)):
        runs = []
        for j in range(1, 5):  # the prompt's step drafts, the second step verifies
            out = model.generate(text[None, : i + 1], num_masks=j, max_steps=2, max_new_tokens=12)
            runs.append(out.accepted_per_step[0][1])
        assert all(runs[j - 1] == min(runs[j], j) for j in range(1, 4)), (i, runs)
        seen += runs
    assert {0, 1, 2, 3, 4} == set(seen)


# --- Ends, limits and edges ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["quadratic", "linear", "autoregressive"])
@pytest.mark.parametrize("where", range(12))
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
    expected = greedy_text(tiny_base(), prompt, G, eos_token_id=[text[4], text[9]])
    assert new_tokens(model, prompt, max_new_tokens=G) == expected


@pytest.mark.parametrize("kind", ["quadratic", "linear"])
@pytest.mark.parametrize("agree", RUNS)
def test_every_length_limit(agree: str, kind: str, inject: Callable[..., InjectedDrafts]) -> None:
    model, (prompt, text) = shared_model("llama"), prompt_and_text("llama")
    drafts = inject(model, [[*prompt.tolist(), *text]], RUNS[agree])
    for limit in range(1, 16):
        out = model.generate(prompt[None], decoding=kind, num_masks=4, max_new_tokens=limit)
        assert out.sequences[0, N:].tolist() == list(text[:limit]) and out.finish_reasons == ["length"]
        assert out.accepted_per_step[0] == expected_steps(RUNS[agree], 4, kind, limit)
    # No mask is fed that could only speak of tokens past the limit.
    for step in drafts.steps:
        drafted = step.ends[0] + step.layouts[0].depth
        assert drafted <= N + 15


@pytest.mark.parametrize("kind", ["quadratic", "linear", "autoregressive"])
@pytest.mark.parametrize("length", [1, 2, CONTEXT - 12, CONTEXT - 3, CONTEXT - 2, CONTEXT - 1])
@pytest.mark.parametrize("architecture", ["llama", "gemma3", "mistral-window"])
def test_short_prompts_and_prompts_near_the_whole_context(
    architecture: str, length: int, kind: str, inject: Callable[..., InjectedDrafts]
) -> None:
    model, prompt = shared_model(architecture), token_row([length], seed=2).input_ids
    room = min(12, CONTEXT - length)
    text = greedy_text(tiny_base(architecture), prompt, room)
    drafts = inject(model, [[*prompt.tolist(), *text]], RUNS["sometimes"])
    out = model.generate(prompt[None], decoding=kind, num_masks=5, max_new_tokens=12 if length < 9 else 100)
    assert out.sequences[0].tolist() == [*prompt.tolist(), *text] and out.finish_reasons == ["length"]
    assert all(int(step.position_ids.max()) < CONTEXT for step in drafts.steps)
    if kind == "autoregressive":
        assert len(drafts.steps) == room


def test_max_steps_counts_the_prompts_step() -> None:
    model, (prompt, text) = shared_model("llama"), prompt_and_text("llama")
    for steps in (1, 2, 5):
        out = model.generate(prompt[None], max_steps=steps, max_new_tokens=G)
        new = out.sequences[0, N:].tolist()
        assert out.num_steps.tolist() == [steps] and new == list(text[: len(new)]) and out.finish_reasons == ["length"]


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch(side: str) -> None:
    model, base = shared_model("gemma3", "mlp"), tiny_base("gemma3")
    prompts = [token_row([n], seed=4).input_ids for n in (7, 3, 1, 11)]
    expected = [greedy_text(base, p, 10) for p in prompts]
    ids, mask = torch.full((4, 11), 5), torch.zeros(4, 11, dtype=torch.int64)
    for r, p in enumerate(prompts):
        place = slice(11 - len(p), 11) if side == "left" else slice(0, len(p))
        ids[r, place], mask[r, place] = p, 1
    out = model.generate(ids, mask, max_new_tokens=10)
    for r, p in enumerate(prompts):
        assert out.sequences[r, : len(p) + 10].tolist() == [*p.tolist(), *expected[r]]
    assert out.sequences.shape == (4, 21) and len(out.accepted_per_step) == 4
    assert not out.sequences[2, 11:].any()  # no end token is known: padded with 0


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        (N, {"num_masks": 0}, "num_masks must be auto or from 1 to 8, the number this model was trained with, got 0"),
        (N, {"num_masks": -1}, "got -1"),
        (N, {"num_masks": 9}, "got 9"),
        (N, {"num_masks": 1.5}, "got 1.5"),
        (N, {"decoding": "cubic"}, "decoding must be quadratic, linear or autoregressive, got 'cubic'"),
        (N, {"max_new_tokens": 0}, "max_new_tokens must be 1 or more, got 0"),
        (N, {"max_steps": 0}, "max_steps must be 1 or more, got 0"),
        (N, {"num_masks": True}, "num_masks must be auto or from 1 to 8, the number this model was trained with, got True"),
        (N, {"max_new_tokens": True}, "max_new_tokens must be 1 or more, got True"),
        (N, {"seed": 0.5}, "seed must be an int or several, got 0.5"),
        (N, {"seed": torch.tensor([0.5])}, "seed must be an int or several"),
        (N, {"eos_token_id": "</s>"}, "eos_token_id must be an int or several, got '</s>'"),
        (N, {"max_new_token": 4}, "unknown option 'max_new_token': did you mean 'max_new_tokens'?"),
        (N, {"do_sample": True}, "unknown option 'do_sample': there are decoding, num_masks, "),
        (0, {}, "the prompt is empty"),
        (CONTEXT, {}, f"the prompt has {CONTEXT} tokens and the model's context is {CONTEXT}"),
        (CONTEXT + 1, {}, f"shorten it to {CONTEXT - 1} or less"),
    ],
)
def test_wrong_options_and_prompts_are_refused(prompt: int, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        shared_model("llama").generate(torch.ones(1, prompt, dtype=torch.int64), **options)


@pytest.mark.parametrize(
    ("ids", "mask", "message"),
    [
        ([5, 6], None, r"input_ids must be a tensor of token ids \[rows, tokens\], got torch.int64 \[2\]"),
        ([[5.0, 6.0]], None, r"got torch.float32 \[1, 2\]"),
        ([[5, VOCAB]], None, f"input_ids must be from 0 to {VOCAB - 1}, the model's vocabulary, got {VOCAB}"),
        ([[-100, 5]], None, "got -100"),
        ([[5, 6]], [[1, 1, 1]], r"attention_mask must have the shape of input_ids, \[1, 2\], got \[1, 3\]"),
    ],
)
def test_wrong_ids_are_refused(ids: Any, mask: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        shared_model("llama").generate(torch.tensor(ids), None if mask is None else torch.tensor(mask))
    with pytest.raises(UsageError, match="got list"):
        shared_model("llama").generate(ids)


def test_numbers_of_torch_and_numpy_are_as_good_as_pythons() -> None:
    model, (prompt, text) = shared_model("llama"), prompt_and_text("llama")
    end = text[5]
    ended = list(text[: text.index(end) + 1])
    for token in (torch.tensor(end), torch.tensor([end]), [torch.tensor(end)], np.int64(end), {end}):
        assert new_tokens(model, prompt, eos_token_id=token, max_new_tokens=np.int64(9), num_masks=torch.tensor(3)) == ended
    sampled = model.generate(prompt[None], seed=3, temperature=1.0, max_new_tokens=9).sequences
    for seed in (torch.tensor(3), np.int64(3), [np.int64(3)], torch.tensor([3])):
        assert torch.equal(model.generate(prompt[None], seed=seed, temperature=1.0, max_new_tokens=9).sequences, sampled)
    padded = torch.cat([torch.full((1, 2), -100), prompt[None]], dim=1)  # what stands at padding is not looked at
    assert model.generate(padded, padded >= 0, max_new_tokens=4).sequences[0, N:].tolist() == list(text[:4])


def test_a_row_of_padding_alone_is_an_empty_prompt() -> None:
    with pytest.raises(UsageError, match="the prompt is empty"):
        shared_model("llama").generate(torch.ones(1, 4, dtype=torch.int64), torch.zeros(1, 4))


# --- What decoding leaves alone, and what it costs ----------------------------------------------------------------------


def test_training_flags_and_gradients_are_put_back() -> None:
    model, (prompt, text) = tiny_model(num_masks=2, sampler_head=MLPSamplerHead()), prompt_and_text("llama")
    model.train()
    model.base.get_decoder().layers[1].eval()  # someone's own choice
    before = [module.training for module in model.modules()]
    assert new_tokens(model, prompt, max_new_tokens=5) == list(text[:5])
    assert [module.training for module in model.modules()] == before
    steps = decode(model, prompt, DecodingOptions(max_new_tokens=9))
    assert next(steps).tokens == [text[0]]
    steps.close()  # a reader that stops early
    assert [module.training for module in model.modules()] == before and model.gate.num_mtp is None
    with pytest.raises(UsageError):
        model.generate(prompt[None], num_masks=3)
    assert [module.training for module in model.modules()] == before and torch.is_grad_enabled()
    sums = model(build_masked_input([token_row([6])], 2), {"base": BaseCrossEntropy()}).sums
    sums["base"][0].total.backward()  # and it still trains
    assert model.mask_embeddings.grad is not None


@pytest.mark.parametrize("kind", ["quadratic", "linear", "autoregressive"])
@pytest.mark.parametrize("agree", RUNS)
def test_a_step_is_one_forward_pass_of_the_base(kind: str, agree: str, inject: Callable[..., InjectedDrafts]) -> None:
    model, (prompt, text) = shared_model("llama"), prompt_and_text("llama")
    inject(model, [[*prompt.tolist(), *text]], RUNS[agree])
    sizes: list[int] = []
    decoder = model.base.get_decoder()
    handle = decoder.register_forward_pre_hook(lambda _, a, kw: sizes.append(kw["inputs_embeds"].shape[1]), with_kwargs=True)
    out = model.generate(prompt[None], decoding=kind, num_masks=3, max_new_tokens=G)
    handle.remove()
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


class NoWaiting(TorchDispatchMode):
    """Refuses what makes the host wait for a device's values."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().split(".")[0]
        # Under inference mode reading a number is aten::item, else aten::_local_scalar_dense.
        if name in {
            f"aten::{op}" for op in ("item", "_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "equal")
        }:
            raise AssertionError(f"{name} waits for the device")
        return func(*args, **(kwargs or {}))


def make_step(
    model: MTPModel, tokens: Tensor, num_drafts: int, layouts: list[StepLayout], listed: bool = False, **options: Any
) -> StepInput:
    """A step over an empty cache; each row's drafts are its last tokens."""
    B = len(tokens)
    cache = RowCache(model.base, B)
    cache.reserve(20, 20)
    kinds = tuple(dict.fromkeys(layouts))
    choice = None if len(kinds) == 1 else torch.tensor([kinds.index(layout) for layout in layouts])
    positions, mask = StepMasks(model.base, CONTEXT).get(kinds, choice, cache, None)
    cache.begin_step(kinds[0].size, tokens, None)
    token_choice = TokenChoice(DecodingOptions(**options), list(range(B)), torch.device("cpu"))
    if listed:
        token_choice.shortlist = Shortlist(model.unembed, torch.arange(1, VOCAB, 9))
    ends = [layout.last + 1 for layout in layouts]
    scores = torch.randn(B, num_drafts, VOCAB, dtype=torch.float64) if token_choice.rejects else None
    return StepInput(
        tokens, num_drafts, None, scores, kinds, choice, positions, mask, ends, torch.tensor(ends), cache, token_choice, True
    )  # fmt: skip


SAMPLING = {"temperature": 0.8, "top_k": 50, "top_p": 0.9}


@pytest.mark.parametrize("head", ["none", "mlp", "gru"])
@pytest.mark.parametrize(
    "options",
    [{}, SAMPLING, {**SAMPLING, "verification": "rejection"}, {**SAMPLING, "verification": "rejection", "listed": True}],
    ids=["greedy", "coupled", "rejects", "listed"],
)
@pytest.mark.parametrize(
    ("num_drafts", "blocks"),
    [(0, ((5, 3),)), (3, ((2, 3), (3, 3), (4, 3), (5, 3))), (3, ((5, 3),)), (3, ((2, 1), (5, 3))), (3, ())],
)
def test_a_step_never_waits_for_the_device(
    head: str, options: dict[str, Any], num_drafts: int, blocks: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokens = shared_model("llama", head), torch.stack([token_row([6], seed=s).input_ids for s in (0, 1)])
    layout = StepLayout(6, 5 - num_drafts, blocks)
    with torch.inference_mode():
        torch.manual_seed(0)
        expected = decoding_step.decode_step(model, make_step(model, tokens, num_drafts, [layout] * 2, **options))
        torch.manual_seed(0)
        step = make_step(model, tokens, num_drafts, [layout] * 2, **options)

        def refuse(*args: Any) -> Any:
            raise AssertionError("a Python number is read from a tensor")

        for name in ("tolist", "item", "__bool__", "__int__", "__float__", "__index__", "numpy", "cpu"):
            monkeypatch.setattr(torch.Tensor, name, refuse)
        with NoWaiting():
            found = decoding_step.decode_step(model, step)
        monkeypatch.undo()
    assert torch.equal(found.own, expected.own) and torch.equal(found.num_accepted, expected.num_accepted)
    assert torch.equal(found.draft.tokens, expected.draft.tokens)
    assert found.draft.tokens.shape == (2, layout.depth) and found.own.shape == (2, num_drafts + 1)


def test_number_of_accepted_tokens() -> None:
    def count(draft: list[int], own: list[int]) -> int:
        return int(num_accepted(torch.tensor([draft], dtype=torch.int64), torch.tensor([own])))

    assert count([], [4]) == 0
    assert count([5, 6, 7], [5, 6, 7, 1]) == 3
    assert count([5, 6, 7], [5, 6, 9, 2]) == 2
    assert count([5, 6, 7], [4, 6, 7, 2]) == 0  # what comes after the first error does not count
