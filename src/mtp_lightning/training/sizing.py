# SPDX-License-Identifier: Apache-2.0
"""Sizing: how much memory and how many floating-point operations a training step takes, from shapes alone. Pure functions.

An estimate of what autograd keeps, good to plan with and to say what to lower; allocators and kernels add their own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from mtp_lightning.losses.chunked import LOGITS_PER_CHUNK
from mtp_lightning.modeling.decoder import text_config

if TYPE_CHECKING:
    from mtp_lightning.modeling.network import MTPNetwork

ADAM_STATES = 2
"""Numbers that AdamW keeps for each trained weight."""
KEPT_FREE = 0.1
"""Share of the memory that advice leaves to allocators and kernels."""


@dataclass(frozen=True)
class ModelSize:
    """What a model is made of.

    Attributes:
        hidden: width D.
        intermediate: width of the MLP, of all experts that a token visits.
        layers: number of decoder layers.
        queries: heads times their width.
        keys: key heads times their width.
        heads: attention heads.
        vocab: V.
        base_parameters: parameters of the frozen base.
        active_parameters: those of its decoder's layers that one token passes through; no embeddings.
        base_bytes: bytes of the frozen base.
        trained_parameters: LoRA, mask embeddings, sampler head.
        lora_parameters: the LoRA's share of them.
        element: bytes of a number of the base's activations.
        wide: bytes of a trained weight.
        gated: whether the LoRA acts at MTP positions alone.
        head_at_ntp: whether the sampler head has an output at NTP positions; None: no sampler head.
    """

    hidden: int
    intermediate: int
    layers: int
    queries: int
    keys: int
    heads: int
    vocab: int
    base_parameters: int
    active_parameters: int
    base_bytes: int
    trained_parameters: int
    lora_parameters: int
    element: int
    wide: int
    gated: bool = True
    head_at_ntp: bool | None = None


@dataclass(frozen=True)
class StepSize:
    """What one training step of one device holds.

    Attributes:
        rows: rows in a batch, ``data.batch_size``.
        length: tokens in a row, ``data.max_length``.
        block_fraction: share of the starts that get a block.
        max_blocks: at most so many blocks in a row, or None.
        num_masks: K.
        kernel: ``sdpa``, ``eager`` or ``flex_attention``.
        checkpointing: whether decoder layers are recomputed in the backward pass.
        autocast: whether trained layers multiply in 16 bits (``trainer.precision: bf16-mixed``).
        cuda: whether the chunks of logits are those of a GPU.
        shards: devices that the weights are spread over.
        offloaded: whether the shards lie in the host's memory.
    """

    rows: int
    length: int
    block_fraction: float = 1.0
    max_blocks: int | None = None
    num_masks: int = 8
    kernel: str = "sdpa"
    checkpointing: bool = False
    autocast: bool = False
    cuda: bool = False
    shards: int = 1
    offloaded: bool = False

    @property
    def blocks(self) -> int:
        """Most blocks in a row: the last two tokens of a row start none."""
        wanted = max(1, round(max(1, self.length - 2) * self.block_fraction))
        return wanted if self.max_blocks is None else min(wanted, self.max_blocks)

    @property
    def mtp(self) -> int:
        """MTP positions in a row."""
        return self.blocks * self.num_masks


@dataclass(frozen=True)
class Estimate:
    """Bytes of one device, and the positions of a step.

    Attributes:
        ntp_positions: NTP positions of a step.
        mtp_positions: MTP positions of a step.
        base: the frozen base.
        trained: trained weights, their gradients and AdamW's states.
        activations: what is kept for the backward pass, and the cached keys and values.
        mask: the dense attention mask, as the kernel takes it.
        logits: one chunk of logits and what its loss needs.
        gathered: sharded weights gathered for two layers and the embeddings.
    """

    ntp_positions: int
    mtp_positions: int
    base: int
    trained: int
    activations: int
    mask: int
    logits: int
    gathered: int

    @property
    def total(self) -> int:
        """All bytes."""
        return self.base + self.trained + self.activations + self.mask + self.logits + self.gathered

    @property
    def step(self) -> int:
        """The bytes that the size of a step decides."""
        return self.activations + self.mask

    def __str__(self) -> str:
        gathered = f", gathered weights {gigabytes(self.gathered)}" if self.gathered else ""
        return (
            f"up to {self.ntp_positions + self.mtp_positions:,} positions a step ({self.ntp_positions:,} tokens and"
            f" {self.mtp_positions:,} masks); base {gigabytes(self.base)}, trained weights with gradients and AdamW's states"
            f" {gigabytes(self.trained)}, activations {gigabytes(self.activations)}, attention mask {gigabytes(self.mask)},"
            f" logits {gigabytes(self.logits)}{gathered}: about {gigabytes(self.total)} on each device"
        )


def gigabytes(number: float) -> str:
    """Bytes as a short text: ``12_300_000_000 -> '12.3 GB'``."""
    return f"{number / 1e9:.1f} GB" if number >= 5e7 else f"{number / 1e6:.1f} MB"


def model_size(model: MTPNetwork) -> ModelSize:
    """The sizes of a built model, sharded or not.

    Args:
        model: the model; it may lie on the ``meta`` device.

    Returns:
        Its sizes.
    """
    config: Any = text_config(model.base)
    trained = {id(p): p for p in model.parameters() if p.requires_grad}
    frozen = [p for p in model.parameters() if id(p) not in trained]
    layers = model.base.get_decoder().layers
    in_layers = sum(p.numel() for p in layers.parameters() if id(p) not in trained)
    intermediate, share = int(config.intermediate_size), 1.0
    experts = next(
        (int(n) for name in ("num_experts", "num_local_experts", "n_routed_experts") if (n := getattr(config, name, None))),
        0,
    )
    if experts > 1:
        visited = int(config.num_experts_per_tok)
        intermediate = visited * int(getattr(config, "moe_intermediate_size", None) or intermediate)
        expert_parameters = 3 * int(config.hidden_size) * intermediate // visited * experts * int(config.num_hidden_layers)
        share = 1 - (1 - visited / experts) * min(1.0, expert_parameters / in_layers)
    width = int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    head = model.sampler_head
    return ModelSize(
        hidden=int(config.hidden_size),
        intermediate=intermediate,
        layers=int(config.num_hidden_layers),
        queries=int(config.num_attention_heads) * width,
        keys=int(config.num_key_value_heads) * width,
        heads=int(config.num_attention_heads),
        vocab=int(config.vocab_size),
        base_parameters=sum(p.numel() for p in frozen),
        active_parameters=round(in_layers * share),
        base_bytes=sum(p.numel() * p.element_size() for p in frozen),
        trained_parameters=sum(p.numel() for p in trained.values()),
        lora_parameters=sum(p.numel() for name, p in model.named_parameters() if p.requires_grad and ".lora_" in name),
        element=model.base.dtype.itemsize,
        wide=model.mask_embeddings.dtype.itemsize,
        gated=model.lora.gated,
        head_at_ntp=None if head is None else head.at_ntp,
    )


def estimate(size: ModelSize, step: StepSize) -> Estimate:
    """What a training step takes on each device.

    Without gradient checkpointing a gated model keeps activations of MTP positions alone; with it, or with a LoRA that is
    always on, of all positions, with it one layer's and the inputs of all.

    Args:
        size: the model.
        step: the step.

    Returns:
        The estimate.
    """
    two_passes = size.gated and not step.checkpointing
    keys = step.length + step.mtp
    queries = step.mtp if two_passes else keys
    layer = step.rows * (queries * _kept_in_layer(size, step) + keys * 2 * size.queries * size.element)
    mask = step.rows * queries * keys
    # The kernel's own form of the mask: numbers to add, in each layer whose activations are kept.
    in_layers = {"sdpa": size.element, "eager": size.heads * (4 + size.element) + size.element}.get(step.kernel, 0)
    kept_layers = 1 if step.checkpointing else size.layers
    activations = kept_layers * layer
    if step.checkpointing:
        activations += size.layers * step.rows * queries * size.hidden * size.element
    if two_passes:
        activations += step.rows * step.length * 2 * size.keys * size.layers * size.element  # cached keys and values
    # After the decoder: states and their gradients for each head's losses, and what the sampler head keeps.
    after = step.rows * step.mtp * size.hidden * (4 * size.element + 2 * size.wide)
    if size.head_at_ntp is not None:
        head_positions = step.rows * (step.mtp + (step.length if size.head_at_ntp else 0))
        after += head_positions * size.hidden * 10 * size.wide
    logits = LOGITS_PER_CHUNK * (16 if step.cuda else 1) * (size.element + 12)
    per_device = 0 if step.offloaded else 1
    gathered = 0
    if step.shards > 1:
        one_layer = size.base_bytes * (size.active_parameters / max(1, size.base_parameters)) / size.layers
        gathered = int(2 * one_layer + 2 * size.vocab * size.hidden * size.element)
    trained_bytes = size.trained_parameters * size.wide * (2 + ADAM_STATES)
    return Estimate(
        ntp_positions=step.rows * step.length,
        mtp_positions=step.rows * step.mtp,
        base=per_device * size.base_bytes // step.shards,
        trained=per_device * trained_bytes // step.shards,
        activations=activations + after,
        mask=0 if step.kernel == "flex_attention" else mask * (1 + kept_layers * in_layers),
        logits=logits,
        gathered=gathered,
    )


def _kept_in_layer(size: ModelSize, step: StepSize) -> int:
    """Bytes that a decoder layer keeps for each of its queries; keys and values aside."""
    D, width, inner, e = size.hidden, size.queries, size.intermediate, size.element
    if e == size.wide:  # the adapters read the layer's own tensors: two norms' inputs and outputs
        copies = 4 * D * e + inner * e
    else:  # each of the seven adapters reads a copy in its own dtype; the norms compute in float32
        copy = 2 if step.autocast else size.wide
        copies = 2 * 4 * D + 5 * D * copy + (width + inner) * copy
    ranks = size.lora_parameters / max(1, size.layers)  # r (in + out), summed over the layer's seven
    rank_states = 7 * ranks / max(1, 7 * D + 3 * width + 2 * size.keys + 3 * inner)
    return int(copies + 2 * width * e + 3 * inner * e + rank_states * (2 if step.autocast else size.wide))


def step_flops(size: ModelSize, step: StepSize, ntp: float | None = None, mtp: float | None = None) -> float:
    """Floating-point operations that the method asks of a step; what is recomputed to save memory is not counted.

    NTP positions go forward alone. MTP positions also take the gradient back through the frozen weights, which get none
    themselves, and the adapters take both.

    Args:
        size: the model.
        step: the step.
        ntp: NTP positions of the step; None: the most there can be.
        mtp: MTP positions of the step; None: the most there can be.

    Returns:
        The number, of one device's step.
    """
    ntp = step.rows * step.length if ntp is None else ntp
    mtp = step.rows * step.mtp if mtp is None else mtp
    back = mtp if size.gated else ntp + mtp  # positions whose gradient is taken
    weights = 2 * size.active_parameters * (ntp + mtp + back)
    adapters = 2 * size.lora_parameters * 3 * back
    seen = step.length / 2  # a position sees half of its row on average, and its own block
    attention = 4 * size.queries * size.layers * seen * (ntp + mtp + 2 * back)
    heads = 1 if size.head_at_ntp is None else 2
    unembedding = 2 * size.hidden * size.vocab * 2 * heads * mtp
    head = 0.0
    if heads == 2:
        head = 2 * (size.trained_parameters - size.lora_parameters) * 3 * (mtp + (ntp if size.head_at_ntp else 0))
    return weights + adapters + attention + unembedding + head


def advice(size: ModelSize, step: StepSize, available: float) -> str:
    """What to lower, and to how much, so that a step that went over the memory fits.

    The step is known not to fit. Where the estimate says it would, the estimate's step is scaled up until it does not.

    Args:
        size: the model.
        step: the step that did not fit.
        available: bytes of memory of a device.

    Returns:
        A sentence.
    """
    now = estimate(size, step)
    fixed = now.total - now.step
    room = (1 - KEPT_FREE) * available - fixed
    scale = max(1.0, (available - fixed) / now.step)
    if room <= 0:
        return (
            f"Weights and logits alone take about {gigabytes(fixed)} of {gigabytes(available)}: use a smaller base, a lower"
            " model.lora.rank, model.quantization, or shard the weights (configs/strategies/fsdp2.yaml)."
        )

    def fits(changed: StepSize) -> bool:
        return estimate(size, changed).step * scale <= room

    def largest(begin: int, make: Callable[[int], StepSize]) -> int | None:
        low, high = 0, begin  # fits at low, not at high; 0: does not fit at 1 either
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(make(middle)) else (low, middle)
        return low or None

    ways = []
    if (rows := largest(step.rows, lambda n: replace(step, rows=n))) is not None:
        ways.append(f"data.batch_size from {step.rows} to {rows}")
    percent = round(100 * step.blocks / max(1, step.length - 2))
    if (share := largest(percent, lambda n: replace(step, block_fraction=n / 100, max_blocks=None))) is not None:
        ways.append(f"data.block_fraction from {step.block_fraction:g} to {share / 100:g}")
    if (length := largest(step.length, lambda n: replace(step, length=n))) is not None and length >= 16:
        ways.append(f"data.max_length from {step.length} to {length - length % 16}")
    if not step.checkpointing and fits(replace(step, checkpointing=True)):
        ways.append("set model.gradient_checkpointing: true")
    if not ways:
        return "No batch of this base fits: set model.gradient_checkpointing: true, and lower data.max_length as well."
    first, *others = ways
    lead = first if first.startswith("set") else f"lower {first}"
    return f"{lead[0].upper()}{lead[1:]}" + "".join(f", or {way}" for way in others) + "."
