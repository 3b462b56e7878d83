# SPDX-License-Identifier: Apache-2.0
"""Terms with a closed form, in one pass over the vocabulary, against each term's own ``forward``."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_base, tiny_model, tiny_rows
from toy_losses import Focal, K

from mtp_lightning.losses import (
    AnchorDistillation,
    BaseCrossEntropy,
    HybridAcceptance,
    LatentConsistency,
    NegativeLogAcceptance,
    SamplerCrossEntropy,
    TotalVariation,
    chunked,
    tiles,
)
from mtp_lightning.losses.one_pass import loss_sums
from mtp_lightning.modeling.masking import build_masked_input
from mtp_lightning.modeling.unembedding import FrozenUnembedding
from mtp_lightning.sampler_heads import GRUSamplerHead

TERMS = {
    "distillation": AnchorDistillation(),
    "base distillation": AnchorDistillation(head="base"),
    "decay": AnchorDistillation(position_weights=0.5),
    "total variation": TotalVariation(),
    "base total variation": TotalVariation(head="base"),
    "negative log acceptance": NegativeLogAcceptance(),
    "hybrid": HybridAcceptance(head="base", position_weights="acceptance"),
    "base": BaseCrossEntropy(),
    "sampler": SamplerCrossEntropy(),
    "lcm": LatentConsistency(),
    "everywhere": BaseCrossEntropy(positions="all"),
    "own": Focal("sampler"),
}


@pytest.mark.parametrize("names", [list(TERMS), ["sampler"], ["base distillation"], ["hybrid"]])
def test_one_pass_gives_the_sums_and_gradients_of_each_term(names: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "TILE", 20)  # the last tile is smaller
    monkeypatch.setattr(chunked, "LOGITS_PER_CHUNK", 16 * 40)  # several chunks of positions, too
    model = tiny_model(num_masks=K, sampler_head=GRUSamplerHead())
    batch = build_masked_input(tiny_rows(), K, block_fraction=0.7)
    assert model.unembed.matrix is not None
    terms = {name: TERMS[name] for name in names}
    states = model.hidden_states(batch)
    expected = {name: term(states, batch, model.unembed) for name, term in terms.items()}
    passes = []
    monkeypatch.setattr(tiles, "_over_tiles", lambda h, w, over=tiles._over_tiles: passes.append(len(h)) or over(h, w))
    found = loss_sums(terms, states, batch, model.unembed)
    assert list(found) == names and passes
    trained = [p for _, p in model.trained_parameters()]
    for name in names:
        assert [s.denominator for s in found[name]] == [s.denominator for s in expected[name]]
        mine, other = (torch.stack([s.total for s in sums[name]]).sum() for sums in (found, expected))
        # float64, sums in another order.
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-10)
        grads = (
            torch.autograd.grad(v, trained, retain_graph=True, materialize_grads=True, allow_unused=True)
            for v in (mine, other)
        )
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


class OwnWeights(TotalVariation):
    """A user's loss that overrides more than ``loss``."""

    def mtp_weights(self, hidden, anchors, batch, unembed):
        return super().mtp_weights(hidden, anchors, batch, unembed) * 2


def test_an_override_of_the_weights_counts() -> None:
    model, batch = tiny_model(num_masks=K), build_masked_input(tiny_rows(), K)
    states = model.hidden_states(batch)
    sums = loss_sums({"own": OwnWeights(head="base"), "plain": TotalVariation(head="base")}, states, batch, model.unembed)
    torch.testing.assert_close(sums["own"][0].total, 2 * sums["plain"][0].total)


def test_masks_that_share_an_anchor_share_its_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = tiny_model(num_masks=K), build_masked_input(tiny_rows(), K)
    states, passes = model.hidden_states(batch), []
    monkeypatch.setattr(tiles, "_over_tiles", lambda h, w, over=tiles._over_tiles: passes.append(len(h)) or over(h, w))
    loss_sums({"x": AnchorDistillation(head="base")}, states, batch, model.unembed)
    assert passes == batch.counts[1:].tolist()  # under full coverage: MTP positions, and anchors


@pytest.mark.parametrize("architecture", ["gemma2", "llama"])
def test_a_cap_a_bias_or_a_hook_on_the_unembedding_leaves_the_terms_to_themselves(architecture: str) -> None:
    base = tiny_base(architecture)
    assert (FrozenUnembedding(base.requires_grad_(False)).matrix is None) == (architecture == "gemma2")
    base.get_output_embeddings().register_forward_pre_hook(lambda *_: None)
    assert FrozenUnembedding(base).matrix is None
