# SPDX-License-Identifier: Apache-2.0
"""``mask_tokens: noise``: which random tokens stand at the masks, and that the base's own text is left alone."""

from __future__ import annotations

import pytest
import torch
from tiny import greedy_text, tiny_base, tiny_batch, tiny_model, tiny_rows, token_row, tolerance

from mtp_lightning.errors import UsageError
from mtp_lightning.losses import BaseCrossEntropy
from mtp_lightning.model import MTPModel
from mtp_lightning.modeling.masking import build_masked_input
from mtp_lightning.sampler_heads import MarkovSamplerHead


def test_noise_depends_on_seed_epoch_and_row_alone() -> None:
    rows, options = tiny_rows(), {"block_fraction": 0.6, "seed": 3}
    batch = build_masked_input(rows, 3, **options, epoch=1)
    drawn = batch.noise[batch.starts >= 0]
    assert len(drawn.unique()) == drawn.numel() > 9
    for epoch in (1, 2):
        alone = build_masked_input(rows[:1], 3, **options, epoch=epoch)
        assert torch.equal(alone.noise[0], batch.noise[0, : alone.noise.shape[1]]) == (epoch == 1)


def test_masks_are_the_embeddings_of_random_tokens_and_next_tokens_keep_their_bits() -> None:
    model, batch = tiny_model(mask_tokens="noise"), tiny_batch(3)
    states = model.hidden_states(batch)
    base = tiny_base()
    ids = batch.input_ids[0]  # one document
    with torch.no_grad(), model.gate.over_last(0):
        off = model.base.get_decoder()(ids[None]).last_hidden_state[0]
    torch.testing.assert_close(states.ntp[0], off, **tolerance(base))
    with torch.no_grad():
        for layer in (p for name, p in model.trained_parameters() if "lora_B" in name):
            layer.mul_(-7)
    changed = model.hidden_states(batch)
    assert torch.equal(changed.ntp, states.ntp) and not torch.allclose(changed.mtp[0, 0], states.mtp[0, 0])
    # The block after x_i as a plain causal sequence of token ids: the row's first tokens, then the noise.
    start = int(batch.starts[0, 1])
    sequence = torch.cat([ids[: start + 1], batch.noise[0, 1] % 97])
    with torch.no_grad(), model.gate.over_last(3):
        expected = model.base.get_decoder()(sequence[None]).last_hidden_state[0, -3:]
    torch.testing.assert_close(changed.mtp[0, 1], expected, **tolerance(base))


@pytest.mark.parametrize("with_head", [False, True])
def test_decoding_is_lossless_and_the_lora_is_trained(with_head: bool) -> None:
    model = tiny_model(num_masks=4, mask_tokens="noise", sampler_head=MarkovSamplerHead(2) if with_head else None)
    assert model.mask_embeddings is None
    names = {name for name, _ in model.trained_parameters()}
    assert all("lora_" in name for name in names) != with_head
    assert len(model.noise_tokens.unique()) == 4 and int(model.noise_tokens.max()) < 97
    prompt = token_row([7]).input_ids
    for options in ({}, {"decoding": "linear"}, {"exact": True}):
        text = model.generate(prompt[None], max_new_tokens=20, num_masks=4, **options).sequences[0, 7:]
        assert text.tolist() == greedy_text(tiny_base(), prompt, 20)
    model(tiny_batch(4), {"base": BaseCrossEntropy()}).sums["base"][0].total.backward()
    assert any(p.grad is not None and p.grad.any() for _, p in model.trained_parameters())


def test_other_mask_tokens_are_refused() -> None:
    with pytest.raises(UsageError, match="mask_tokens"):
        MTPModel(tiny_base(), mask_tokens="random")  # type: ignore[arg-type]
