# SPDX-License-Identifier: Apache-2.0
"""Sampler heads unrolled for drafting: what does not depend on the token before is computed for a whole block at once.

The heads' own ``step`` is the definition; these give the same outputs with fewer operations, from weights that are cut
into their parts beforehand. A head of another class drafts through its ``step``.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtp_lightning.decoding.packed_linear import PackedLinear
from mtp_lightning.sampler_heads import GRUSamplerHead, MLPSamplerHead, SamplerHead

LARGEST_TABLE = 1 << 23
"""Numbers in a table of what each token adds; a larger one is computed for the tokens that occur instead."""


class DraftChain:
    """The head's outputs at the masks of a block, one after another, through the head's ``step``.

    Args:
        head: the head.
        embedding: the base's embedding layer.
    """

    def __init__(self, head: SamplerHead, embedding: nn.Module) -> None:
        self.head, self.embedding = head, embedding
        self.wide = next(head.parameters()).dtype

    def begin(self, hidden: Tensor) -> None:
        """Take the hidden states of a block a row, [B, J, D]."""
        self.hidden, self.state = hidden, None

    def next(self, j: int, previous: Tensor) -> Tensor:
        """What the unembedding is applied to at m_{j + 1}, [B, D], after the token before it, [B] int64."""
        embedded = self.embedding(previous).to(self.wide)
        output, self.state = self.head.step(self.hidden[:, j].to(self.wide), embedded, self.state)
        return output.to(self.hidden.dtype)


class _Unrolled:
    """What the unrolled heads share: the part that the token before adds to the head's first product.

    Args:
        weight: the product's weight for the embedding, [n, D].
        embedding: the base's embedding layer.
        vocab_size: V.
        dtype: what to compute in.
    """

    def __init__(self, weight: Tensor, embedding: nn.Module, vocab_size: int, dtype: torch.dtype) -> None:
        self.embedding = embedding
        self.weight = weight.detach().to(dtype).t()
        self.table: Tensor | None = None
        if vocab_size * weight.shape[0] <= LARGEST_TABLE:
            # Computed in the head's own precision, through the layer: Gemma's scales.
            tokens = torch.arange(vocab_size, device=weight.device)
            self.table = F.linear(embedding(tokens).to(weight.dtype), weight.detach()).to(dtype)

    def added(self, base: Tensor, previous: Tensor) -> Tensor:
        """``base`` [B, n] plus the part of the tokens [B]."""
        if self.table is not None:
            return base + self.table.index_select(0, previous)
        return torch.addmm(base, self.embedding(previous).to(base.dtype), self.weight)


class GRUChain(_Unrolled):
    """``GRUSamplerHead`` unrolled.

    Args:
        head: the head.
        embedding: the base's embedding layer.
        vocab_size: V.
        dtype: what to compute in.
    """

    def __init__(self, head: GRUSamplerHead, embedding: nn.Module, vocab_size: int, dtype: torch.dtype) -> None:
        width, w = head.output.weight.shape
        gru: Any = head.gru
        super().__init__(gru.weight_ih_l0[:, :width], embedding, vocab_size, dtype)
        self.w = w

        def ready(weight: Tensor) -> Tensor:
            return weight.detach().to(dtype)

        # The part that the hidden state adds to the gates (with read_hidden) and to the first layer: one product a block.
        read = gru.weight_ih_l0[:, width:]
        if not head.read_hidden:
            read = read.new_zeros(0, width)
        hidden_bias = torch.cat([gru.bias_ih_l0[: len(read)], head.first.bias])
        self.from_hidden = PackedLinear(ready(torch.cat([read, head.first.weight[:, w:]])), ready(hidden_bias))
        self.input_bias = ready(gru.bias_ih_l0)
        self.recurrent_bias = ready(gru.bias_hh_l0)
        self.recurrent = PackedLinear(ready(gru.weight_hh_l0), self.recurrent_bias)
        self.first = PackedLinear(ready(head.first.weight[:, :w]))
        self.first_norm = (ready(head.first_norm.weight), ready(head.first_norm.bias), head.first_norm.eps)
        self.second = PackedLinear(ready(head.second.weight), ready(head.second.bias))
        self.second_norm = (ready(head.second_norm.weight), ready(head.second_norm.bias), head.second_norm.eps)
        self.output, self.output_bias = PackedLinear(ready(head.output.weight)), ready(head.output.bias)
        self.dtype = dtype

    def begin(self, hidden: Tensor) -> None:
        """See ``DraftChain``."""
        B, J, D = hidden.shape
        self.hidden = hidden
        read = self.from_hidden(hidden.reshape(B * J, D).to(self.dtype)).view(B, J, -1)
        self.at_first = read[..., -self.w :].unbind(1)
        gates = read[..., : -self.w]
        self.at_gates = gates.unbind(1) if gates.shape[-1] else [self.input_bias.expand(B, -1)] * J
        self.ends = (hidden.to(self.dtype) + self.output_bias).unbind(1)
        self.state: Tensor | None = None

    def next(self, j: int, previous: Tensor) -> Tensor:
        """See ``DraftChain``."""
        w, state = self.w, self.state
        inputs = self.added(self.at_gates[j], previous)
        if state is None:
            reset_update, new = (inputs[:, : 2 * w] + self.recurrent_bias[: 2 * w]).sigmoid_(), self.recurrent_bias[2 * w :]
        else:
            recurrent = self.recurrent(state)
            reset_update, new = (inputs[:, : 2 * w] + recurrent[:, : 2 * w]).sigmoid_(), recurrent[:, 2 * w :]
        candidate = torch.addcmul(inputs[:, 2 * w :], reset_update[:, :w], new).tanh_()
        update = reset_update[:, w:]
        state = candidate - candidate * update if state is None else torch.lerp(candidate, state, update)
        self.state = state
        u = F.silu(self.first.plus(self.at_first[j], state))
        u = F.layer_norm(u, (w,), *self.first_norm)
        second = F.layer_norm(F.silu(self.second(u)), (w,), *self.second_norm)
        return self.output.plus(self.ends[j], u + second).to(self.hidden.dtype)


class MLPChain(_Unrolled):
    """``MLPSamplerHead`` unrolled.

    Args:
        head: the head.
        embedding: the base's embedding layer.
        vocab_size: V.
        dtype: what to compute in.
    """

    def __init__(self, head: MLPSamplerHead, embedding: nn.Module, vocab_size: int, dtype: torch.dtype) -> None:
        layers: Any = head.layers
        first, _, first_norm, second, _, second_norm = layers
        width: int = second.weight.shape[1]
        super().__init__(first.weight[:, :width], embedding, vocab_size, dtype)

        def ready(weight: Tensor) -> Tensor:
            return weight.detach().to(dtype)

        self.from_hidden = PackedLinear(ready(first.weight[:, width:]), ready(first.bias))
        self.first_norm = (ready(first_norm.weight), ready(first_norm.bias), first_norm.eps)
        self.second = PackedLinear(ready(second.weight), ready(second.bias))
        self.second_norm = (ready(second_norm.weight), ready(second_norm.bias), second_norm.eps)
        self.width, self.dtype = width, dtype

    def begin(self, hidden: Tensor) -> None:
        """See ``DraftChain``."""
        B, J, D = hidden.shape
        self.hidden = hidden
        read = self.from_hidden(hidden.reshape(B * J, D).to(self.dtype))
        self.at_first = read.view(B, J, -1).unbind(1)

    def next(self, j: int, previous: Tensor) -> Tensor:
        """See ``DraftChain``."""
        u = F.layer_norm(F.silu(self.added(self.at_first[j], previous)), (self.width,), *self.first_norm)
        u = F.silu(self.second(u))
        return F.layer_norm(u, (self.width,), *self.second_norm).to(self.hidden.dtype)


Chain = DraftChain | GRUChain | MLPChain


def unrolled(head: SamplerHead, embedding: nn.Module, vocab_size: int, dtype: torch.dtype) -> Chain:
    """The fastest chain of a head.

    Args:
        head: the head.
        embedding: the base's embedding layer.
        vocab_size: V.
        dtype: what to compute in, where the head is one of ours.

    Returns:
        The chain.
    """
    if type(head) is GRUSamplerHead:
        return GRUChain(head, embedding, vocab_size, dtype)
    if type(head) is MLPSamplerHead:
        return MLPChain(head, embedding, vocab_size, dtype)
    return DraftChain(head, embedding)
