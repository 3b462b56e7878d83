# SPDX-License-Identifier: Apache-2.0
"""Sizing: how much memory and how many floating-point operations a training step takes, from shapes alone. Pure functions.

An estimate of what autograd keeps, good to plan with and to say what to lower; allocators and kernels add their own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from mtp_lightning.losses.chunked import LOGITS_PER_CHUNK
from mtp_lightning.modeling.decoder import decoder_layers, num_experts, text_config
from mtp_lightning.modeling.masking import ROW_MULTIPLE, block_multiple, round_up

if TYPE_CHECKING:
    from mtp_lightning.modeling.network import MTPNetwork

ADAM_STATES = 2
"""Numbers that AdamW keeps for each trained weight."""
RESERVED_SHARE = 0.1
"""Share of the memory that advice leaves to allocators and kernels."""


@dataclass(frozen=True)
class ModelSize:
    """The sizes of a model."""

    hidden: int  # D
    intermediate: int  # width of the MLP, summed over the experts that a token visits
    layers: int  # decoder layers
    query_width: int  # attention heads times their width
    key_width: int  # key heads times their width
    heads: int  # attention heads
    vocab: int  # V
    base_parameters: int  # of the frozen base
    active_parameters: int  # of the decoder layers, those that one token passes through; no embeddings
    base_bytes: int  # of the frozen base
    trained_parameters: int  # LoRA, mask embeddings, sampler head
    lora_parameters: int  # the LoRA's part of them
    element_bytes: int  # of a number of the base's activations
    trained_element_bytes: int  # of a trained weight
    gated: bool = True  # the LoRA acts at MTP positions alone
    head_at_ntp: bool | None = None  # the sampler head also runs at NTP positions; None: no sampler head


@dataclass(frozen=True)
class StepSize:
    """The largest training step of one device."""

    rows: int  # data.batch_size
    length: int  # tokens in a row, data.max_length
    block_fraction: float = 1.0  # share of the starts that get a block
    max_blocks: int | None = None  # most blocks in a row
    num_masks: int = 8  # k
    kernel: str | None = "sdpa"  # or eager, flex_attention
    checkpointing: bool = False  # decoder layers are recomputed in the backward pass
    autocast: bool = False  # trained layers multiply in 16 bits, trainer.precision: bf16-mixed
    cuda: bool = False  # chunks of logits have the size for a GPU
    shards: int = 1  # devices that the weights are spread over
    offloaded: bool = False  # the shards are in host memory

    @property
    def blocks(self) -> int:
        """Most blocks in a row: the last two tokens of a row start none."""
        wanted = max(1, round(max(1, self.length - 2) * self.block_fraction))
        return wanted if self.max_blocks is None else min(wanted, self.max_blocks)

    @property
    def ntp(self) -> int:
        """NTP positions in a row, padding included."""
        return round_up(self.length, ROW_MULTIPLE)

    @property
    def mtp(self) -> int:
        """MTP positions in a row, padding included."""
        return round_up(self.blocks, block_multiple(self.max_blocks)) * self.num_masks


@dataclass(frozen=True)
class Estimate:
    """Bytes on one device, and the positions of a step."""

    ntp_positions: int
    mtp_positions: int
    base: int  # the frozen base
    trained: int  # trained weights, their gradients and AdamW's states
    activations: int  # kept for the backward pass, and the cached keys and values
    mask: int  # the dense attention mask, in the form that the kernel takes
    logits: int  # one chunk of logits and what its loss needs
    gathered: int  # sharded weights gathered for two layers and the embeddings

    @property
    def total(self) -> int:
        """All bytes."""
        return self.base + self.trained + self.activations + self.mask + self.logits + self.gathered

    @property
    def step(self) -> int:
        """Bytes that grow with the batch."""
        return self.activations + self.mask

    def __str__(self) -> str:
        gathered = f", gathered weights {gigabytes(self.gathered)}" if self.gathered else ""
        return (
            f"up to {self.ntp_positions + self.mtp_positions:,} positions per step ({self.ntp_positions:,} tokens and"
            f" {self.mtp_positions:,} masks); base {gigabytes(self.base)}, trained weights with gradients and AdamW's states"
            f" {gigabytes(self.trained)}, activations {gigabytes(self.activations)}, attention mask {gigabytes(self.mask)},"
            f" logits {gigabytes(self.logits)}{gathered}: about {gigabytes(self.total)} on each device"
        )


def gigabytes(number: float) -> str:
    """Bytes as a short text: ``12_300_000_000 -> '12.3 GB'``."""
    return f"{number / 1e9:.1f} GB" if number >= 5e7 else f"{number / 1e6:.1f} MB"


def model_size(model: MTPNetwork) -> ModelSize:
    """The sizes of a model, sharded or not; it may be on the ``meta`` device."""
    config: Any = text_config(model.base)
    heads = int(config.num_attention_heads)
    trained = {id(p): p for p in model.parameters() if p.requires_grad}
    frozen = [p for p in model.parameters() if id(p) not in trained]
    in_layers = sum(p.numel() for p in decoder_layers(model.base).parameters() if id(p) not in trained)
    intermediate, active_share = _active_experts(config, in_layers)
    head_width = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    head = model.sampler_head
    return ModelSize(
        hidden=int(config.hidden_size),
        intermediate=intermediate,
        layers=int(config.num_hidden_layers),
        query_width=heads * head_width,
        key_width=int(getattr(config, "num_key_value_heads", None) or heads) * head_width,
        heads=heads,
        vocab=int(config.vocab_size),
        base_parameters=sum(p.numel() for p in frozen),
        active_parameters=round(in_layers * active_share),
        base_bytes=sum(p.numel() * p.element_size() for p in frozen),
        trained_parameters=sum(p.numel() for p in trained.values()),
        lora_parameters=sum(p.numel() for name, p in model.named_parameters() if p.requires_grad and ".lora_" in name),
        element_bytes=model.base.dtype.itemsize,
        trained_element_bytes=next(iter(trained.values())).dtype.itemsize,
        gated=model.lora.gated,
        head_at_ntp=None if head is None else head.at_ntp,
    )


def _active_experts(config: Any, in_layers: int) -> tuple[int, float]:
    """Width of the MLP that a token visits, and the share of the layers' parameters that it passes through."""
    if (experts := num_experts(config)) <= 1:
        return int(getattr(config, "intermediate_size", None) or 4 * config.hidden_size), 1.0  # GPT-J does not name it
    visited = int(config.num_experts_per_tok)
    width = int(getattr(config, "moe_intermediate_size", None) or config.intermediate_size)
    expert_parameters = 3 * int(config.hidden_size) * width * experts * int(config.num_hidden_layers)
    return visited * width, 1 - (1 - visited / experts) * min(1.0, expert_parameters / in_layers)


