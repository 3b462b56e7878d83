# SPDX-License-Identifier: Apache-2.0
"""Model classes of vLLM whose forward pass also runs blocks of masks, after the scheduler's tokens.

The scheduler, the KV cache manager and the rejection sampler see an ordinary model with k speculative tokens. Masks exist
inside ``forward`` only: they have no slot in the KV cache, and nothing is to be rolled back.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
import vllm
from torch import Tensor
from vllm.forward_context import get_forward_context
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.mistral import MistralForCausalLM
from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM
from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM

from mtp_lightning.integrations.vllm.attention_layers import add_masks_to
from mtp_lightning.integrations.vllm.choose_loads import choose_loads
from mtp_lightning.integrations.vllm.cpu_sampling import repair_cpu_sampling
from mtp_lightning.integrations.vllm.drafting import draft_greedily
from mtp_lightning.integrations.vllm.folder import read_parts
from mtp_lightning.integrations.vllm.gated_layers import gate_layers
from mtp_lightning.integrations.vllm.layout import Layout, make_layout, mask_positions
from mtp_lightning.integrations.vllm.load_table import LoadTable, default_loads, parse_loads
from mtp_lightning.integrations.vllm.measured_costs import measured_costs
from mtp_lightning.integrations.vllm.pass_state import PassState
from mtp_lightning.integrations.vllm.settings import check_attention, check_engine, check_version, read_settings

MAX_JOINT_MASKS = {"cpu": 16, "cuda": 128}
"""Masks of a pass up to which their logits are computed with those of verification, so that the unembedding is read once.

