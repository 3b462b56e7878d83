# SPDX-License-Identifier: Apache-2.0
"""Each loss term against a plain Python loop over positions, written from docs/method.md §2 and §5 and not from the code."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, cast

import pytest
import torch
from tiny import tiny_model, tiny_rows, token_row
from torch import Tensor
from toy_losses import UNEMBED, D, Focal, K, V

from mtp_lightning.errors import UsageError
from mtp_lightning.losses import (
    AnchorDistillation,
    AnchorLoss,
    BaseCrossEntropy,
    HybridAcceptance,
    LatentConsistency,
    LossTerm,
    NegativeLogAcceptance,
    SamplerCrossEntropy,
    TokenLoss,
    TokenTargets,
    TotalVariation,
    anchor_loss,
    base,
    chunked,
    term_value,
)
from mtp_lightning.losses.base import Unembedding
from mtp_lightning.losses.one_pass import loss_sums
from mtp_lightning.modeling import masking
from mtp_lightning.modeling.gated_lora import LoRA
from mtp_lightning.sampler_heads import GRUSamplerHead
from mtp_lightning.types import MTP, HiddenStates, LossSum, MaskedInput, TokenRow


def rows_with(ignored: int) -> list[TokenRow]:
    return [row._replace(labels=torch.where(row.labels == -100, ignored, row.labels)) for row in tiny_rows()]


def random_states(batch: MaskedInput, dtype: torch.dtype = torch.float64, sampler_ntp: bool = True) -> HiddenStates:
    """Leaves of random hidden states, as a model would give them."""
    B, L = batch.input_ids.shape
    P = batch.starts.shape[1]
    generator = torch.Generator().manual_seed(0)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, D, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    states = leaf(B, L), leaf(B, P, K), leaf(B, P, K), leaf(B, L)
    return HiddenStates(*states[:3], states[3] if sampler_ntp else None)


class Position(NamedTuple):
    """One position that counts: m_j of the block after x_i (j from 1), or the NTP position i (j = 0)."""

    row: int
    p: int
    i: int
    j: int
    label: int


def carries(row: TokenRow, ignored: int, start: int, t: int) -> bool:
    """True if x_t is a label for the document that holds x_start."""
    inside = t < len(row.input_ids) and bool(row.document_ids[t] == row.document_ids[start])
    return inside and int(row.labels[t]) != ignored


def ntp_positions(rows: list[TokenRow], ignored: int) -> Iterator[Position]:
    for r, row in enumerate(rows):
        for i in range(len(row.input_ids)):
            if carries(row, ignored, i, i + 1):
                yield Position(r, -1, i, 0, int(row.input_ids[i + 1]))


def mtp_positions(rows: list[TokenRow], ignored: int, starts: list[list[int]] | None = None) -> Iterator[Position]:
    """Those of the given starts, p counting them; of all eligible ones (full coverage) for None."""
    for r, row in enumerate(rows):
        eligible = [i for i in range(len(row.input_ids)) if carries(row, ignored, i, i + 1)]
        for p, i in enumerate(eligible if starts is None else starts[r]):
            for j in range(1, K + 1):
                if i >= 0 and carries(row, ignored, i, i + j + 1):
                    yield Position(r, p, i, j, int(row.input_ids[i + j + 1]))


def block_weight(rows: list[TokenRow], ignored: int, starts: list[list[int]], r: int) -> float:
    """Starts of row r that have a label over those that got a block."""
    useful = {x.i for x in mtp_positions(rows, ignored) if x.row == r}
    return len(useful) / sum(i >= 0 for i in starts[r])


def cross_entropy(logits: Tensor, label: int) -> Tensor:
    return logits.exp().sum().log() - logits[label]


def to_the_anchor(term: AnchorLoss, logits: Tensor, anchor_logits: Tensor) -> Tensor:
    if isinstance(term, AnchorDistillation) and term.target == "argmax":
        return cross_entropy(logits, int(anchor_logits.argmax()))
    p, q = (values.exp() / values.exp().sum() for values in (anchor_logits, logits))
    if isinstance(term, AnchorDistillation):
        return -(p * q.log()).sum()
    tv = (p - q).abs().sum() / 2
    if isinstance(term, NegativeLogAcceptance):
        return -(1 - tv).log()
    if isinstance(term, HybridAcceptance):
        share = torch.exp(-3 * (1 - tv)).detach()
        return share * (p * (p / q).log()).sum() + (1 - share) * tv
    return tv


def reference(term: LossTerm, states: HiddenStates, rows: list[TokenRow], starts: list[list[int]], ignored: int) -> Tensor:
    """The term's value, position by position."""
    ntp, mtp = list(ntp_positions(rows, ignored)), list(mtp_positions(rows, ignored, starts))
    full_coverage = list(mtp_positions(rows, ignored))
    if isinstance(term, LatentConsistency):
        groups = [(x.row, x.i + x.j) for x in full_coverage]  # S(t) under full coverage
        total = torch.zeros((), dtype=torch.float64)
        for x in mtp:
            z, anchor = states.mtp[x.row, x.p, x.j - 1], states.ntp[x.row, x.i + x.j].detach()
            square = ((anchor - z) ** 2).sum() / (D if term.reduction == "mean" else 1)
            total = total + square / groups.count((x.row, x.i + x.j)) * block_weight(rows, ignored, starts, x.row)
        return total / len(set(groups))
    assert isinstance(term, TokenLoss)
    at_mtp, at_ntp = (states.mtp, states.ntp) if term.head == "base" else (states.sampler, states.sampler_ntp)
    assert at_mtp is not None

    def one(x: Position) -> Tensor:
        state = at_mtp[x.row, x.p, x.j - 1] if x.j else at_ntp[x.row, x.i]  # type: ignore[index]
        logits = UNEMBED(state)
        if isinstance(term, Focal):
            log_p = -cross_entropy(logits, x.label)
            return -((1 - log_p.exp()) ** term.gamma) * log_p * (x.j + 1)
        if isinstance(term, AnchorLoss):
            return to_the_anchor(term, logits, UNEMBED(states.ntp[x.row, x.i + x.j].detach())) * position_weight(x)
        return cross_entropy(logits, x.label)

    def position_weight(x: Position) -> float | Tensor:
        if not isinstance(term, AnchorLoss) or term.position_weights is None:
            return 1.0
        if term.position_weights != "acceptance":
            return float(term.position_weights ** (x.j - 1))
        weight = torch.ones((), dtype=torch.float64)
        for other in mtp:
            if (other.row, other.p) == (x.row, x.p) and other.j < x.j:
                p, q = UNEMBED(states.ntp[x.row, x.i + other.j]), UNEMBED(at_mtp[x.row, x.p, other.j - 1])
                weight = weight * torch.minimum(p.softmax(-1), q.softmax(-1)).sum()
        return weight.detach()

    zero = torch.zeros((), dtype=torch.float64)
    m = sum((one(x) * block_weight(rows, ignored, starts, x.row) for x in mtp), zero) if term.positions != "ntp" else zero
    n = sum((one(x) for x in ntp), zero) if term.positions != "mtp" and at_ntp is not None else zero
    if term.joint_mean and term.positions == "all" and at_ntp is not None:
        return (m + n) / (len(full_coverage) + len(ntp))
    return m / len(full_coverage) + n / len(ntp)