def estimate(size: ModelSize, step: StepSize) -> Estimate:
    """What a training step takes on each device.

    Without gradient checkpointing a gated model keeps activations of MTP positions alone: NTP positions run first, without
    gradients. With checkpointing, or a LoRA that is always on, all positions run at once; checkpointing keeps the
    activations of one layer and the inputs of all.
    """
    two_passes = size.gated and not step.checkpointing
    keys = step.ntp + step.mtp
    queries = step.mtp if two_passes else keys
    kept_layers = 1 if step.checkpointing else size.layers

    # In the decoder.
    layer = step.rows * (queries * _bytes_per_query(size, step) + keys * 2 * size.query_width * size.element_bytes)
    activations = kept_layers * layer
    if step.checkpointing:
        activations += size.layers * step.rows * queries * size.hidden * size.element_bytes
    if two_passes:  # cached keys and values of NTP positions
        activations += step.rows * step.ntp * 2 * size.key_width * size.layers * size.element_bytes

    # After it: states and their gradients for each head's losses, and what the sampler head keeps.
    activations += step.rows * step.mtp * size.hidden * (4 * size.element_bytes + 2 * size.trained_element_bytes)
    if size.head_at_ntp is not None:
        head_positions = step.rows * (step.mtp + (step.ntp if size.head_at_ntp else 0))
        activations += head_positions * size.hidden * 10 * size.trained_element_bytes

    # The mask once as booleans, and in the kernel's own form, numbers to add, in each layer whose activations are kept.
    added = {"sdpa": size.element_bytes, "eager": size.heads * (4 + size.element_bytes) + size.element_bytes}
    mask = step.rows * queries * keys * (1 + kept_layers * added.get(str(step.kernel), 0))

    gathered = 0
    if step.shards > 1:
        one_layer = size.base_bytes * (size.active_parameters / max(1, size.base_parameters)) / size.layers
        gathered = int(2 * one_layer + 2 * size.vocab * size.hidden * size.element_bytes)
    weights_here = 0 if step.offloaded else 1
    trained_bytes = size.trained_parameters * size.trained_element_bytes * (2 + ADAM_STATES)
    return Estimate(
        ntp_positions=step.rows * step.ntp,
        mtp_positions=step.rows * step.mtp,
        base=weights_here * size.base_bytes // step.shards,
        trained=weights_here * trained_bytes // step.shards,
        activations=activations,
        mask=0 if step.kernel == "flex_attention" else mask,
        logits=LOGITS_PER_CHUNK * (16 if step.cuda else 1) * (size.element_bytes + 12),
        gathered=gathered,
    )


