# SPDX-License-Identifier: Apache-2.0
"""Sharding with FSDP2: which parts of a model form a shard, and tensors between whole and sharded form. No Lightning."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard

from mtp_lightning.modeling.network import MTPNetwork


def shard_model(model: MTPNetwork, mesh: DeviceMesh, cpu_offload: bool = False) -> None:
    """Spread a model over processes, in place: each decoder layer is gathered when it runs, the rest with the model.

    Nothing is converted: the frozen base stays in its dtype, what is trained in float32, within one shard too. Everything
    that touches weights runs inside the model's ``forward``, where they are gathered.

    Args:
        model: the model, the same in every process.
        mesh: one dimension, the processes.
        cpu_offload: keep the shards, gradients and the optimizer's state in the host's memory.
    """
    options: dict[str, Any] = {"mesh": mesh}
    if cpu_offload:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda")
    for layer in model.base.get_decoder().layers:
        fully_shard(layer, **options)
    fully_shard(model, **options)


def reshard(model: nn.Module) -> None:
    """Give back what a forward pass without a backward pass left gathered.

    Args:
        model: a model with sharded parts.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def whole(value: Any, keep: bool) -> Any:
    """A whole tensor on the CPU from its shards; anything else as it is. All processes must call it.

    Args:
        value: a sharded tensor, or anything.
        keep: whether this process wants it.

    Returns:
        The tensor, or None in a process that does not want it.
    """
    if isinstance(value, DTensor):
        value = value.full_tensor()
    if not keep:
        return None
    return value.detach().cpu() if isinstance(value, Tensor) else value


def part_of(value: Tensor, like: DTensor) -> Tensor:
    """This process's part of a whole tensor.

    Args:
        value: the whole tensor, with the shape of ``like``.
        like: a sharded tensor, split along one dimension as FSDP2 does it.

    Returns:
        The part, on the device and in the dtype of ``like``.
    """
    (placement,) = like.placements
    local = like.to_local()
    if not isinstance(placement, Shard):
        return value.to(local)
    chunks = value.chunk(like.device_mesh.size(), placement.dim)
    rank = like.device_mesh.get_local_rank()
    part = chunks[rank] if rank < len(chunks) else value.narrow(placement.dim, 0, 0)
    return part.to(local)


def as_shards(value: Tensor, like: DTensor) -> DTensor:
    """A whole tensor, spread as another one is.

    Args:
        value: the whole tensor, with the shape of ``like``.
        like: a sharded tensor.

    Returns:
        The sharded tensor.
    """
    return DTensor.from_local(
        part_of(value, like).contiguous(),
        like.device_mesh,
        like.placements,
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    )


@torch.no_grad()
def load_whole(module: nn.Module, state: dict[str, Tensor]) -> set[str]:
    """Load whole tensors into a module whose parameters may be sharded.

    Args:
        module: the module.
        state: name -> whole tensor; names that are left out stay as they are.

    Returns:
        Names in ``state`` that the module does not have.
    """
    reshard(module)
    own = dict(module.state_dict(keep_vars=True))
    for name in state.keys() & own.keys():
        there = own[name]
        if isinstance(there, DTensor):
            there.to_local().copy_(part_of(state[name], there))
        else:
            there.copy_(state[name])
    return set(state.keys() - own.keys())
