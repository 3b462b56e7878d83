# SPDX-License-Identifier: Apache-2.0
"""Lean layers: while decoding, gated LoRA layers over plain linear ones run few operations, from weights made ready once.

The modules themselves are left as they are: only their ``forward`` is covered, and uncovered afterwards.
Layers of any other kind (quantised, offloaded, sharded, with hooks, with other adapters) keep PEFT's own path, and under
``torch.autocast`` all do.
"""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mtp_lightning.decoding.execution.draft_chain import Chain, DraftChain, unrolled
from mtp_lightning.decoding.execution.fused_lora import (
    Forward,
    JoinedLayers,
    SharedAdapters,
    adapter,
    unembedding_forward,
)
from mtp_lightning.decoding.packed_linear import is_autocast, packed_dtypes
from mtp_lightning.decoding.planning.draft_stats import DraftStats
from mtp_lightning.decoding.planning.step_costs import StepCosts
from mtp_lightning.decoding.row_cache import RowCache
from mtp_lightning.decoding.shortlist import Shortlist
from mtp_lightning.modeling.gated_lora import Gate, GatedVariant
from mtp_lightning.modeling.peft_private import ADAPTER, LoraLinear, get_variant, lora_layers
from mtp_lightning.modeling.transformers_private import attention_kernel, offload_hook

if TYPE_CHECKING:
    from mtp_lightning.modeling.label_counts import LabelCounts
    from mtp_lightning.modeling.network import MTPNetwork

SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Names of layers that read the same input. Each pass looks again, so a model where they do not only loses time."""
SAMPLE = 8
"""Numbers of a weight that are compared to see whether it has changed."""
LARGEST_COPY = 2 << 30
"""Bytes of weights that are joined and packed, on a CPU; larger bases are read where they lie."""


KEPT_CACHES = 2
"""Caches that are kept for later texts, with the graphs over them; the one that was used last stays longest."""
SMALLEST_CACHE = 256


def rounded_slots(slots: int) -> int:
    """Slots of a cache whose shape never changes: a power of two, so that texts share their graphs."""
    return max(SMALLEST_CACHE, 1 << (slots - 1).bit_length())


class DecodeCache:
    """Weights made ready for decoding, and whether they are still those of the model.

    A copied or pickled model makes its own.

    Attributes:
        lock: held while a step runs.
        generation: counts up each time that weights are made.
        no_graphs: whether making a graph of a step has failed.
        calibrations: what steps cost on this device and in this dtype, and how drafts do, by whether steps are graphs and by
            the number of tokens that drafts are chosen from; empty until somebody asks.
    """

    def __init__(self) -> None:
        self._made_from: tuple[Any, ...] | None = None
        self._forwards: list[tuple[nn.Module, Forward]] = []
        self._chain: Chain | None = None
        self._output: nn.Linear | None = None
        self._shortlist: tuple[LabelCounts | None, int, Shortlist] | None = None
        self._depth = 0
        self.lock = threading.RLock()
        self._place: tuple[torch.device, torch.dtype] | None = None
        self._read: tuple[Any, ...] | None = None
        self._caches: dict[tuple[int, int], RowCache] = {}
        self.generation = 0
        self.no_graphs = False
        self.calibrations: dict[tuple[bool, int], tuple[StepCosts, DraftStats]] = {}

    def __reduce__(self) -> Any:
        return DecodeCache, ()

    def __deepcopy__(self, memo: Any) -> DecodeCache:
        return DecodeCache()

    @contextlib.contextmanager
    def use(self, model: MTPNetwork) -> Iterator[None]:
        """Prepare the weights, and run the model's layers with them within the ``with`` block."""
        self.prepare(model)
        with self.covered():
            yield

    @contextlib.contextmanager
    def covered(self) -> Iterator[None]:
        """Run the layers with the prepared weights within the ``with`` block; cheap, and one thread at a time."""
        with self.lock:
            for layer, forward in self._forwards:
                vars(layer)["forward"] = forward  # setattr of a module is slow
            self._depth += 1
            try:
                yield
            finally:
                self._depth -= 1
                if self._depth == 0:
                    self._uncover()

    def clear(self) -> None:
        """Give the memory back; the next text makes its weights anew."""
        if self._depth:
            self._uncover()
        self._forwards, self._chain, self._shortlist, self._made_from = [], None, None, None
        self.no_graphs = False
        self._outdate()

    def _outdate(self) -> None:
        """Let go of the graphs, which read what is about to be replaced."""
        had_graphs = any(cache.graphs for cache in self._caches.values())
        self._caches.clear()
        self.generation += 1
        if had_graphs:
            gc.collect()  # compiled code and its buffers hold each other

    def drop_stale_graphs(self, model: MTPNetwork) -> None:
        """Let go of the graphs where the model has another weight by now, or would compute otherwise.

        Args:
            model: the model.
        """
        tensors = (*model.parameters(), *model.buffers())
        read = (
            tuple((id(each), each.data_ptr()) for each in tensors),
            attention_kernel(model.base),
            torch.get_num_threads(),
        )
        if read != self._read:
            self._read = read
            self._outdate()

    @contextlib.contextmanager
    def kv_cache(self, model: MTPNetwork, num_rows: int, slots: int) -> Iterator[RowCache]:
        """An empty cache with buffers that later texts take again, and with them the graphs of steps over these buffers.

        Args:
            model: the model.
            num_rows: rows B.
            slots: slots that the cache needs.

        Yields:
            The cache; nobody else has it within the ``with`` block.
        """
        size = rounded_slots(slots)
        cache = self._caches.pop((num_rows, size), None) or RowCache(model.base, num_rows)
        cache.lengths = [0] * num_rows
        cache.reserve(size, size)
        generation = self.generation
        try:
            yield cache
        finally:
            if generation == self.generation:
                while len(self._caches) >= KEPT_CACHES:
                    if self._caches.pop(next(iter(self._caches))).graphs:
                        gc.collect()
                self._caches[num_rows, size] = cache

    def _uncover(self) -> None:
        for layer, _ in self._forwards:
            vars(layer).pop("forward", None)

    def chain(self, model: MTPNetwork) -> Chain:
        """The sampler head's chain."""
        assert model.sampler_head is not None
        if self._chain is not None and not is_autocast(model.base.device):
            return self._chain
        return DraftChain(model.sampler_head, model.base.get_input_embeddings())

    def shortlist(self, model: MTPNetwork, size: int) -> Shortlist | None:
        """The unembedding of the most frequent tokens. The last one that was asked for is kept.

        Args:
            model: the model, its fused layers in use.
            size: number of tokens. Where nothing was counted the first ids stand for the most frequent ones.

        Returns:
            The shortlist; None where the output layer is no plain one, or so many rows of it are too large to be copied.
        """
        counts, output = model.label_counts, self._output
        if output is None or size * output.in_features * output.weight.element_size() > LARGEST_COPY:
            return None
        if self._shortlist is None or self._shortlist[0] is not counts or self._shortlist[1] != size:
            if self._shortlist is not None:
                self._outdate()  # the graphs over it
            self._shortlist = None  # before a new one is made: both may not fit into memory
            tokens = torch.arange(size) if counts is None else counts.order[:size].sort().values
            self._shortlist = (counts, size, Shortlist(model.unembed, tokens.to(output.weight.device)))
        return self._shortlist[2]

    def prepare(self, model: MTPNetwork) -> None:
        """Make the weights, unless they are still those of the model. The check is slow: once a text."""
        with self.lock:
            if self._depth:  # called within ``covered``
                self._uncover()
            self._prepare(model)

    def _prepare(self, model: MTPNetwork) -> None:
        device, dtype = model.base.device, model.base.dtype
        if self._place not in (None, (device, dtype)):
            self.calibrations.clear()
        self._place = (device, dtype)
        layers = [layer for layer in lora_layers(model.base) if is_plain(layer, model.gate)]
        head = model.sampler_head
        weights = [each for layer in layers for each in (*adapter(layer), *layer.base_layer.parameters())]
        weights += [] if head is None else [model.base.get_input_embeddings().weight, *head.parameters()]
        output: Any = model.base.get_output_embeddings()
        self._output = output if _is_plain_linear(output) else None
        packs = self._output is not None and _packs(output, layers)
        weights += [*output.parameters()] if self._output is not None else []
        scalings = [layer.scaling[ADAPTER] for layer in layers]
        made_from = (head, *scalings, _sample(weights), *((w.data_ptr(), _version(w), w.dtype, w.device) for w in weights))
        if made_from == self._made_from:
            return
        self.clear()  # before new ones are made: both may not fit into memory
        self._forwards = lean_forwards(layers, model)
        if packs:
            self._forwards.append((output, unembedding_forward(output)))
        if head is not None and all(type(p.data) is Tensor and p.device == device for p in head.parameters()):
            vocab_size = model.unembed.vocab_size
            with torch.autocast(device.type, enabled=False):
                self._chain = unrolled(head, model.base.get_input_embeddings(), vocab_size, dtype)
        self._made_from = made_from


