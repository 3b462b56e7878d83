# SPDX-License-Identifier: Apache-2.0
"""Sharding with FSDP2: which parts of a model form a shard, and tensors between full and sharded form. No Lightning."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard

from mtp_lightning.modeling.decoder import decoder_layers
from mtp_lightning.modeling.network import MTPNetwork


def shard_model(model: MTPNetwork, mesh: DeviceMesh, cpu_offload: bool = False) -> None:
    """Spread a model over processes, in place: each decoder layer is gathered when it runs, the rest with the model.

    Nothing is converted: the frozen base stays in its dtype, what is trained in float32, within one shard too. Everything
    that touches weights runs inside the model's ``forward``, where they are gathered.
    """
    options: dict[str, Any] = {"mesh": mesh}
    if cpu_offload:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda")
    for layer in decoder_layers(model.base):
        fully_shard(layer, **options)
    fully_shard(model, **options)


def reshard(model: nn.Module) -> None:
    """Free the weights that a forward pass without a backward pass left gathered."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def full_value(value: Any, keep: bool) -> Any:
    """A sharded tensor gathered to the CPU, anything else as it is; None unless ``keep``. All processes must call it."""
    if isinstance(value, DTensor):
        value = value.full_tensor()
    if not keep:
        return None
    return value.detach().cpu() if isinstance(value, Tensor) else value


def local_part(value: Tensor, like: DTensor) -> Tensor:
    """This process's part of a full tensor of the shape of ``like``, on its device and in its dtype."""
    (placement,) = like.placements
    local = like.to_local()
    if not isinstance(placement, Shard):
        return value.to(local)
    chunks = value.chunk(like.device_mesh.size(), placement.dim)  # as FSDP2 splits: the last ranks may get nothing
    rank = like.device_mesh.get_local_rank()
    part = chunks[rank] if rank < len(chunks) else value.narrow(placement.dim, 0, 0)
    return part.to(local)


def shard_like(value: Tensor, like: DTensor) -> DTensor:
    """A full tensor of the shape of ``like``, sharded in the same way."""
    return DTensor.from_local(
        local_part(value, like).contiguous(),
        like.device_mesh,
        like.placements,
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    )


@torch.no_grad()
def load_full_state(module: nn.Module, state: dict[str, Tensor]) -> None:
    """Load full tensors by name into a module whose parameters may be sharded; other names on either side are ignored."""
    reshard(module)
    targets = dict(module.state_dict(keep_vars=True))
    for name in state.keys() & targets.keys():
        target = targets[name]
        if isinstance(target, DTensor):
            target.to_local().copy_(local_part(state[name], target))
        else:
            target.copy_(state[name])
