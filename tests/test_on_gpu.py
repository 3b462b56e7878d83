# SPDX-License-Identifier: Apache-2.0
"""What only a GPU can show: its kernels, CUDA graphs, FlexAttention in training. Without one, what can run on a CPU."""

from __future__ import annotations

import warnings

import pytest
import torch
from tiny import greedy_text, learn, tiny_base, tiny_model, token_row

from mtp_lightning import MTPModel
from mtp_lightning.decoding.options import DecodingOptions
from mtp_lightning.evaluation.decoded_text import decode_batch
from mtp_lightning.evaluation.losslessness import find_difference
from mtp_lightning.losses import BaseCrossEntropy, LatentConsistency, SamplerCrossEntropy, term_value
from mtp_lightning.modeling.masking import build_masked_input
from mtp_lightning.sampler_heads import GRUSamplerHead
from mtp_lightning.text.prompts import Prompt

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NUM_MASKS, NUM_TOKENS = 4, 40
# FlexAttention's kernels take heads of 16 or more.
SIZES = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32, "initializer_range": 0.15}
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")


@pytest.fixture(scope="module")
def prompts() -> list[Prompt]:
    return [Prompt("", token_row([7 + n], seed=n).input_ids.tolist(), "") for n in range(4)]


@pytest.fixture(scope="module")
def trained(prompts: list[Prompt]) -> dict[str, torch.Tensor]:
    """Weights of a model whose drafts are often right and often not, in float32."""
    base = tiny_base("qwen3", torch.float32, **SIZES)
    texts = [torch.tensor([*p.input_ids, *greedy_text(base, torch.tensor(p.input_ids), NUM_TOKENS)]) for p in prompts]
    return learn(build(torch.float32, "cpu"), texts, steps=30).state_dict()


def build(dtype: torch.dtype, device: str, kernel: str = "sdpa") -> MTPModel:
    head = GRUSamplerHead(32)
    return tiny_model("qwen3", NUM_MASKS, head, dtype=torch.float32, attn_implementation=kernel, **SIZES).to(device, dtype)


def load(weights: dict[str, torch.Tensor], dtype: torch.dtype) -> MTPModel:
    model = build(dtype, DEVICE)
    model.load_state_dict(weights)
    return model.eval()


@pytest.mark.parametrize("decoding", ["quadratic", "linear"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_texts_differ_at_near_ties_only(trained, prompts: list[Prompt], dtype: torch.dtype, decoding: str) -> None:
    model = load(trained, dtype)
    options = DecodingOptions(decoding=decoding, num_masks=NUM_MASKS, max_new_tokens=NUM_TOKENS, eos_token_id=[])
    texts, _ = decode_batch(model, prompts, options)
    assert sum(sum(text.accepted) for text in texts) > 10
    # 64 roundings of 1: logits are below 16, and each layer rounds.
    bound = 64 * torch.finfo(dtype).eps
    for prompt, text in zip(prompts, texts, strict=True):
        difference = find_difference(model, prompt, options, text.tokens)
        assert difference is None or difference.gap < bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exact_texts_are_equal(trained, prompts: list[Prompt], dtype: torch.dtype) -> None:
    model = load(trained, dtype)
    texts = {
        decoding: decode_batch(
            model,
            prompts,
            DecodingOptions(decoding=decoding, num_masks=NUM_MASKS, max_new_tokens=NUM_TOKENS, eos_token_id=[], exact=True),
        )[0]
        for decoding in ("autoregressive", "quadratic", "linear")
    }
    plain = [text.tokens for text in texts["autoregressive"]]
    assert [text.tokens for text in texts["quadratic"]] == plain == [text.tokens for text in texts["linear"]]
    assert sum(sum(text.accepted) for text in texts["quadratic"]) > 10


@needs_gpu
@pytest.mark.parametrize("decoding", ["quadratic", "linear", "autoregressive"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_are_cuda_graphs(trained, prompts, dtype: torch.dtype, decoding: str, monkeypatch) -> None:
    model, replays = load(trained, dtype), []
    replay = torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: (replays.append(graph), replay(graph))[1])
    options = DecodingOptions(decoding=decoding, max_new_tokens=NUM_TOKENS, eos_token_id=[], compile=True)
    if decoding != "autoregressive":
        options.num_masks = NUM_MASKS
    with warnings.catch_warnings():
        warnings.filterwarnings("error", category=UserWarning, module=r"mtp_lightning\.")  # steps could not be compiled
        for group in (prompts, prompts[:1], prompts):
            texts, _ = decode_batch(model, group, options)
            for prompt, text in zip(group, texts, strict=True):
                eager = DecodingOptions(decoding=decoding, max_new_tokens=NUM_TOKENS, eos_token_id=[])
                difference = find_difference(model, prompt, eager, text.tokens)
                assert difference is None or difference.gap < 64 * torch.finfo(dtype).eps
    assert len(replays) > 10


@needs_gpu
def test_flex_attention_trains_as_sdpa_does() -> None:
    rows = [token_row([40, 20], row_id=0), token_row([50], row_id=1)]
    batch = build_masked_input(rows, NUM_MASKS).to(DEVICE)
    terms = {"base": BaseCrossEntropy(), "sampler": SamplerCrossEntropy(), "lcm": LatentConsistency()}
    gradients, losses = {}, {}
    for kernel in ("sdpa", "flex_attention"):
        model = build(torch.float32, DEVICE, kernel).train()
        sums = model(batch, terms).sums
        loss = torch.stack([term_value(s, batch.counts) for s in sums.values()]).sum()
        loss.backward()
        losses[kernel] = loss.item()
        gradients[kernel] = {name: parameter.grad for name, parameter in model.trained_parameters()}
    # 2 %: FlexAttention's kernels round float32 to 19 bits (TF32) before they multiply.
    assert losses["flex_attention"] == pytest.approx(losses["sdpa"], rel=0.02)
    for name, expected in gradients["sdpa"].items():
        assert expected is not None and (gradients["flex_attention"][name] - expected).norm() <= 0.02 * expected.norm()
