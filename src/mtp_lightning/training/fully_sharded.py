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
from mtp_lightning.training.lightning_private import use_data_parallelism_only
from mtp_lightning.training.sharding import full_value, load_full_state, reshard, shard_like


class FullyShardedStrategy(ModelParallelStrategy):
    """Weights, gradients and the optimizer's state spread over all devices; a decoder layer is gathered when it runs.

    Checkpoints are those of one device or of DDP: trained weights and the optimizer's state, unsharded, in one file.
    Lightning's own would gather the base to leave it out again, and number the optimizer's state by all parameters, so that
    only the same strategy could resume from it.

    Args:
        cpu_offload: keep the shards, the gradients and the optimizer's state in host memory. Much slower.
        load_in_turns: the processes of a machine load the base one after another, so that host memory has to hold it only
            once, not once per process.
        process_group_backend: the collectives' backend. None: the device's own, and with ``cpu_offload`` gloo as well.
    """

    def __init__(
        self, cpu_offload: bool = False, load_in_turns: bool = False, process_group_backend: str | None = None
    ) -> None:
        if cpu_offload and process_group_backend is None and torch.cuda.is_available():
            process_group_backend = "cpu:gloo,cuda:nccl"  # gloo: norms and checkpoints of offloaded shards
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
        """Use data parallelism over all devices, and no tensor parallelism."""
        use_data_parallelism_only(self)
        super().setup_environment()

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
        """The full trained weights in the first process; nothing in the others."""
        assert self.lightning_module is not None
        reshard(self.lightning_module)
        state = trained_state(self.lightning_module.state_dict())
        gathered = {name: full_value(value, self.is_global_zero) for name, value in state.items()}
        return gathered if self.is_global_zero else {}

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint; every process reads the file that the first one names."""
        torch.cuda.empty_cache()
        return self.checkpoint_io.load_checkpoint(self.broadcast(checkpoint_path), weights_only=True)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load the trained weights into their shards."""
        assert self.lightning_module is not None
        load_full_state(self.lightning_module, checkpoint["state_dict"])

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The full state of the optimizer in the first process; nothing in the others."""
        if isinstance(optimizer, LightningOptimizer):
            optimizer = optimizer.optimizer
        state_dict = optimizer.state_dict()
        states = {
            number: {name: full_value(value, self.is_global_zero) for name, value in state.items()}
            for number, state in state_dict["state"].items()
        }
        return {**state_dict, "state": states} if self.is_global_zero else {}

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Load the optimizer's state, sharded as its parameters are."""
        for optimizer, state_dict in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
            states = {
                number: {name: _shard_state(value, parameter) for name, value in state_dict["state"][number].items()}
                for number, parameter in zip(numbers, parameters, strict=True)
                if number in state_dict["state"]
            }
            optimizer.load_state_dict({**state_dict, "state": states})


def _shard_state(value: Any, parameter: Any) -> Any:
    """An entry of a parameter's optimizer state, sharded if it has the parameter's shape; step counts are not."""
    if isinstance(parameter, DTensor) and isinstance(value, torch.Tensor) and value.shape == parameter.shape and value.ndim:
        return shard_like(value, parameter)
    return value