def _bytes_per_query(size: ModelSize, step: StepSize) -> int:
    """Bytes that a decoder layer keeps for each of its queries, without keys and values."""
    D, width, inner, element = size.hidden, size.query_width, size.intermediate, size.element_bytes
    adapter_element = 2 if step.autocast else size.trained_element_bytes
    if element == size.trained_element_bytes:  # the adapters read the layer's own tensors: two norms' inputs and outputs
        copies = 4 * D * element + inner * element
    else:  # the norms compute in float32; without autocast each of the seven adapters reads a copy in its own dtype
        inputs = 2 if step.autocast else 5  # those that are read by several layers
        copies = 2 * 4 * D + inputs * D * adapter_element + (width + inner) * adapter_element
    ranks = size.lora_parameters / max(1, size.layers)  # r (in + out), summed over the layer's seven
    rank_states = 7 * ranks / max(1, 7 * D + 3 * width + 2 * size.key_width + 3 * inner)
    return int(copies + 2 * width * element + 3 * inner * element + rank_states * adapter_element)


def step_flops(size: ModelSize, step: StepSize, ntp: float | None = None, mtp: float | None = None) -> float:
    """Floating-point operations that the method needs for a step of one device; recomputation to save memory is not counted.

    ``ntp`` and ``mtp`` are its positions, by default the most there can be. NTP positions only go forward. At MTP positions
    the gradient also goes back through the frozen weights, which get none themselves, and through the adapters, which do.
    """
    ntp = step.rows * step.ntp if ntp is None else ntp
    mtp = step.rows * step.mtp if mtp is None else mtp
    backward = mtp if size.gated else ntp + mtp  # positions with a backward pass
    weights = 2 * size.active_parameters * (ntp + mtp + backward)
    adapters = 2 * size.lora_parameters * 3 * backward
    visible = step.length / 2  # a position sees half of its row on average, and its own block
    attention = 4 * size.query_width * size.layers * visible * (ntp + mtp + 2 * backward)
    num_heads = 1 if size.head_at_ntp is None else 2
    unembedding = 2 * size.hidden * size.vocab * 2 * num_heads * mtp
    head = 0.0
    if size.head_at_ntp is not None:
        head = 2 * (size.trained_parameters - size.lora_parameters) * 3 * (mtp + (ntp if size.head_at_ntp else 0))
    return weights + adapters + attention + unembedding + head


def advice(size: ModelSize, step: StepSize, available: float) -> str:
    """A sentence on what to lower, and to what, so that a step that ran out of memory fits into the available bytes.

    If the step fits by the estimate, the estimate is scaled up until it does not.
    """
    now = estimate(size, step)
    fixed = now.total - now.step
    budget = (1 - RESERVED_SHARE) * available - fixed
    scale = max(1.0, (available - fixed) / now.step)
    if budget <= 0:
        return (
            f"Weights and logits alone take about {gigabytes(fixed)} of {gigabytes(available)}: use a smaller base, a lower"
            " model.lora.rank, model.quantization, or shard the weights (configs/strategies/fsdp2.yaml)."
        )

    def fits(changed: StepSize) -> bool:
        return estimate(size, changed).step * scale <= budget

    def largest(current: int, changed: Callable[[int], StepSize]) -> int:
        """The largest number below the current one that fits, or 0."""
        return next((number for number in range(current - 1, 0, -1) if fits(changed(number))), 0)

    ways = []
    if rows := largest(step.rows, lambda n: replace(step, rows=n)):
        ways.append(f"data.batch_size from {step.rows} to {rows}")
    percent = round(100 * step.blocks / max(1, step.length - 2))
    if share := largest(percent, lambda n: replace(step, block_fraction=n / 100, max_blocks=None)):
        ways.append(f"data.block_fraction from {step.block_fraction:g} to {share / 100:g}")
    if (length := largest(step.length, lambda n: replace(step, length=n))) >= 16:
        ways.append(f"data.max_length from {step.length} to {length - length % 16}")
    if not step.checkpointing and fits(replace(step, checkpointing=True)):
        ways.append("set model.gradient_checkpointing: true")
    if not ways:
        return "No batch of this base fits: set model.gradient_checkpointing: true, and lower data.max_length as well."
    text = ", or ".join(ways)
    return f"{text[0].upper()}{text[1:]}." if text.startswith("set") else f"Lower {text}."
