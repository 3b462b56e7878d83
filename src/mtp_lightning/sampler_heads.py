# SPDX-License-Identifier: Apache-2.0
"""Sampler heads: from a hidden state and the tokens drafted so far to the state that the unembedding is applied to.

A head is constructed without knowing the model's width (YAML names it before the base is loaded); ``build`` adds its layers.
To write your own, subclass ``SamplerHead`` and name it in ``model.sampler_head.class_path``.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtp_lightning.errors import UsageError, one_line


class SamplerHead(nn.Module, ABC):
    """Draws the draft tokens of a block one after another, each conditioned on the tokens before it.

    Attributes:
        at_ntp: True if the head also has an output (and so a loss) at NTP positions.
    """

    at_ntp = False

    @abstractmethod
    def build(self, width: int) -> None:
        """Create the layers.

        Args:
            width: the base model's hidden size D.
        """

    @abstractmethod
    def forward(self, hidden: Tensor, previous: Tensor) -> Tensor:
        """All positions of many blocks at once, with the true previous tokens (training).

        Args:
            hidden: hidden states of m_1..m_K after the final norm, [N, K, D].
            previous: embeddings of the tokens x_{i+1}..x_{i+K}, as the decoder sees them, [N, K, D].

        Returns:
            States for the unembedding, [N, K, D]. Entry j sees previous tokens 1..j only.
        """

    @abstractmethod
    def step(self, hidden: Tensor, previous: Tensor, state: Any) -> tuple[Tensor, Any]:
        """One position of each block, with the token drawn before it (decoding).

        Args:
            hidden: hidden state of m_j, [N, D].
            previous: embedding of the verified token (j = 1) or of draft j - 1, [N, D].
            state: recurrent state that the last step returned, None at j = 1.

        Returns:
            The state for the unembedding, [N, D], and the recurrent state for the next step.
        """


@torch.no_grad()
def check_head(head: SamplerHead, width: int) -> None:
    """Try a built head on random input; UsageError unless ``step``, position by position, gives what ``forward`` gives.

    ``forward`` then sees no later token either. A copy with random weights is tried: heads often start at zero.
    """
    name = f"sampler head {type(head).__name__}"
    if next(head.parameters(), None) is None:
        raise UsageError(f"{name} has no parameters: give it some, or set model.sampler_head: false.")
    trial = copy.deepcopy(head).cpu().double().eval()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for parameter in trial.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        hidden, previous = torch.randn(2, 2, 3, width, dtype=torch.float64)
    try:
        together = trial(hidden, previous)
        state, outputs = None, []
        for j in range(hidden.shape[1]):
            output, state = trial.step(hidden[:, j], previous[:, j], state)
            outputs.append(output)
    except Exception as error:
        raise UsageError(f"{name} fails on hidden states [2, 3, {width}]: {one_line(error)}.") from error
    for method, found, expected in [("forward", together, hidden), *(("step", output, hidden[:, 0]) for output in outputs)]:
        if not isinstance(found, Tensor) or found.shape != expected.shape:
            shape = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise UsageError(f"{name}: {method} must return states of shape {list(expected.shape)}, got {shape}.")
    if not torch.allclose(torch.stack(outputs, 1), together, rtol=1e-6, atol=1e-6):  # float64: only rounding differs
        raise UsageError(
            f"{name}: step, position by position, must give what forward gives for all positions at once. Does forward see"
            " later tokens, or does step lose its state?"
        )


class MLPSamplerHead(SamplerHead):
    """The paper's head: two blocks of Linear, SiLU, LayerNorm on [E(y_prev); z]. No residual, no recurrence.

    Source: Samragh et al. 2025, §2.3.
    """

    at_ntp = True

    def build(self, width: int) -> None:
        """Create the layers."""
        self.layers = nn.Sequential(
            nn.Linear(2 * width, width),
            nn.SiLU(),
            nn.LayerNorm(width),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.LayerNorm(width),
        )

    def forward(self, hidden: Tensor, previous: Tensor) -> Tensor:
        """MLP([E(y_prev); z]) at each position by itself; any leading shape."""
        return self.layers(torch.cat([previous, hidden], dim=-1))

    def step(self, hidden: Tensor, previous: Tensor, state: Any) -> tuple[Tensor, Any]:
        """The same for one position."""
        return self(hidden, previous), None


MAX_SHARE = 4
"""Up to this a ``hidden_size`` is a share of the base model's, above it a width."""