def decode_cache(network: MTPNetwork) -> DecodeCache:
    """What decoding keeps for a network between texts; made at the first call."""
    if network.decode_cache is None:
        network.decode_cache = DecodeCache()
    found: DecodeCache = network.decode_cache
    return found


def clear_decode_cache(network: MTPNetwork) -> None:
    """Free what decoding keeps for a network; the next text prepares it again."""
    if network.decode_cache is not None:
        network.decode_cache.clear()


def _sample(weights: list[Tensor]) -> bytes:
    """A few numbers of each weight. Some changes are counted nowhere: through ``.data``, by a fused optimizer."""
    by_device: dict[torch.device, list[Tensor]] = {}
    for weight in weights:
        if weight.device.type != "meta" and not hasattr(weight, "placements"):  # of a sharded one nothing is made ready
            part = weight.detach().reshape(-1)[:: max(1, weight.numel() // SAMPLE)][:SAMPLE].float()
            by_device.setdefault(part.device, []).append(part)
    return b"".join(torch.cat(group).cpu().numpy().tobytes() for group in by_device.values())


def _version(weight: Tensor) -> int:
    """Counts changes in place; a weight made in inference mode has no count, and -1 stands for it."""
    return -1 if weight.is_inference() else weight._version


def is_plain(layer: Any, gate: Gate) -> bool:
    """Whether a LoRA layer is a gated adapter on a plain linear layer, and nobody else has a hand in it."""
    modules = (layer, *layer.children(), *layer.lora_A.children(), *layer.lora_B.children())
    if any(map(_is_touched, modules)) or type(layer) is not LoraLinear or type(layer.base_layer) is not nn.Linear:
        return False
    if layer.disable_adapters or layer.merged or layer.active_adapters != [ADAPTER] or layer.fan_in_fan_out:
        return False
    variant = get_variant(layer)
    if not isinstance(variant, GatedVariant) or variant.gate is not gate or layer.lora_B[ADAPTER].bias is not None:
        return False
    weights = (*adapter(layer), layer.base_layer.weight)
    return all(type(w.data) is Tensor and w.device == weights[0].device and w.device.type != "meta" for w in weights)


def lean_forwards(layers: list[Any], model: MTPNetwork) -> list[tuple[nn.Module, Forward]]:
    """A forward pass for each layer.

    Args:
        layers: gated LoRA layers on plain linear ones.
        model: the model that they are in.

    Returns:
        Layers and their forward passes.
    """
    names = {id(module): name for name, module in model.base.named_modules()}
    groups: dict[tuple[str, str, Any], list[Any]] = {}
    for layer in layers:
        parent, _, own = names[id(layer)].rpartition(".")
        family = next((siblings[0] for siblings in SIBLINGS if own in siblings), own)
        weight = layer.base_layer.weight
        groups.setdefault((parent, family, (weight.device, weight.dtype, weight.shape[1])), []).append(layer)
    small = _copied_bytes(layers) <= LARGEST_COPY
    found: list[tuple[nn.Module, Forward]] = []
    for (_, _, (device, _, _)), members in groups.items():
        kind = JoinedLayers if small and device.type == "cpu" else SharedAdapters
        found += kind(members, model.gate).forwards()
    return found


def _is_plain_linear(layer: Any) -> bool:
    """Whether a layer is a plain linear one whose weight is at hand, and nobody else has a hand in it."""
    if type(layer) is not nn.Linear or _is_touched(layer):
        return False
    return all(type(p.data) is Tensor and p.device.type != "meta" for p in layer.parameters())


def _packs(output: nn.Linear, layers: list[Any]) -> bool:
    """Whether the base's output layer, a plain one, is small enough to be packed beside the others."""
    weight = output.weight
    if weight.device.type != "cpu" or weight.dtype not in packed_dtypes():
        return False
    return _copied_bytes(layers) + weight.numel() * weight.element_size() <= LARGEST_COPY


def _is_touched(module: nn.Module) -> bool:
    """Whether somebody else has a hand in a module's forward pass."""
    hooks = module._forward_hooks or module._forward_pre_hooks
    return bool(hooks or "forward" in vars(module) or offload_hook(module) is not None)


def _copied_bytes(layers: list[Any]) -> int:
    weights = [each for layer in layers for each in (layer.base_layer.weight, adapter(layer)[0])]
    return sum(weight.numel() * weight.element_size() for weight in weights)
