# SPDX-License-Identifier: Apache-2.0
"""The sampler heads against their formulas, and their step-by-step form against the one for whole blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtp_lightning.errors import UsageError
from mtp_lightning.sampler_heads import GRUSamplerHead, MarkovSamplerHead, MLPSamplerHead, SamplerHead, check_head

HEADS: dict[str, Callable[[], SamplerHead]] = {
    "mlp": MLPSamplerHead,
    "gru": GRUSamplerHead,
    "gru-hidden": lambda: GRUSamplerHead(hidden_size=20, read_hidden=True),
    "gru-normalized": lambda: GRUSamplerHead(hidden_size=20, read_hidden=True, normalize=True),
    "markov": lambda: MarkovSamplerHead(rank=4),
}


@pytest.mark.parametrize("name", HEADS)
@torch.no_grad()
def test_step_by_step_equals_forward(name: str) -> None:
    torch.manual_seed(0)
    head = HEADS[name]()
    head.build(32)
    head.double()
    for p in head.parameters():
        p.add_(0.2 * torch.randn_like(p))
    hidden, previous = torch.randn(2, 5, 7, 32, dtype=torch.float64)
    together = head(hidden, previous)
    state = None
    for j in range(7):
        output, state = head.step(hidden[:, j], previous[:, j], state)
        # Float64: one product of 7 rows against seven of 1.
        torch.testing.assert_close(output, together[:, j], rtol=0, atol=1e-12)
    # Position j reads 1..j, and nothing after it.
    changed = head(torch.cat([hidden[:, :4], -hidden[:, 4:]], 1), torch.cat([previous[:, :4], -previous[:, 4:]], 1))
    assert torch.equal(changed[:, :4], together[:, :4]) and not torch.allclose(changed[:, 4:], together[:, 4:])
    # Only a GRU remembers the token before the previous one.
    earlier = head(hidden, torch.cat([-previous[:, :1], previous[:, 1:]], 1))
    assert torch.allclose(earlier[:, 2], together[:, 2]) == (name in ("mlp", "markov"))


@torch.no_grad()
def test_mlp_head_is_the_papers_formula() -> None:
    head = MLPSamplerHead()
    head.build(16)
    head.double()
    z, e = torch.randn(2, 4, 16, dtype=torch.float64)
    first, norm1, second, norm2 = (head.layers[i] for i in (0, 2, 3, 5))
    assert (first.in_features, first.out_features, second.in_features, second.out_features) == (32, 16, 16, 16)

    def norm(x: Tensor, layer: torch.nn.LayerNorm) -> Tensor:
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
        return x * layer.weight + layer.bias

    u = torch.cat([e, z], -1) @ first.weight.T + first.bias
    u = norm(u * u.sigmoid(), norm1) @ second.weight.T + second.bias
    torch.testing.assert_close(head(z, e), norm(u * u.sigmoid(), norm2), rtol=0, atol=1e-12)  # float64 rounding


@torch.no_grad()
def test_gru_head_is_its_formula_and_starts_as_the_base_head() -> None:
    head = GRUSamplerHead(hidden_size=20)
    head.build(16)
    z, e = torch.randn(2, 1, 3, 16)
    assert torch.equal(head(z, e), z)
    torch.nn.init.normal_(head.output.weight)
    s = torch.zeros(20)
    for j in range(3):
        r, u, n = (e[0, j] @ head.gru.weight_ih_l0.T + head.gru.bias_ih_l0).chunk(3)
        hr, hu, hn = (s @ head.gru.weight_hh_l0.T + head.gru.bias_hh_l0).chunk(3)
        r, u = (r + hr).sigmoid(), (u + hu).sigmoid()
        s = (1 - u) * (n + r * hn).tanh() + u * s
        v = F.layer_norm(F.silu(torch.cat([s, z[0, j]]) @ head.first.weight.T + head.first.bias), (20,))
        v = v + F.layer_norm(F.silu(v @ head.second.weight.T + head.second.bias), (20,))
        # Float32, a dozen operations on values near 1.
        torch.testing.assert_close(head(z, e)[0, j], z[0, j] + v @ head.output.weight.T, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_normalized_gru_head_is_the_plain_one_on_normalized_inputs() -> None:
    plain, normalized = (GRUSamplerHead(hidden_size=20, read_hidden=True, normalize=value) for value in (False, True))
    plain.build(16)
    normalized.build(16)
    torch.nn.init.normal_(plain.output.weight)
    normalized.load_state_dict(plain.state_dict(), strict=False)  # the norms begin with weight 1 and bias 0
    z, e = torch.randn(2, 2, 3, 16) * torch.tensor([5.0, 0.1]).reshape(2, 1, 1, 1)
    correction = plain(F.layer_norm(z, (16,)), F.layer_norm(e, (16,))) - F.layer_norm(z, (16,))
    torch.testing.assert_close(normalized(z, e), z + correction / 20**0.5, rtol=1e-5, atol=1e-5)  # float32 rounding


@torch.no_grad()
def test_markov_head_adds_a_low_rank_table_of_token_pairs() -> None:
    head = MarkovSamplerHead(rank=3)
    head.build(16)
    head.double()
    E, W = torch.randn(2, 11, 16, dtype=torch.float64)
    z = torch.randn(11, 16, dtype=torch.float64)
    assert torch.equal(head(z, E), z)  # it starts as the base head
    torch.nn.init.normal_(head.up.weight)
    pairs = head(z, E) @ W.T - z @ W.T  # one previous token a row
    assert torch.linalg.matrix_rank(pairs) == 3
    U, V = W @ head.up.weight, E @ head.down.weight.T
    torch.testing.assert_close(pairs, V @ U.T, rtol=0, atol=1e-9)  # float64 rounding


def test_a_wrong_size_is_refused() -> None:
    with pytest.raises(UsageError, match="rank"):
        MarkovSamplerHead(rank=0)
    with pytest.raises(UsageError, match="hidden_size"):
        GRUSamplerHead(hidden_size=0)


class Sum(SamplerHead):
    """A user's head that starts at zero, with a mistake."""

    def __init__(self, mistake: str) -> None:
        super().__init__()
        self.mistake = mistake

    def build(self, width: int) -> None:
        self.layer = nn.Linear(width, width)
        nn.init.zeros_(self.layer.weight)

    def forward(self, hidden: Tensor, previous: Tensor) -> Tensor:
        seen = previous.flip(1) if self.mistake == "later" else previous
        output = hidden + self.layer(seen.cumsum(1))
        return output.flatten(0, 1) if self.mistake == "shape" else output

    def step(self, hidden: Tensor, previous: Tensor, state: Any) -> tuple[Tensor, Any]:
        total = previous if state is None or self.mistake == "state" else state + previous
        output = hidden + self.layer(total)
        return (output[..., :3] if self.mistake == "step" else output), total


def test_a_head_without_parameters_is_refused() -> None:
    class Free(SamplerHead):
        forward = build = lambda self, *inputs: inputs[0]
        step = lambda self, *inputs: (inputs[0], None)  # noqa: E731

    with pytest.raises(UsageError, match="sampler_head"):
        check_head(Free(), 8)


@pytest.mark.parametrize("mistake", ["later", "state", "shape", "step"])
def test_a_users_head_is_tried(mistake: str) -> None:
    head = Sum(mistake)
    head.build(8)
    before = torch.get_rng_state()
    with pytest.raises(UsageError, match="Sum"):
        check_head(head, 8)
    head.mistake = ""
    check_head(head, 8)
    assert head.layer.weight.abs().sum() == 0 and torch.equal(before, torch.get_rng_state())
