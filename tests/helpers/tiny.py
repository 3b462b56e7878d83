# SPDX-License-Identifier: Apache-2.0
"""Tiny random Hugging Face models, one per architecture, and MTP models on top of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from mtp_lightning.losses import BaseCrossEntropy, SamplerCrossEntropy, term_value
from mtp_lightning.model import MTPModel
from mtp_lightning.modeling.gated_lora import LoRA
from mtp_lightning.modeling.masking import build_masked_input
from mtp_lightning.modeling.network import MaskTokens
from mtp_lightning.modeling.peft_private import lora_layers
from mtp_lightning.sampler_heads import SamplerHead
from mtp_lightning.types import IGNORE_INDEX, MaskedInput, TokenRow

VOCAB, CONTEXT, WINDOW = 97, 64, 5
"""WINDOW is shorter than the rows and texts of the tests, and shorter than the 8 masks of a block."""

_EXPERTS = {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2}
_MIXED = {
    "num_hidden_layers": 3,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "sliding_window": WINDOW,
}
_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "qwen2": ("qwen2", {}),
    "qwen2-window": ("qwen2", {**_MIXED, "use_sliding_window": True}),
    "qwen3": ("qwen3", {}),
    "qwen3-window": ("qwen3", {**_MIXED, "use_sliding_window": True}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral-window": ("mistral", {"sliding_window": WINDOW}),
    "gemma2": ("gemma2", {**_MIXED, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}),
    "gemma3": ("gemma3_text", {**_MIXED, "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 8}),
    "phi3": ("phi3", {}),
    "phi3-window": ("phi3", {"sliding_window": WINDOW}),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo3", _MIXED),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0]}),
    "qwen3_moe": ("qwen3_moe", _EXPERTS),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
}
ARCHITECTURES = list(_CONFIGS)
FEW = ["llama", "gemma3", "qwen3_moe"]
"""For tests that need not run on all: a plain one, one with sliding windows and scaled embeddings, one with experts."""
EXPERTS = {"qwen3_moe", "mixtral"}


def tiny_base(
    architecture: str = "llama", dtype: torch.dtype = torch.float64, seed: int = 0, **overrides: Any
) -> PreTrainedModel:
    """A random model of 2 or 3 layers and width 32 in evaluation mode; ``overrides`` go to its configuration."""
    model_type, options = _CONFIGS[architecture]
    settings = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": CONTEXT,
        "initializer_range": 0.3,  # at the usual 0.02 the greedy text is one token repeated
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        "tie_word_embeddings": False,
        **options,
        **overrides,
    }
    kernel = settings.pop("attn_implementation", None)
    torch.manual_seed(seed)
    config = AutoConfig.for_model(model_type, **settings)
    base = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=kernel)
    if architecture in EXPERTS and dtype == torch.float64:
        base.set_experts_implementation("eager")  # the default, grouped_mm, has no float64
    with torch.no_grad():
        for p in base.parameters():
            if p.ndim == 1:  # norms and biases start at constants, where a norm left out would not be seen
                p.add_(0.2 * torch.randn_like(p))
    return base.to(dtype).eval()


def tiny_model(
    architecture: str = "llama",
    num_masks: int = 3,
    sampler_head: SamplerHead | None = None,
    lora: LoRA | None = None,
    base: PreTrainedModel | None = None,
    mask_tokens: MaskTokens = "learned",
    **base_options: Any,
) -> MTPModel:
    """An MTP model in evaluation mode whose adapters, mask embeddings and sampler head are all far from their start."""
    base = tiny_base(architecture, **base_options) if base is None else base
    torch.manual_seed(1)
    model = MTPModel(base, num_masks, lora or LoRA(rank=4), sampler_head, mask_tokens=mask_tokens)
    with torch.no_grad():
        for layer in lora_layers(base):
            layer.lora_B["default"].weight.normal_(std=0.1)
        for p in () if sampler_head is None else sampler_head.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model.eval()


def learn(model: MTPModel, texts: Sequence[Tensor], steps: int) -> MTPModel:
    """The model, trained for ``steps`` on all of the texts: its drafts are often right and often not."""
    batch = build_masked_input([TokenRow(t, t, torch.zeros_like(t), r) for r, t in enumerate(texts)], model.num_masks)
    terms = {"base": BaseCrossEntropy(), "sampler": SamplerCrossEntropy()}
    optimizer = torch.optim.AdamW([p for _, p in model.trained_parameters()], lr=1e-2)
    for _ in range(steps):
        sums = model(batch, terms).sums
        optimizer.zero_grad()
        torch.stack([term_value(s, batch.counts) for s in sums.values()]).sum().backward()
        optimizer.step()
    return model


def tolerance(base: PreTrainedModel) -> dict[str, float]:
    """How far two float64 computations of the same states may be apart when tensors have other shapes.

    1e-9: rounding of 1e-16, through the layers with gains well below 1e6. Transformers' eager kernel takes its softmax in
    float32 whatever the model's dtype, so sums over other numbers of keys differ by 1e-7 a layer.
    """
    bound = 1e-5 if base.config._attn_implementation == "eager" else 1e-9
    return {"rtol": bound, "atol": bound}


def in_one_pass(model: MTPModel) -> MTPModel:
    """The same model, changed to feed NTP and MTP positions together, as it does under gradient checkpointing."""
    model._two_passes = model._one_pass  # type: ignore[method-assign]
    return model


def token_row(documents: Sequence[int] = (9,), ignored: Sequence[int] = (), row_id: int = 0, seed: int = 0) -> TokenRow:
    """A row of random tokens: documents of the given lengths, packed; tokens at ``ignored`` carry no loss."""
    ids = torch.randint(VOCAB, (sum(documents),), generator=torch.Generator().manual_seed(1000 * seed + row_id))
    labels = ids.clone()
    labels[list(ignored)] = IGNORE_INDEX
    return TokenRow(ids, labels, torch.arange(len(documents)).repeat_interleave(torch.tensor(documents)), row_id)


def tiny_rows() -> list[TokenRow]:
    """Five rows: one with ignored labels, one packed, one of few tokens, one too short for any block, one plain."""
    return [
        token_row([13], [0, 1, 6], 0),
        token_row([5, 2, 4], [5], 1),
        token_row([3], (), 2),
        token_row([2], (), 3),
        token_row([12], (), 4),
    ]


def tiny_batch(num_masks: int = 3, **options: Any) -> MaskedInput:
    """The batch of ``tiny_rows``."""
    return build_masked_input(tiny_rows(), num_masks, **options)


@torch.no_grad()
def naive_states(model: MTPModel, tokens: Tensor, num_masks: int) -> tuple[Tensor, Tensor]:
    """One prompt of the paper alone: ``tokens`` [n], then m_1..m_J, as a plain causal sequence.

    transformers builds mask and position ids itself. Returns the hidden states at the tokens [n, D] and the masks [J, D].
    """
    inputs = torch.cat([model.embed(tokens), model.mask_embeddings[:num_masks].to(model.base.dtype)])
    with model.gate.over_last(num_masks):
        hidden = model.base.get_decoder()(inputs_embeds=inputs[None], use_cache=False).last_hidden_state[0]
    return hidden[: len(tokens)], hidden[len(tokens) :]


def greedy_text(base: PreTrainedModel, prompt: Tensor, num_tokens: int, **options: Any) -> list[int]:
    """The greedy text of transformers' own ``generate`` after ``prompt`` [n]; the reference of all exactness tests."""
    # A pad token that is given: else transformers warns on every call.
    settings = {"do_sample": False, "max_new_tokens": num_tokens, "pad_token_id": 0, **options}
    out = base.generate(prompt[None], attention_mask=torch.ones_like(prompt)[None], **settings)
    return out[0, len(prompt) :].tolist()
