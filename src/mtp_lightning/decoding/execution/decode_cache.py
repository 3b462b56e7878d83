# SPDX-License-Identifier: Apache-2.0
"""What decoding keeps for a model between texts: prepared weights, caches with their graphs, and calibrated costs.

Prepared weights are rebuilt when the model's weights have changed. The modules keep their own: within
``DecodeCache.fused`` only their ``forward`` is replaced.
"""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mtp_lightning.decoding.execution.fused_lora import (
    Forward,
    can_fuse,
    fused_forwards,
    is_plain_linear,
    lora_matrices,
)
from mtp_lightning.decoding.packed_linear import is_autocast
from mtp_lightning.decoding.planning.step_costs import StepCosts
from mtp_lightning.decoding.row_cache import RowCache
from mtp_lightning.modeling.peft_private import ADAPTER, lora_layers
from mtp_lightning.modeling.transformers_private import attention_kernel

if TYPE_CHECKING:
    from mtp_lightning.modeling.network import MTPNetwork

SAMPLE_SIZE = 8
"""Elements of a weight that are compared to see if it has changed."""
MAX_CACHES = 2
"""Caches that are kept for later texts, with the graphs over them: those used last."""
MIN_SLOTS = 256


def rounded_slots(slots: int) -> int:
    """Slots of a cache whose shape never changes: a power of two, so that texts share their graphs."""
    return max(MIN_SLOTS, 1 << (slots - 1).bit_length())


class DecodeCache:
    """What decoding keeps for one model. A copied or pickled model starts with an empty one."""

    def __init__(self) -> None:
        self._fingerprint: tuple[Any, ...] | None = None
        self._forwards: list[tuple[dict[str, Any], Forward]] = []  # vars() of each layer: its setattr is slow
        self.output: nn.Linear | None = None  # the output layer if it is a plain linear one
        self.lock = threading.RLock()  # held while a step runs
        self._depth = 0
        self._device_and_dtype: tuple[torch.device, torch.dtype] | None = None
        self._graph_inputs: tuple[Any, ...] | None = None
        self._caches: dict[tuple[int, int], RowCache] = {}
        self.generation = 0  # counts the changes of what graphs read
        self.graphs_failed = False  # True if making a graph of a step has failed
        self.calibrations: dict[str, StepCosts] = {}  # costs of steps, by all that they depend on

    def __reduce__(self) -> Any:
        return DecodeCache, ()

    @contextlib.contextmanager
    def fused(self) -> Iterator[None]:
        """Run the layers with the prepared weights within the ``with`` block; cheap, and one thread at a time.

        Under autocast they keep their own forward pass: packed weights are not cast.
        """
        assert self._device_and_dtype is not None, "not prepared"
        with self.lock:
            for attributes, forward in [] if is_autocast(self._device_and_dtype[0]) else self._forwards:
                attributes["forward"] = forward
            self._depth += 1
            try:
                yield
            finally:
                self._depth -= 1
                if self._depth == 0:
                    self._restore()

    def _restore(self) -> None:
        for attributes, _ in self._forwards:
            attributes.pop("forward", None)

    def prepare(self, model: MTPNetwork) -> None:
        """Prepare weights, unless those there are were prepared from the same. The check is slow: once per text."""
        with self.lock:
            if self._depth:  # called within ``fused``
                self._restore()
            self._prepare(model)

    def _prepare(self, model: MTPNetwork) -> None:
        device, dtype, base = model.base.device, model.base.dtype, model.base
        self._device_and_dtype = device, dtype

        layers = [layer for layer in lora_layers(base) if can_fuse(layer, model.gate)]
        output: Any = base.get_output_embeddings()
        self.output = output if is_plain_linear(output) else None
        fingerprint = _fingerprint(model, layers, self.output)
        if fingerprint == self._fingerprint:
            return

        self.clear()  # first: both may not fit into memory
        forwards = fused_forwards(base, layers, self.output, model.gate)
        self._forwards = [(vars(layer), forward) for layer, forward in forwards]
        self._fingerprint = fingerprint

    def clear(self) -> None:
        """Free the memory; the next text prepares its weights again."""
        if self._depth:
            self._restore()
        self._forwards, self._fingerprint = [], None
        self.graphs_failed = False
        self._drop_graphs()

    def _drop_graphs(self) -> None:
        had_graphs = any(cache.graphs for cache in self._caches.values())
        self._caches.clear()
        self.generation += 1
        if had_graphs:
            gc.collect()  # compiled code and its buffers reference each other

    def drop_stale_graphs(self, model: MTPNetwork) -> None:
        """Drop the graphs if a weight was replaced or steps would be computed differently since they were made."""
        tensors = (*model.parameters(), *model.buffers())
        graph_inputs = (
            tuple((id(tensor), tensor.data_ptr()) for tensor in tensors),
            attention_kernel(model.base),
            torch.get_num_threads(),
        )
        if graph_inputs != self._graph_inputs:
            self._graph_inputs = graph_inputs
            self._drop_graphs()

    @contextlib.contextmanager
    def kv_cache(self, model: MTPNetwork, num_rows: int, slots: int) -> Iterator[RowCache]:
        """An empty cache of at least ``slots`` slots; its buffers, and graphs of steps over them, serve later texts too."""
        size = rounded_slots(slots)
        cache = self._caches.pop((num_rows, size), None) or RowCache(model.base, num_rows)
        cache.lengths = [0] * num_rows
        cache.reserve(size, size)
        generation = self.generation
        try:
            yield cache
        finally:
            if generation == self.generation:
                while len(self._caches) >= MAX_CACHES:
                    if self._caches.pop(next(iter(self._caches))).graphs:
                        gc.collect()
                self._caches[num_rows, size] = cache


_creating = threading.Lock()


def decode_cache(network: MTPNetwork) -> DecodeCache:
    """What decoding keeps for a network between texts; created at the first call."""
    with _creating:
        if network.decode_cache is None:
            network.decode_cache = DecodeCache()
        cache: DecodeCache = network.decode_cache
    return cache


def clear_decode_cache(network: MTPNetwork) -> None:
    """Free what decoding keeps for a network; the next text prepares it again."""
    if network.decode_cache is not None:
        network.decode_cache.clear()


def _fingerprint(model: MTPNetwork, layers: Sequence[Any], output: nn.Linear | None) -> tuple[Any, ...]:
    """Identifies the weights that are prepared; changes whenever one of them does."""
    weights = [weight for layer in layers for weight in (*lora_matrices(layer), *layer.base_layer.parameters())]
    if output is not None:
        weights += output.parameters()
    scalings = [layer.scaling[ADAPTER] for layer in layers]
    # Versions count changes in place, except through .data, by a fused optimizer, or of tensors made in inference mode.
    versions = [-1 if weight.is_inference() else weight._version for weight in weights]
    identities = [(w.data_ptr(), version, w.dtype, w.device) for w, version in zip(weights, versions, strict=True)]
    return (*scalings, _sample(weights), *identities)


def _sample(weights: Sequence[Tensor]) -> bytes:
    """A few elements of each weight."""
    by_device: dict[torch.device, list[Tensor]] = {}
    for weight in weights:
        if weight.device.type != "meta" and not hasattr(weight, "placements"):  # sharded weights are not prepared
            part = weight.detach().reshape(-1)[:: max(1, weight.numel() // SAMPLE_SIZE)][:SAMPLE_SIZE].float()
            by_device.setdefault(part.device, []).append(part)
    return b"".join(torch.cat(group).cpu().numpy().tobytes() for group in by_device.values())
