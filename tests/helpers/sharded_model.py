# SPDX-License-Identifier: Apache-2.0
"""What two processes do with the shards of a model. A file of its own: a spawned process must be able to import it."""

from __future__ import annotations

from typing import Any

import torch
from tiny import tiny_base, tiny_model, token_row

from mtp_lightning.decoding.lockstep import in_step
from mtp_lightning.decoding.options import DecodingOptions
from mtp_lightning.evaluation.acceptance import evaluate_prompts
from mtp_lightning.losses import BaseCrossEntropy, SamplerCrossEntropy
from mtp_lightning.model import MTPModel
from mtp_lightning.modeling.masking import build_masked_input
from mtp_lightning.sampler_heads import MLPSamplerHead
from mtp_lightning.text.prompts import Prompt

PROMPTS = [Prompt("", list(range(1, 2 + length)), "") for length in (1, 40, 2, 3, 30)]
OPTIONS = DecodingOptions(num_masks=3, max_new_tokens=20)  # not auto, which depends on the machine


def decoded(model: MTPModel, rank: int = 0, world: int = 1) -> list[dict[str, Any]]:
    results = evaluate_prompts(model, PROMPTS, OPTIONS, num_lossless=2, rank=rank, world_size=world)
    return [{name: value for name, value in r._asdict().items() if name != "seconds"} for r in results]


def mixed_model() -> MTPModel:
    """A bfloat16 base whose unembedding is its embedding, with float32 adapters and head."""
    base = tiny_base("llama", torch.bfloat16, tie_word_embeddings=True)
    return tiny_model(base=base, sampler_head=MLPSamplerHead()).train()


def gradients(model: MTPModel, row: int) -> dict[str, Any]:
    """The gradient of each trained weight from a batch of one row."""
    output = model(build_masked_input([token_row([11], (), row)], 3), {"a": BaseCrossEntropy(), "b": SamplerCrossEntropy()})
    torch.stack([total for sums in output.sums.values() for total, _ in sums]).sum().backward()
    return {name: parameter.grad for name, parameter in model.trained_parameters()}


def sharded(rank: int) -> tuple[list[dict[str, Any]], int, int, dict[str, Any], set[tuple[bool, str]]]:
    """What two processes with shards of a model get.

    Each decodes its share of the prompts: the results, and how many passes it made. And with another model, each takes the
    gradient of its row: what comes of it, and the dtypes of frozen and trained shards.
    """
    from torch.distributed.device_mesh import init_device_mesh

    from mtp_lightning.training.sharding import full_value, shard_model

    mesh = init_device_mesh("cpu", (2,))
    mixed = mixed_model()
    shard_model(mixed, mesh)
    dtypes = {(p.requires_grad, str(p.to_local().dtype)) for p in mixed.parameters()}  # type: ignore[operator]
    found = {name: full_value(grad, True) for name, grad in gradients(mixed, rank).items()}
    model = tiny_model("llama")
    shard_model(model, mesh)
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    model.register_forward_pre_hook(count)
    with in_step(model):
        mine = decoded(model, rank, 2)
        own = calls
    return mine, own, calls, found, dtypes
