# SPDX-License-Identifier: Apache-2.0
"""From files to loss and gradient: packing, accumulation, ranks and sampled blocks leave them as they are (float64)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from tiny import in_one_pass, tiny_model
from torch import Tensor
from toy_tokenizers import word_tokenizer

from mtp_lightning.data.collator import MaskedInputCollator
from mtp_lightning.data.loader import WindowedLoader, build_dataloader
from mtp_lightning.data.preparing import Prepared, prepare
from mtp_lightning.losses import AnchorDistillation, BaseCrossEntropy, LatentConsistency, SamplerCrossEntropy, term_value
from mtp_lightning.model import MTPModel
from mtp_lightning.modeling.gated_lora import LoRA
from mtp_lightning.sampler_heads import GRUSamplerHead
from mtp_lightning.types import MaskedInput

K, CONTEXT = 3, 64
TERMS = {
    "base": BaseCrossEntropy(positions="all"),
    "sampler": SamplerCrossEntropy(),
    "lcm": LatentConsistency(),
    "distillation": AnchorDistillation(),
}


@pytest.fixture(scope="module")
def model() -> MTPModel:
    return in_one_pass(
        tiny_model(
            num_masks=K, sampler_head=GRUSamplerHead(hidden_size=8), lora=LoRA(rank=2), vocab_size=len(word_tokenizer())
        )
    )


@pytest.fixture
def source(write) -> str:
    """Questions and answers of different lengths; each document has its own tokens."""
    generator, words = np.random.default_rng(0), "one two three four five six system user".split()

    def text(length: int) -> str:
        return " ".join(words[word] for word in generator.integers(0, len(words), length))

    return write("a.jsonl", [{"prompt": text(1 + n % 3), "completion": text(3 + n % 7)} for n in range(12)])


def prepared(source: str, packing: bool) -> Prepared:
    return prepare(source, word_tokenizer(), max_length=24, packing=packing)[0]


def batches(
    rows: Prepared, packing: bool, accumulate: int, world: int, fraction: float = 1.0, epoch: int = 0
) -> Iterator[list[list[MaskedInput]]]:
    """The optimizer steps of an epoch: for each rank the batches it accumulates."""
    collator = MaskedInputCollator(K, fraction, seed=1, context=CONTEXT)
    ranks = [
        WindowedLoader(
            build_dataloader(rows.rows, collator, 2, rank=rank, world=world, bucketed=not packing), accumulate, epoch=epoch
        )
        for rank in range(world)
    ]
    loaders = [iter(rank) for rank in ranks]
    while step := [list(itertools.islice(loader, accumulate)) for loader in loaders]:
        if not step[0]:
            return
        yield step


def value_and_gradient(model: MTPModel, step: list[list[MaskedInput]]) -> Tensor:
    """What ``MTPModule.training_step`` and DDP make of one optimizer step: the terms' values, and the gradients."""
    trained = [model.mask_embeddings, *model.sampler_head.output.parameters()]  # type: ignore[union-attr]
    trained += [p for name, p in model.named_parameters() if name.endswith("q_proj.lora_B.default.weight")]
    counts = torch.stack([rank[0].counts for rank in step]).sum(0)  # each batch has its rank's sum over the step
    parts = []
    for batch in itertools.chain(*step):
        sums = model(batch, TERMS).sums
        values = torch.stack([term_value(s, counts) for s in sums.values()])
        grads = torch.autograd.grad(values.sum(), trained)
        parts.append(torch.cat([values.detach(), *[g.flatten() for g in grads]]))
    return torch.stack(parts).sum(0)


@pytest.mark.parametrize(("packing", "accumulate", "world"), [(True, 6, 1), (False, 3, 2), (True, 3, 2), (False, 2, 3)])
def test_loss_and_gradient_do_not_depend_on_packing_accumulation_or_ranks(
    model: MTPModel, source: str, packing: bool, accumulate: int, world: int
) -> None:
    """One step over all rows: in six batches of two, packed, on two and on three ranks."""
    (alone,) = batches(prepared(source, False), False, 6, 1)
    rows = prepared(source, packing)
    steps = list(batches(rows, packing, accumulate, world))
    assert len(steps) == 1 and len(steps[0]) == world and (rows.report.rows < rows.report.documents) == packing
    expected, found = value_and_gradient(model, alone), value_and_gradient(model, steps[0])
    assert len(expected) > 300 and expected[:4].min() > 0.1
    # Sums of the same numbers in another order, through layers of other shapes.
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


def test_a_quarter_of_the_blocks_has_the_same_expectation(model: MTPModel, source: str) -> None:
    """The mean over epochs, whose starts differ, is the loss and gradient of full coverage, within its standard error.

    The rows are packed, accumulated and shared by two ranks.
    """
    (full_step,) = batches(prepared(source, False), False, 6, 1)
    full = value_and_gradient(model, full_step)
    rows, epochs = prepared(source, packing=True), 80
    drawn = []
    for epoch in range(epochs):
        (step,) = batches(rows, True, 3, 2, 0.25, epoch)
        drawn.append(value_and_gradient(model, step))
    draws = torch.stack(drawn)
    blocks = [sum(int((batch.starts >= 0).sum()) for batch in itertools.chain(*s)) for s in (full_step, step)]
    assert blocks[1] < 0.4 * blocks[0]
    error = draws.std(0) / epochs**0.5
    moving = error > 1e-12  # a gradient that no draw changes has no error, and is compared below
    z = (draws.mean(0) - full)[moving] / error[moving]
    # About four hundred correlated numbers, nearly normal means: the largest z of a right estimate is near 3.
    assert moving[:4].sum() == 4 and z.abs().max() < 5 and 0.5 < z.square().mean().sqrt() < 1.6
    torch.testing.assert_close(draws.mean(0)[~moving], full[~moving], rtol=1e-8, atol=1e-10)
    # Sharp enough: without block weights the values would be a third of what they should be.
    assert (error < 0.05 * full)[:4].all()
