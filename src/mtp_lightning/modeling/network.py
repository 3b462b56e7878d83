# SPDX-License-Identifier: Apache-2.0
"""MTPNetwork: a frozen base with gated LoRA, mask tokens and a sampler head. Plain PyTorch, no Lightning.

Everything that touches base parameters (embedding, decoder, unembedding in losses, drafting) runs inside ``forward``:
sharded strategies gather parameters there.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple, Protocol, get_args

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from mtp_lightning.errors import UsageError
from mtp_lightning.losses.base import LossTerm
from mtp_lightning.losses.one_pass import loss_sums
from mtp_lightning.modeling.attention import attention_mask, per_layer_type
from mtp_lightning.modeling.block_attention import BLOCK_ATTENTION, supports_block_attention
from mtp_lightning.modeling.decoder import check_layer_types, context_length, run_decoder, text_config
from mtp_lightning.modeling.gated_lora import Gate, LoRA, add_gated_lora
from mtp_lightning.modeling.masking import AttentionPattern, attention_pattern, block_mask
from mtp_lightning.modeling.measurement import Measurement, measure
from mtp_lightning.modeling.transformers_private import (
    SwitchedAttention,
    checkpointing_options,
    enable_checkpointing,
    is_stateful,
)
from mtp_lightning.modeling.unembedding import FrozenUnembedding
from mtp_lightning.sampler_heads import SamplerHead
from mtp_lightning.types import HiddenStates, LossSum, MaskedInput, compute_dtype

MaskTokens = Literal["learned", "noise"]
"""What MTP positions hold."""


class NetworkStep(Protocol):
    """An input that runs itself on the network, so that everything runs inside the network's one ``forward``."""

    def run(self, network: MTPNetwork) -> Any:
        """Run on the network and return the output."""
        ...


class ForwardOutput(NamedTuple):
    """The output of a forward pass over a masked input."""

    sums: dict[str, Sequence[LossSum]]  # the sums of each loss term, by name
    measurement: Measurement | None  # teacher-forced figures, or None if not asked for
    states: HiddenStates  # hidden states


