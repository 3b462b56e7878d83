# SPDX-License-Identifier: Apache-2.0
"""FullyShardedStrategy: Lightning's ModelParallelStrategy (FSDP2) for a frozen base with trained adapters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from mtp_lightning.saving.checkpoint import trained_state
from mtp_lightning.training.sharding import as_shards, load_whole, reshard, whole


class FullyShardedStrategy(ModelParallelStrategy):
    """Weights, gradients and the optimizer's state spread over all devices; a decoder layer is gathered when it runs.

    Checkpoints are those of one device or of DDP: trained weights and the optimizer's state, whole, in one file. Lightning's
    own would gather the base to leave it out again, and number the optimizer's state by all parameters, so that only the
    same strategy could go on from it.

    Args:
        cpu_offload: keep the shards, the gradients and the optimizer's state in the host's memory. Much slower.
        load_in_turns: the processes of a machine load the base one after another, so that the host's memory need hold it
            once only, not once a process.
        process_group_backend: the collectives' backend. None: the device's own, and with ``cpu_offload`` gloo beside it.
    """

    def __init__(
        self, cpu_offload: bool = False, load_in_turns: bool = False, process_group_backend: str | None = None
    ) -> None:
        super().__init__(save_distributed_checkpoint=False, process_group_backend=process_group_backend)
        self.cpu_offload = cpu_offload
        self.load_in_turns = load_in_turns

    @property
    def lightning_restore_optimizer(self) -> bool:
        """The optimizer's state is loaded as with any other strategy."""
        return True

    @property
    def mesh(self) -> DeviceMesh:
        """The processes, in one dimension."""
        return self.device_mesh["data_parallel"]

    def setup_environment(self) -> None:
        """All devices share the data; none the products within a layer."""
        self._data_parallel_size, self._tensor_parallel_size = self.num_nodes * self.num_processes, 1
        super().setup_environment()

    def _get_process_group_backend(self) -> str:
        backend = super()._get_process_group_backend()
        if self.cpu_offload and self._process_group_backend is None and self.root_device.type == "cuda":
            return f"cpu:gloo,cuda:{backend}"  # norms and checkpoints of offloaded shards
        return backend

    def model_to_device(self) -> None:
        """Move what is not sharded; offloaded shards stay where they are."""
        if not self.cpu_offload:
            super().model_to_device()
            return
        assert self.lightning_module is not None
        for name, child in self.lightning_module.named_children():
            if name != "model":
                child.to(self.root_device)
        model: Any = self.lightning_module.model
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(self.root_device))

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The trained weights, whole, in the first process; nothing in the others."""
        assert self.lightning_module is not None
        reshard(self.lightning_module)
        state = trained_state(self.lightning_module.state_dict())
        gathered = {name: whole(value, self.is_global_zero) for name, value in state.items()}
        return gathered if self.is_global_zero else {}

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint; every process reads the one that the first was told."""
        torch.cuda.empty_cache()
        found: dict[str, Any] = self.checkpoint_io.load_checkpoint(self.broadcast(checkpoint_path), weights_only=True)
        return found

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load the trained weights into their shards."""
        assert self.lightning_module is not None
        load_whole(self.lightning_module, checkpoint["state_dict"])

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The optimizer's state, whole, in the first process; nothing in the others."""
        if isinstance(optimizer, LightningOptimizer):
            optimizer = optimizer._optimizer
        found = optimizer.state_dict()
        states = {
            number: {name: whole(value, self.is_global_zero) for name, value in each.items()}
            for number, each in found["state"].items()
        }
        return {**found, "state": states} if self.is_global_zero else {}

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Load the optimizer's state into shards."""
        for optimizer, found in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            numbers = [number for group in found["param_groups"] for number in group["params"]]
            states = {
                number: {name: _spread(value, parameter) for name, value in found["state"][number].items()}
                for number, parameter in zip(numbers, parameters, strict=True)
                if number in found["state"]
            }
            optimizer.load_state_dict({**found, "state": states})


def _spread(value: Any, parameter: torch.nn.Parameter) -> Any:
    """A part of the optimizer's state, sharded as its parameter is; counts stay whole."""
    sharded: Any = parameter
    if isinstance(sharded, DTensor) and isinstance(value, torch.Tensor) and value.shape == sharded.shape and value.ndim:
        return as_shards(value, sharded)
    return value
