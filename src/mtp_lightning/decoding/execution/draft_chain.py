# SPDX-License-Identifier: Apache-2.0
"""Sampler heads as they draft, one token after another; what does not depend on the previous token is computed per block.

A head's own ``step`` is the definition. ``GRUChain`` and ``MLPChain`` give the same outputs with fewer operations, from
weights that are split beforehand. A head of another class drafts through its ``step``.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtp_lightning.decoding.packed_linear import PackedLinear
from mtp_lightning.sampler_heads import GRUSamplerHead, MLPSamplerHead, SamplerHead

MAX_TABLE = 1 << 23
"""Elements of a table of what each token contributes; a larger one is not made, and contributions are computed."""


class DraftChain:
    """Drafts through the head's ``step``."""

    def __init__(self, head: SamplerHead, embedding: nn.Module) -> None:
        self.head, self.embedding = head, embedding
        self.compute_dtype = next(head.parameters()).dtype

    def begin(self, hidden: Tensor) -> None:
        """Start with the hidden states of one block per row, [B, J, D]."""
        self.hidden, self.state = hidden, None

    def next(self, j: int, previous: Tensor) -> Tensor:
        """The state for the unembedding at m_{j + 1}, [B, D], after the token before it, [B] int64."""
        embedded = self.embedding(previous).to(self.compute_dtype)
        output, self.state = self.head.step(self.hidden[:, j].to(self.compute_dtype), embedded, self.state)
        return output.to(self.hidden.dtype)


Norm = tuple[Tensor, Tensor, float]


class _UnrolledChain:
    """What both unrolled heads share: the contribution of the previous token to the head's first product.

    ``token_weight`` [n, D] is that product's weight for the embedding; ``dtype`` is the compute dtype.
    """

    def __init__(self, token_weight: Tensor, embedding: nn.Module, vocab_size: int, dtype: torch.dtype) -> None:
        self.embedding, self.dtype = embedding, dtype
        self.token_weight = self._prepared(token_weight).t()
        self.table: Tensor | None = None
        if vocab_size * token_weight.shape[0] <= MAX_TABLE:
            # In the head's own precision, and through the embedding layer: Gemma's scales.
            tokens = torch.arange(vocab_size, device=token_weight.device)
            embedded = embedding(tokens).to(token_weight.dtype)
            self.table = F.linear(embedded, token_weight.detach()).to(dtype)

    def _prepared(self, weight: Tensor) -> Tensor:
        return weight.detach().to(self.dtype)

    def _linear(self, layer: nn.Linear) -> PackedLinear:
        return PackedLinear(self._prepared(layer.weight), self._prepared(layer.bias))

    def _norm(self, layer: nn.LayerNorm) -> Norm:
        return self._prepared(layer.weight), self._prepared(layer.bias), layer.eps

    def add_token(self, base: Tensor, previous: Tensor) -> Tensor:
        """``base`` [B, n] plus the contribution of the tokens [B]."""
        if self.table is not None:
            return base + self.table.index_select(0, previous)
        return torch.addmm(base, self.embedding(previous).to(base.dtype), self.token_weight)