class MTPNetwork(nn.Module):
    """An existing causal language model that also predicts tokens further ahead.

    Args:
        base: the base model; it is frozen and gets LoRA layers in place.
        num_masks: number of mask tokens k, 1 or more.
        lora: settings of the gated LoRA.
        sampler_head: a head that is not built yet, or None to draft from the base head.
        tokenizer: the base's tokenizer, kept for saving and for text input and output.
        mask_tokens: what MTP positions hold. ``learned``: a trained embedding for each m_j. ``noise``: the embedding of a
            random token, another one in each row and epoch of training; the LoRA is then all that is trained but the head.

    Attributes:
        mask_embeddings: the trained embeddings, [k, D], or None with ``noise``.
        noise_tokens: with ``noise`` the tokens at the masks of a block in decoding, [k] int64, else empty.
        context: maximum number of positions of the base.
        base_model: name of the base: a folder, a hub id, or ``package://...``; empty if it was not loaded by name.
        revision: hub commit of the base, or None.
        acceptance: acceptance statistics for the model card, or None.
        lineage: training and licence for the model card, or None.
        decode_cache: prepared weights and buffers that decoding keeps between texts, or None. Only
            ``mtp_lightning.decoding`` uses it.
    """

    noise_tokens: Tensor

    def __init__(
        self,
        base: PreTrainedModel,
        num_masks: int = 8,
        lora: LoRA | None = None,
        sampler_head: SamplerHead | None = None,
        tokenizer: Any = None,
        mask_tokens: MaskTokens = "learned",
    ) -> None:
        super().__init__()
        if mask_tokens not in get_args(MaskTokens):
            raise UsageError(f"mask_tokens must be learned or noise, got {mask_tokens!r}.")
        if num_masks < 1:
            raise UsageError(f"num_masks must be 1 or more, got {num_masks}.")
        check_layer_types(text_config(base), is_stateful(base))
        self.num_masks = num_masks
        self.context = context_length(text_config(base))
        self.tokenizer = tokenizer
        self.base_model: str = base.name_or_path
        self.revision: str | None = None
        self.acceptance: dict[str, Any] | None = None
        self.lineage: dict[str, Any] | None = None
        self.decode_cache: Any = None
        self._unembedding: FrozenUnembedding | None = None

        self.lora = lora or LoRA()
        self.gate = Gate()
        self.base = base
        self.adapter_config = add_gated_lora(base, self.lora, self.gate)
        self.mask_tokens = mask_tokens
        learned = mask_tokens == "learned"
        self.mask_embeddings = nn.Parameter(_initial_mask_embeddings(base, num_masks)) if learned else None
        tokens = torch.tensor([] if learned else noise_tokens(num_masks, int(text_config(base).vocab_size)))
        self.register_buffer("noise_tokens", tokens.long().to(base.device), persistent=False)
        self.sampler_head = sampler_head
        if sampler_head is not None:
            sampler_head.build(int(text_config(base).hidden_size))
            sampler_head.to(device=base.device, dtype=compute_dtype(base.dtype))

    @property
    def is_sharded(self) -> bool:
        """True if parameters are spread over processes, which must then run every forward pass together."""
        return any(hasattr(parameter, "placements") for parameter in self.parameters())  # a DTensor

    @property
    def unembed(self) -> FrozenUnembedding:
        """The base's unembedding."""
        # Cached: a decoding step asks for it several times, and reading a configuration is slow.
        if self._unembedding is None or self._unembedding.head is not self.base.get_output_embeddings():
            self._unembedding = FrozenUnembedding(self.base)
        return self._unembedding

    def embed(self, tokens: Tensor) -> Tensor:
        """Embeddings of token ids as the decoder sees them, [..., D]."""
        return self.base.get_input_embeddings()(tokens)

    def mask_inputs(self) -> Tensor:
        """What the decoder sees at m_1..m_k in decoding, [k, D]."""
        return self.embed(self.noise_tokens) if self.mask_embeddings is None else self.mask_embeddings

    def _training_masks(self, batch: MaskedInput, dtype: torch.dtype) -> Tensor:
        """What the decoder sees at the masks of a masked input, [B, P, K, D]."""
        if self.mask_embeddings is None:
            return self.embed(batch.noise % self.unembed.vocab_size)
        B, P, K = batch.mtp_labels.shape
        return self.mask_embeddings[:K].to(dtype).expand(B, P, K, -1)

    def trained_parameters(self) -> Iterable[tuple[str, nn.Parameter]]:
        """Names and tensors of the trained parameters: LoRA, mask embeddings, sampler head."""
        return ((name, p) for name, p in self.named_parameters() if p.requires_grad)

    def enable_gradient_checkpointing(self) -> None:
        """Recompute decoder layers in the backward pass, non-reentrant, each with the gate of its forward pass."""
        enable_checkpointing(self.base, {"use_reentrant": False, "context_fn": self.gate.checkpoint_context})

    def forward(
        self, batch: MaskedInput | NetworkStep, losses: dict[str, LossTerm] | None = None, with_measurement: bool = False
    ) -> Any:
        """One forward pass of the base: over a masked input with its losses, or one decoding step.

        Args:
            batch: a masked input, or a step that runs itself on the network.
            losses: loss terms to compute on a masked input, by name.
            with_measurement: also compute the teacher-forced figures of a masked input.

        Returns:
            ``ForwardOutput`` for a masked input, else the step's own output.
        """
        if not isinstance(batch, MaskedInput):
            return batch.run(self)
        states = self.hidden_states(batch)
        sums = loss_sums(losses or {}, states, batch, self.unembed)
        measurement = measure(states, batch, self.unembed) if with_measurement else None
        return ForwardOutput(sums, measurement, states)

    def hidden_states(self, batch: MaskedInput) -> HiddenStates:
        """Embed, run the decoder and apply the sampler head.

        NTP states are detached when the LoRA is gated: they are the frozen base's. UsageError if the batch has more masks
        in a block than the model, or gradient checkpointing that loses the gate is on.
        """
        P, K = batch.mtp_labels.shape[1:]
        if K > self.num_masks:
            raise UsageError(f"the batch has {K} masks in a block, and the model has {self.num_masks}.")
        tokens = self.embed(batch.input_ids)
        masks = self._training_masks(batch, tokens.dtype)
        pattern = attention_pattern(batch, K)
        # transformers drops the cache under gradient checkpointing, and a gate that is always open leaves none to use.
        is_checkpointing = self._is_checkpointing()
        if self.lora.gated and not is_checkpointing:
            ntp, mtp = self._two_passes(tokens, masks, pattern)
        else:
            ntp, mtp = self._one_pass(tokens, masks, pattern)
        mtp = mtp.unflatten(1, (P, K))
        return HiddenStates(ntp, mtp, *self._sampler_states(batch, tokens, ntp, mtp))

    def _is_checkpointing(self) -> bool:
        """True under gradient checkpointing; refuses the kind that loses the gate."""
        layers = checkpointing_options(self.base) if self.training else []
        if any(options.get("use_reentrant", True) or "context_fn" not in options for options in layers):
            raise UsageError(
                "gradient checkpointing of the base is reentrant or unaware of the gate, which loses the LoRA's"
                " gradient. Use MTPModel.enable_gradient_checkpointing() or model.gradient_checkpointing: true."
            )
        return bool(layers)

    def _two_passes(self, tokens: Tensor, masks: Tensor, pattern: AttentionPattern) -> tuple[Tensor, Tensor]:
        """NTP positions [B, L, D] first and without gradient, then MTP positions [B, P, K, D] over their keys and values.

        The NTP positions are the frozen base's and see no mask, so no activation of theirs is kept and no gradient is
        computed for them.
        """
        L, K, masks = tokens.shape[1], masks.shape[2], masks.flatten(1, 2)
        cache, positions = DynamicCache(), pattern.position_ids
        with torch.no_grad(), self.gate.over_last(0):
            ntp = run_decoder(self.base, tokens, attention_mask(self.base, pattern, L, 0, L), positions[:, :L], cache)
        with self.gate.over_last(masks.shape[1]):
            if supports_block_attention(self.base):
                mask = per_layer_type(self.base, lambda window: block_mask(pattern, L, K, window))
                with SwitchedAttention(self.base, BLOCK_ATTENTION):
                    mtp = run_decoder(self.base, masks, mask, positions[:, L:], cache)
            else:
                mtp = run_decoder(self.base, masks, attention_mask(self.base, pattern, L, L), positions[:, L:], cache)
        return ntp, mtp

    def _one_pass(self, tokens: Tensor, masks: Tensor, pattern: AttentionPattern) -> tuple[Tensor, Tensor]:
        """All positions at once, under gradient checkpointing or with a gate that is always open."""
        L, gated, masks = tokens.shape[1], self.lora.gated, masks.flatten(1, 2)
        inputs, mask = torch.cat([tokens, masks], 1), attention_mask(self.base, pattern, L)
        with self.gate.over_last(masks.shape[1] if gated else inputs.shape[1]):
            hidden = run_decoder(self.base, inputs, mask, pattern.position_ids)
        return hidden[:, :L].detach() if gated else hidden[:, :L], hidden[:, L:]

    def _sampler_states(
        self, batch: MaskedInput, tokens: Tensor, ntp: Tensor, mtp: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        """The sampler head's output at MTP positions, given the true previous tokens, and at NTP positions."""
        head = self.sampler_head
        if head is None:
            return None, None
        dtype = next(head.parameters()).dtype
        previous = batch.at_anchors(tokens).to(dtype)
        sampler = head(mtp.to(dtype).flatten(0, 1), previous.flatten(0, 1)).view(mtp.shape).to(mtp.dtype)
        sampler_ntp = head(ntp.to(dtype), tokens.to(dtype)).to(mtp.dtype) if head.at_ntp else None
        return sampler, sampler_ntp


def noise_tokens(num_masks: int, vocab_size: int) -> list[int]:
    """The random tokens at m_1..m_k in decoding, the same in every text: multiples of the golden ratio, modulo 1."""
    return [(j * 0x9E3779B97F4A7C15 % 2**64) * vocab_size >> 64 for j in range(1, num_masks + 1)]


def _initial_mask_embeddings(base: PreTrainedModel, num_masks: int) -> Tensor:
    """Random vectors of the scale of token embeddings as the decoder sees them (Gemma's layer scales them), [K, D]."""
    embedding: Any = base.get_input_embeddings()
    ids = torch.arange(min(1000, int(embedding.weight.shape[0])), device=base.device)
    with torch.no_grad():
        seen = embedding(ids).to(compute_dtype(base.dtype))
    return torch.randn(num_masks, seen.shape[1], dtype=seen.dtype, device=base.device) * seen.std()
