# SPDX-License-Identifier: Apache-2.0
"""A sum of losses over chunks of positions: its value, its gradient, and the size of the chunks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from toy_losses import UNEMBED, D, RandomUnembedding, V

from mtp_lightning.losses import chunked
from mtp_lightning.losses.chunked import chunked_sum


@pytest.mark.parametrize(
    ("num", "rows_per_chunk", "frozen"),
    [
        (0, 16, "nothing"),
        (16, 1, "hidden"),
        (17, 16, "nothing"),
        (53, 20, "parameter"),
        (53, 20, "all"),
        (53, 1000, "nothing"),
    ],
)
def test_chunked_sum_equals_the_plain_sum(
    num: int, rows_per_chunk: int, frozen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunked, "LOGITS_PER_CHUNK", rows_per_chunk * V)
    generator = torch.Generator().manual_seed(num)
    hidden = torch.randn(num, D, generator=generator, dtype=torch.float64).requires_grad_(frozen not in ("hidden", "all"))
    weights = torch.rand(num, generator=generator)
    labels = torch.randint(V, (num,), generator=generator)
    scale = torch.tensor(0.7, dtype=torch.float64).requires_grad_(frozen not in ("parameter", "all"))
    sizes = []

    def losses(chunk: Tensor, part: slice) -> Tensor:
        sizes.append(len(chunk))
        return F.cross_entropy(UNEMBED(chunk) * scale, labels[part], reduction="none")

    found = chunked_sum(hidden, weights, losses, V, (scale,))
    expected = (F.cross_entropy(UNEMBED(hidden) * scale, labels, reduction="none") * weights).sum()
    assert sum(sizes) == num and max(sizes, default=0) <= max(16, rows_per_chunk)  # each position once, few at a time
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)  # float64, another order of sums
    trained = [t for t in (hidden, scale) if t.requires_grad]
    assert found.requires_grad == bool(trained)
    if trained:
        # Times 3: the gradient that comes from above is not 1.
        mine, other = (torch.autograd.grad(3 * v, trained, materialize_grads=True) for v in (found, expected))
        for a, b in zip(mine, other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)  # as above


@pytest.mark.parametrize("without_gradients", [torch.no_grad, torch.inference_mode])
def test_in_evaluation_a_trained_parameter_needs_no_gradient(without_gradients: type[torch.no_grad]) -> None:
    hidden, scale = torch.randn(5, D, dtype=torch.float64), torch.ones((), dtype=torch.float64, requires_grad=True)
    with without_gradients():
        found = chunked_sum(hidden, torch.ones(5), lambda chunk, _: chunk.sum(-1) * scale, V, (scale,))
    torch.testing.assert_close(found, hidden.sum(), rtol=1e-12, atol=1e-12)  # float64, another order of sums
    assert not found.requires_grad


def test_chunked_sum_of_half_precision_states_is_summed_in_float32() -> None:
    """A mean that is accumulated in bfloat16 is off by 10 % at this size."""
    num, unembed = 2048, RandomUnembedding(torch.bfloat16)
    hidden = torch.randn(num, D, generator=torch.Generator().manual_seed(0)).bfloat16()
    labels = torch.randint(V, (num,), generator=torch.Generator().manual_seed(1))
    found = chunked_sum(
        hidden, torch.ones(num), lambda c, part: F.cross_entropy(unembed(c).float(), labels[part], reduction="none"), V
    )
    expected = F.cross_entropy(unembed(hidden).double(), labels, reduction="sum")
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)  # the logits are the same: float32 sums alone