class GRUChain(_UnrolledChain):
    """``GRUSamplerHead`` unrolled."""

    def __init__(self, head: GRUSamplerHead, embedding: nn.Module, vocab_size: int, dtype: torch.dtype) -> None:
        width, w = head.output.weight.shape
        gru: Any = head.gru
        super().__init__(gru.weight_ih_l0[:, :width], embedding, vocab_size, dtype)
        self.w = w
        # What the hidden state adds to the gates (with read_hidden) and to the first layer: one product per block.
        gates_weight = gru.weight_ih_l0[:, width:]
        if not head.read_hidden:
            gates_weight = gates_weight.new_zeros(0, width)
        hidden_weight = torch.cat([gates_weight, head.first.weight[:, w:]])
        hidden_bias = torch.cat([gru.bias_ih_l0[: len(gates_weight)], head.first.bias])
        self.from_hidden = PackedLinear(self._prepared(hidden_weight), self._prepared(hidden_bias))
        self.input_bias = self._prepared(gru.bias_ih_l0)
        self.recurrent_bias = self._prepared(gru.bias_hh_l0)
        self.recurrent = PackedLinear(self._prepared(gru.weight_hh_l0), self.recurrent_bias)
        self.first = PackedLinear(self._prepared(head.first.weight[:, :w]))
        self.second = self._linear(head.second)
        self.first_norm, self.second_norm = self._norm(head.first_norm), self._norm(head.second_norm)
        self.output, self.output_bias = PackedLinear(self._prepared(head.output.weight)), self._prepared(head.output.bias)

    def begin(self, hidden: Tensor) -> None:
        """See ``DraftChain``."""
        B, J, D = hidden.shape
        self.hidden_dtype = hidden.dtype
        from_hidden = self.from_hidden(hidden.reshape(B * J, D).to(self.dtype)).view(B, J, -1)
        self.at_first = from_hidden[..., -self.w :].unbind(1)
        gates = from_hidden[..., : -self.w]
        self.at_gates = gates.unbind(1) if gates.shape[-1] else [self.input_bias.expand(B, -1)] * J
        self.residual = (hidden.to(self.dtype) + self.output_bias).unbind(1)
        self.state: Tensor | None = None

    def next(self, j: int, previous: Tensor) -> Tensor:
        """See ``DraftChain``."""
        w, state = self.w, self.state
        # The GRU's equations; state None stands for zeros. Gates in PyTorch's order: reset, update, new.
        inputs = self.add_token(self.at_gates[j], previous)
        recurrent = self.recurrent_bias.expand_as(inputs) if state is None else self.recurrent(state)
        reset_update = (inputs[:, : 2 * w] + recurrent[:, : 2 * w]).sigmoid_()
        candidate = torch.addcmul(inputs[:, 2 * w :], reset_update[:, :w], recurrent[:, 2 * w :]).tanh_()
        update = reset_update[:, w:]
        state = candidate - candidate * update if state is None else torch.lerp(candidate, state, update)
        self.state = state
        # The correction of the hidden state.
        u = F.silu(self.first.plus(self.at_first[j], state))
        u = F.layer_norm(u, (w,), *self.first_norm)
        second = F.layer_norm(F.silu(self.second(u)), (w,), *self.second_norm)
        return self.output.plus(self.residual[j], u + second).to(self.hidden_dtype)


class MLPChain(_UnrolledChain):
    """``MLPSamplerHead`` unrolled."""

    def __init__(self, head: MLPSamplerHead, embedding: nn.Module, vocab_size: int, dtype: torch.dtype) -> None:
        layers: Any = head.layers
        first, _, first_norm, second, _, second_norm = layers
        self.width: int = second.weight.shape[1]
        super().__init__(first.weight[:, : self.width], embedding, vocab_size, dtype)
        self.from_hidden = PackedLinear(self._prepared(first.weight[:, self.width :]), self._prepared(first.bias))
        self.second = self._linear(second)
        self.first_norm, self.second_norm = self._norm(first_norm), self._norm(second_norm)

    def begin(self, hidden: Tensor) -> None:
        """See ``DraftChain``."""
        B, J, D = hidden.shape
        self.hidden_dtype = hidden.dtype
        self.at_first = self.from_hidden(hidden.reshape(B * J, D).to(self.dtype)).view(B, J, -1).unbind(1)

    def next(self, j: int, previous: Tensor) -> Tensor:
        """See ``DraftChain``."""
        u = F.layer_norm(F.silu(self.add_token(self.at_first[j], previous)), (self.width,), *self.first_norm)
        u = F.silu(self.second(u))
        return F.layer_norm(u, (self.width,), *self.second_norm).to(self.hidden_dtype)


Chain = DraftChain | GRUChain | MLPChain


def unrolled_chain(head: SamplerHead, embedding: nn.Module, vocab_size: int, dtype: torch.dtype) -> Chain:
    """The fastest chain of a head; ``dtype`` is the compute dtype of an unrolled one."""
    if type(head) is GRUSamplerHead:
        return GRUChain(head, embedding, vocab_size, dtype)
    if type(head) is MLPSamplerHead:
        return MLPChain(head, embedding, vocab_size, dtype)
    return DraftChain(head, embedding)
