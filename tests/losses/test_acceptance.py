# SPDX-License-Identifier: Apache-2.0
"""The losses on acceptance against the acceptance of decoding itself, and their gradients."""

from __future__ import annotations

import pytest
import torch

from mtp_lightning.decoding.acceptance import VerifiedStep, base_tokens
from mtp_lightning.decoding.options import DecodingOptions
from mtp_lightning.decoding.token_choice import TokenChoice
from mtp_lightning.errors import UsageError
from mtp_lightning.losses import HybridAcceptance, NegativeLogAcceptance, TokenTargets, TotalVariation

DRAWS, V = 200_000, 7


def targets(anchor_logits: torch.Tensor) -> TokenTargets:
    zeros = torch.zeros(len(anchor_logits), dtype=torch.int64)
    return TokenTargets(zeros, zeros, anchor_logits)


@pytest.mark.parametrize("verification", ["rejection", "coupled"])
def test_the_losses_are_the_acceptance_of_decoding(verification: str) -> None:
    p_logits, q_logits = torch.randn(2, 1, V, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 1.5
    total_variation = TotalVariation().per_position(q_logits, targets(p_logits))
    log_acceptance = -NegativeLogAcceptance().per_position(q_logits, targets(p_logits))
    torch.testing.assert_close(1 - total_variation, log_acceptance.exp())
    alpha = float(log_acceptance.exp())

    choice = TokenChoice(DecodingOptions(temperature=1.0, verification=verification), [0], torch.device("cpu"))
    positions = torch.arange(DRAWS + 1)[None]
    drafts, scores = choice.draft(q_logits.expand(1, DRAWS, V), positions[:, :-1])
    step = VerifiedStep(p_logits.expand(1, DRAWS + 1, V), positions, drafts, None, scores)
    tokens = base_tokens(choice, step)
    accepted = float((tokens[:, :-1] == drafts).double().mean())
    noise = 5 * 0.5 / DRAWS**0.5  # five standard deviations at most
    if verification == "rejection":
        assert abs(accepted - alpha) < noise
    else:
        assert alpha / (2 - alpha) - noise < accepted < alpha + noise


def test_gradients_in_closed_form() -> None:
    """dTV / dlogit u = q_u (sum of q where q < p, minus 1 where q_u < p_u); NLA's is that over the acceptance."""
    p_logits, q_logits = torch.randn(2, 5, V, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    q_logits.requires_grad_()
    p, q = p_logits.softmax(-1), q_logits.detach().softmax(-1)
    kept = (q < p).double()
    total_variation = q * ((q * kept).sum(-1, keepdim=True) - kept)
    acceptance = torch.minimum(p, q).sum(-1, keepdim=True)
    share = torch.exp(-3 * acceptance)
    expected = {
        TotalVariation(): total_variation,
        NegativeLogAcceptance(): total_variation / acceptance,
        HybridAcceptance(): share * (q - p) + (1 - share) * total_variation,
    }
    for term, grad in expected.items():
        loss = term.per_position(q_logits, targets(p_logits)).sum()
        torch.testing.assert_close(torch.autograd.grad(loss, q_logits)[0], grad, rtol=1e-10, atol=1e-12)  # rounding


def test_where_nothing_overlaps_the_loss_is_finite() -> None:
    logits = torch.tensor([[200.0, 0.0, -200.0]])
    for term in (TotalVariation(), NegativeLogAcceptance(), HybridAcceptance()):
        leaf = logits.clone().requires_grad_()
        loss = term.per_position(leaf, targets(-logits))
        loss.sum().backward()
        assert loss.isfinite().all() and leaf.grad is not None and leaf.grad.isfinite().all()


@pytest.mark.parametrize("value", [0.0, 1.5, -0.5])
def test_position_weights_out_of_range_are_refused(value: float) -> None:
    with pytest.raises(UsageError, match="position_weights"):
        TotalVariation(position_weights=value)