TERMS: dict[str, LossTerm] = {
    "base mtp": BaseCrossEntropy(),
    "base ntp": BaseCrossEntropy(positions="ntp"),
    "base all": BaseCrossEntropy(positions="all"),
    "base joint": BaseCrossEntropy(positions="all", joint_mean=True),
    "sampler mtp": SamplerCrossEntropy(),
    "sampler all": SamplerCrossEntropy(positions="all"),
    "sampler joint": SamplerCrossEntropy(positions="all", joint_mean=True),
    "lcm mean": LatentConsistency(),
    "lcm sum": LatentConsistency(reduction="sum"),
    "distillation": AnchorDistillation(),
    "distillation base argmax": AnchorDistillation(head="base", target="argmax"),
    "distillation decay": AnchorDistillation(position_weights=0.8),
    "total variation": TotalVariation(),
    "negative log acceptance": NegativeLogAcceptance(head="base"),
    "hybrid, weights": HybridAcceptance(position_weights="acceptance"),
    "focal": Focal(),
    "focal sampler all": Focal("sampler", "all"),
}


@pytest.mark.parametrize(("block_fraction", "rows_per_chunk", "ignored"), [(1.0, None, -100), (0.5, 16, -7)])
@pytest.mark.parametrize("name", TERMS)
def test_term_equals_a_loop_over_positions(
    name: str, block_fraction: float, rows_per_chunk: int | None, ignored: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (masking, base, anchor_loss):  # -7 shows any place that leans on cross_entropy's own default of -100
        monkeypatch.setattr(module, "IGNORE_INDEX", ignored)
    if rows_per_chunk is not None:
        monkeypatch.setattr(chunked, "LOGITS_PER_CHUNK", rows_per_chunk * V)
    term, rows = TERMS[name], rows_with(ignored)
    batch = masking.build_masked_input(rows, K, block_fraction=block_fraction, seed=3)
    assert (block_fraction == 1) == bool((batch.block_weights[batch.starts >= 0] == 1).all())
    states = random_states(batch)
    leaves = [t for t in states if t is not None] + list(term.parameters())
    value = term_value(term(states, batch, UNEMBED), batch.counts)
    expected = reference(term, states, rows, batch.starts.tolist(), ignored)
    # Block and anchor weights are float32 (1/3 is off by 1e-8); all else is float64.
    torch.testing.assert_close(value, expected, rtol=1e-7, atol=0)
    # Of all leaves: zeros at ignored positions and at detached anchors too.
    grads, expected_grads = (
        torch.autograd.grad(v, leaves, allow_unused=True, materialize_grads=True) for v in (value, expected)
    )
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad, rtol=1e-6, atol=1e-12)  # float32 weights, as above
    assert any(g.any() for g in grads)