class GRUSamplerHead(SamplerHead):
    """A GRU over the tokens drafted so far whose output is added to z through a projection that starts at zero.

    s_0 = 0; s_j = GRU(e_j, s_{j-1}) with e_j = E(x_{i+j}), or [E(x_{i+j}); z_j] with ``read_hidden``;
    u = LayerNorm(SiLU(Linear([s_j; z_j]))); u = u + LayerNorm(SiLU(Linear(u))); output z_j + O u. It starts as the base
    head and learns the correction.

    Args:
        hidden_size: width w of the state and of u: above 4 a number, up to 4 a share of the base model's hidden size (0.5),
            rounded to a multiple of 8. None: the base model's hidden size. A small base gains from more; half its width
            or less is enough for a large one.
        read_hidden: the GRU also reads the hidden state.
        normalize: embeddings and hidden states are read through a LayerNorm each, and O u is divided by sqrt(w). Where
            hidden states are many times larger than embeddings, as in SmolLM2, the head hardly sees the latter otherwise,
            and at the adapters' learning rate its output overshoots.
    """

    def __init__(self, hidden_size: int | float | None = None, read_hidden: bool = False, normalize: bool = False) -> None:
        super().__init__()
        # By value, not by type: a parser may read 8 as 8.0.
        if hidden_size is not None and not (0 < hidden_size <= MAX_SHARE or hidden_size == int(hidden_size) > MAX_SHARE):
            raise UsageError(f"hidden_size must be a share up to {MAX_SHARE} or a whole number above it, got {hidden_size}.")
        self.hidden_size = hidden_size
        self.read_hidden = read_hidden
        self.normalize = normalize

    def state_size(self, width: int) -> int:
        """The width w on a base of hidden size ``width``."""
        if self.hidden_size is None:
            return width
        return 8 * max(1, round(self.hidden_size * width / 8)) if self.hidden_size <= MAX_SHARE else int(self.hidden_size)

    def build(self, width: int) -> None:
        """Create the layers."""
        w = self.state_size(width)
        self.previous_norm = nn.LayerNorm(width) if self.normalize else nn.Identity()
        self.hidden_norm = nn.LayerNorm(width) if self.normalize else nn.Identity()
        self.output_scale = w**-0.5 if self.normalize else 1.0
        self.gru = nn.GRU(width * (2 if self.read_hidden else 1), w, batch_first=True)
        self.first = nn.Linear(w + width, w)
        self.first_norm = nn.LayerNorm(w)
        self.second = nn.Linear(w, w)
        self.second_norm = nn.LayerNorm(w)
        self.output = nn.Linear(w, width)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def _inputs(self, hidden: Tensor, previous: Tensor) -> Tensor:
        previous = self.previous_norm(previous)
        return torch.cat([previous, self.hidden_norm(hidden)], dim=-1) if self.read_hidden else previous

    def _correct(self, hidden: Tensor, state: Tensor) -> Tensor:
        u = self.first_norm(F.silu(self.first(torch.cat([state, self.hidden_norm(hidden)], dim=-1))))
        u = u + self.second_norm(F.silu(self.second(u)))
        return hidden + self.output(u) * self.output_scale

    def forward(self, hidden: Tensor, previous: Tensor) -> Tensor:
        """All K positions of N blocks, [N, K, D]."""
        states, _ = self.gru(self._inputs(hidden, previous))
        return self._correct(hidden, states)

    def step(self, hidden: Tensor, previous: Tensor, state: Any) -> tuple[Tensor, Any]:
        """One position of N blocks; the state is the GRU's, [N, w]."""
        gru: Any = self.gru
        inputs = self._inputs(hidden, previous)
        if state is None:
            state = inputs.new_zeros(len(inputs), gru.hidden_size)
        # Faster for one position than the module is.
        state = torch.gru_cell(inputs, state, gru.weight_ih_l0, gru.weight_hh_l0, gru.bias_ih_l0, gru.bias_hh_l0)
        return self._correct(hidden, state), state


class MarkovSamplerHead(SamplerHead):
    """The base head's logits plus a low-rank term of the previous token alone: z + A B E(y_prev), so W z + U V[y_prev].

    U = W A and V[y] = B E(y) with the base's own embedding and unembedding: nothing of the vocabulary's size is trained. A
    starts at zero, so that it starts as the base head. The smallest and fastest of the heads.

    Args:
        rank: r of A [D, r] and B [r, D].
    """

    def __init__(self, rank: int = 64) -> None:
        super().__init__()
        if rank < 1:
            raise UsageError(f"rank must be 1 or more, got {rank}.")
        self.rank = rank

    def build(self, width: int) -> None:
        """Create the layers."""
        self.down = nn.Linear(width, self.rank, bias=False)
        self.up = nn.Linear(self.rank, width, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, hidden: Tensor, previous: Tensor) -> Tensor:
        """The sum at each position by itself; any leading shape."""
        return hidden + self.up(self.down(previous))

    def step(self, hidden: Tensor, previous: Tensor, state: Any) -> tuple[Tensor, Any]:
        """The same for one position."""
        return self(hidden, previous), None