The same as in ``decoding/execution/step.py``.
"""

_LOG = init_logger("vllm.mtp_lightning")  # vLLM shows the loggers below its own

check_version(vllm.__version__)


class _Unembedding:
    """The base's output layer, as ``Candidates`` reads it: it has no bias in the bases that are supported."""

    def __init__(self, model: Any) -> None:
        self.model, self.vocab_size = model, int(model.config.vocab_size)
        self.head = SimpleNamespace(weight=getattr(model.lm_head, "weight", None), bias=None)

    @property
    def has_rows(self) -> bool:
        """True if the rows of the weight can be read one by one."""
        return self.head.weight is not None and isinstance(self.model.lm_head.quant_method, UnquantizedEmbeddingMethod)

    def __call__(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of hidden states [..., D]."""
        logits: Tensor = self.model.plain_logits(hidden.flatten(0, -2))
        return logits.view(*hidden.shape[:-1], -1)

    def scale_and_cap(self, logits: Tensor) -> Tensor:
        """Scale raw logits of any part of the vocabulary."""
        return logits * self.model.logits_processor.scale


class _Served:
    """What the plugin adds to a model. Not a module: vLLM's loader asks for every parameter in the base's checkpoint."""

    def __init__(self, vllm_config: Any, device: torch.device) -> None:
        settings, model_config = read_settings(vllm_config), vllm_config.model_config
        self.parts = read_parts(
            settings.folder, model_config.hf_text_config, model_config.model, model_config.trust_remote_code
        )
        check_engine(vllm_config, self.parts.num_masks)
        scheduler, k = vllm_config.scheduler_config, vllm_config.speculative_config.num_speculative_tokens
        self.settings, self.max_requests, self.num_masks = settings, scheduler.max_num_seqs, k
        loads = default_loads(settings.decoding, k) if settings.load_table is None else settings.load_table
        self.table = LoadTable(parse_loads(loads, k), scheduler.max_num_batched_tokens)
        self.max_joint_masks = MAX_JOINT_MASKS.get(device.type, 0)
        self.last_position = model_config.max_model_len - 1
        self.state = PassState(
            max_masks=scheduler.max_num_batched_tokens,
            max_requests=scheduler.max_num_seqs,
            width=self.parts.mask_embeddings.shape[1],
            dtype=model_config.dtype,
            device=device,
        )

    def finish(self, model: Any) -> None:
        """Move the trained parts to the base's weights, which are loaded now."""
        parameter = next(model.parameters())
        gate_layers(model, self.state, self.parts.lora)
        self.mask_embeddings = self.parts.mask_embeddings.to(parameter)
        self.head = self.parts.sampler_head
        if self.head is not None:
            self.head.to(parameter)
        self.unembed, count = _Unembedding(model), self.settings.draft_candidates
        whole = count == "all" or int(count) >= self.unembed.vocab_size or not self.unembed.has_rows
        self.num_candidates = None if whole else int(count)
        self.uses_base_head = self.head is None or self.num_candidates is not None


_Model: Any = LlamaForCausalLM if TYPE_CHECKING else object  # the class of vLLM that it is put before


class MTPMixin(_Model):
    """Put before a base's class of vLLM."""

    def __init__(self, *, vllm_config: Any, prefix: str = "", **options: Any) -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix, **options)
        self.mtp: _Served
        self.__dict__["mtp"] = _Served(vllm_config, next(self.parameters()).device)
        layers = [module for module in self.modules() if isinstance(module, Attention)]
        check_attention(layers)
        for layer in layers:
            add_masks_to(layer, self.mtp.state)
        if self.mtp.state.device.type == "cpu":
            repair_cpu_sampling()

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load the base's weights and the trained parts."""
        loaded: set[str] = super().load_weights(weights)
        self.mtp.finish(self)
        return loaded

    def forward(
        self, input_ids: Tensor, positions: Tensor, intermediate_tensors: Any = None, inputs_embeds: Tensor | None = None
    ) -> Tensor:
        """Hidden states of the scheduler's tokens, [T, D]; those of the masks are kept for the proposer."""
        mtp, T = self.mtp, positions.shape[0]
        layout = self._layout(T)
        # A compiled decoder must always be called the same way, so with embeddings, masks or not.
        tokens = self.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds
        if layout is None:
            hidden: Tensor = super().forward(None, positions, intermediate_tensors, tokens)
            mtp.state.keep(None, None)
            return hidden
        masks = mtp.mask_embeddings[: layout.blocks.masks].repeat(layout.num_requests * layout.blocks.number, 1)
        mask_ids = mask_positions(layout, mtp.last_position).to(positions.dtype)
        with mtp.state.running(layout):
            hidden = super().forward(
                None, torch.cat([positions, mask_ids]), intermediate_tensors, torch.cat([tokens, masks])
            )
        mtp.state.keep(layout, hidden[T:])
        return hidden[:T]

    def _layout(self, num_tokens: int) -> Layout | None:
        """The masks of the coming pass; None if it has none.

        While vLLM measures memory there are none either: it then passes as many tokens as rows are allowed, masks included.
        """
        metadata = get_forward_context().attn_metadata
        if not metadata:
            return None
        one = next(iter(metadata.values()))
        blocks = self.mtp.table.choose(one.seq_lens.shape[0], num_tokens)
        return make_layout(num_tokens, one.query_start_loc, one.seq_lens, blocks) if blocks.rows else None

    def plain_logits(self, hidden: Tensor) -> Tensor:
        """Logits of hidden states, [N, V]."""
        logits: Tensor = super().compute_logits(hidden)
        return logits

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        """Logits of hidden states, [N, V]; in the same product those of the pass's masks, if they are few and needed."""
        state = self.mtp.state
        if state.logits is not None or not self.mtp.uses_base_head:
            return self.plain_logits(hidden_states)
        masks = state.mask_states()
        if not 0 < len(masks) <= self.mtp.max_joint_masks:
            return self.plain_logits(hidden_states)
        logits = self.plain_logits(torch.cat([hidden_states, masks]))
        state.logits = logits[len(hidden_states) :]
        return logits[: len(hidden_states)]

    def measure_loads(self, vllm_config: Any) -> None:
        """On a CPU, and without a table of the user's: make it from what passes cost here. Call it when all is loaded."""
        mtp = self.mtp
        if mtp.state.device.type != "cpu" or mtp.settings.load_table is not None:
            return
        cost = measured_costs(self, vllm_config)
        loads = choose_loads(cost, mtp.settings.decoding, mtp.num_masks, mtp.max_requests)
        mtp.table = LoadTable(parse_loads(loads, mtp.num_masks), mtp.table.max_rows)
        _LOG.info("load_table by measured costs: %s", json.dumps(loads))

    def draft(self, hidden: Tensor, logits: Tensor | None, verified: Tensor) -> Tensor:
        """Draft tokens [B, k] int64, from hidden states of blocks [B, k, D] and the token at m_1's position [B].

        ``logits`` are the base head's of these hidden states, [B, k, V], if they are known.
        """
        mtp = self.mtp
        return draft_greedily(mtp.head, self.embed_input_ids, mtp.unembed, hidden, logits, verified, mtp.num_candidates)


class MTPLlamaForCausalLM(MTPMixin, LlamaForCausalLM):
    """Llama."""


class MTPMistralForCausalLM(MTPMixin, MistralForCausalLM):
    """Mistral."""


class MTPQwen2ForCausalLM(MTPMixin, Qwen2ForCausalLM):
    """Qwen 2 and 2.5."""


class MTPQwen3ForCausalLM(MTPMixin, Qwen3ForCausalLM):
    """Qwen 3."""