def test_nothing_to_count_gives_zero_and_zero_gradients() -> None:
    row = token_row([6])
    batch = masking.build_masked_input([row._replace(labels=torch.full_like(row.labels, -100))], K)
    for name, term in TERMS.items():
        states = random_states(batch)
        value = term_value(term(states, batch, UNEMBED), batch.counts)
        assert value == 0, name
        leaves = [t for t in states if t is not None]
        for grad in torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True, retain_graph=True):
            assert not grad.any() and grad.isfinite().all(), name
        for p in term.parameters():  # takes part all the same: no rank waits for its gradient
            assert torch.autograd.grad(value, p)[0] == 0, name


def test_a_head_without_output_at_ntp_positions() -> None:
    batch = masking.build_masked_input(tiny_rows(), K)
    states = random_states(batch, sampler_ntp=False)
    with pytest.raises(UsageError, match="counts NTP positions"):
        SamplerCrossEntropy(positions="ntp")(states, batch, UNEMBED)
    both, alone = (SamplerCrossEntropy(positions=p)(states, batch, UNEMBED) for p in ("all", "mtp"))
    assert len(both) == 1 and torch.equal(both[0].total, alone[0].total) and both[0].denominator == MTP


# on a model


def test_a_sampler_term_without_a_sampler_head_is_refused() -> None:
    batch = masking.build_masked_input(tiny_rows(), K)
    model = tiny_model(num_masks=K)
    for term in (SamplerCrossEntropy(), AnchorDistillation(), Focal("sampler")):
        with pytest.raises(UsageError, match=f"{type(term).__name__} needs a sampler head, and model.sampler_head is false"):
            model(batch, {"x": term})


@pytest.mark.parametrize("gated", [True, False])
def test_loss_gradients_reach_what_is_trained_and_nothing_else(gated: bool) -> None:
    model = tiny_model(num_masks=K, sampler_head=GRUSamplerHead(), lora=LoRA(rank=2, gated=gated))
    batch = masking.build_masked_input(tiny_rows(), K)
    terms = {"base": BaseCrossEntropy(), "sampler": SamplerCrossEntropy(), "lcm": LatentConsistency()}
    sums = model(batch, terms).sums
    torch.stack([term_value(s, batch.counts) for s in sums.values()]).sum().backward()
    for name, p in model.named_parameters():
        assert (p.grad is not None and bool(p.grad.any())) == p.requires_grad, name
    ntp = term_value(model(batch, {"ntp": BaseCrossEntropy(positions="ntp")}).sums["ntp"], batch.counts)
    assert ntp.requires_grad == (not gated)  # of a gated model it is a constant


@pytest.mark.parametrize(
    "returned",
    [
        lambda losses: losses[:, None],
        lambda losses: losses.mean(),
        lambda losses: losses.detach(),
        lambda losses: None,
    ],
)
def test_what_a_users_loss_returns_is_checked(returned: Callable[[Tensor], Any]) -> None:
    class Wrong(Focal):
        def per_position(self, logits: Tensor, targets: TokenTargets) -> Tensor:
            return cast(Tensor, returned(super().per_position(logits, targets)))

    batch = masking.build_masked_input(tiny_rows(), K)
    term = Wrong()
    term.requires_grad_(False)
    with pytest.raises(UsageError, match="Wrong.per_position"):
        term(random_states(batch), batch, UNEMBED)


ONE: Any = torch.tensor(1.0)


@pytest.mark.parametrize(
    "returned",
    [
        ONE,
        LossSum(ONE, MTP),
        [LossSum(torch.ones(2), MTP)],
        [],
        [LossSum(cast(Any, 1.0), MTP)],
        *([LossSum(ONE, cast(Any, count))] for count in (3, -1, (), (MTP, 7), ONE)),
    ],
)
def test_a_term_returns_sums(returned: Any) -> None:
    class Own(LossTerm):
        def forward(self, states: HiddenStates, batch: MaskedInput, unembed: Unembedding) -> Any:
            return returned

    batch = masking.build_masked_input(tiny_rows(), K)
    with pytest.raises(UsageError, match="Own.forward"):
        loss_sums({"own": Own()}, random_states(batch), batch, UNEMBED)
