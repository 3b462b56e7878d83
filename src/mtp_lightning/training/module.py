# SPDX-License-Identifier: Apache-2.0
"""MTPModule: the LightningModule around MTPModel. One shared step, optimizer and logging; no tensor arithmetic."""

from __future__ import annotations

from functools import cached_property
from typing import Any, Literal, cast

import torch
from lightning import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
from torch import Tensor, nn

from mtp_lightning.errors import RunError, UsageError
from mtp_lightning.losses import BaseCrossEntropy, LatentConsistency, LossTerm, SamplerCrossEntropy, TokenLoss, term_value
from mtp_lightning.metrics import ForcedAcceptance, TermMean
from mtp_lightning.metrics.functional import share_of_reference
from mtp_lightning.model import MTPModel
from mtp_lightning.modeling.base import load_base, load_config, load_tokenizer, parse_dtype
from mtp_lightning.modeling.decoder import context_length, text_config
from mtp_lightning.modeling.gated_lora import LoRA
from mtp_lightning.modeling.network import ForwardOutput, MaskTokens
from mtp_lightning.sampler_heads import MLPSamplerHead, SamplerHead, check_head
from mtp_lightning.saving.checkpoint import (
    check_complete,
    check_settings,
    checkpoint_settings,
    compare_settings,
    trained_state,
)
from mtp_lightning.saving.checkpoint_files import SETTINGS
from mtp_lightning.saving.load import load_weights, read_parts
from mtp_lightning.saving.trained_parts import TrainedParts
from mtp_lightning.schedules import Ramp, WarmupConstant, WarmupCosine
from mtp_lightning.training.distributed import all_reduce
from mtp_lightning.training.fully_sharded import FullyShardedStrategy
from mtp_lightning.training.lightning_private import attached_trainer, is_accumulating
from mtp_lightning.training.run_schedules import RunSchedules
from mtp_lightning.training.sharding import shard_model
from mtp_lightning.types import NTP, LossSum, MaskedInput

ATTENTION = ("sdpa", "eager", "flex_attention")
QUANTIZATION = ("4bit", "8bit")


class MTPModule(LightningModule):
    """Teaches a base model to predict several tokens per step.

    Args:
        base_model: folder, GGUF file or hub id of a causal language model, or ``package://demo/base``.
        revision: hub revision of the base model.
        dtype: dtype of the frozen base: float32, bfloat16, float16, float64, or auto (as saved). Trained
            weights are float32.
        attention: sdpa, eager or flex_attention. None: the architecture's own choice. FlexAttention avoids the dense mask
            and needs a GPU to train.
        quantization: 4bit or 8bit base weights through bitsandbytes, or None.
        gradient_checkpointing: recompute decoder layers in the backward pass to save memory.
        num_masks: number of mask tokens k, the most tokens that a step can draft. The paper: 8.
        mask_tokens: ``learned``: each mask token is a trained embedding. ``noise``: a random token of the vocabulary stands
            in its place, another one each time a row is seen; what is saved is then a plain LoRA, which PEFT loads.
        lora: settings of the gated LoRA.
        sampler_head: a class of ``mtp_lightning.sampler_heads`` or your own; false: draft from the base head. Not given: the
            paper's ``MLPSamplerHead``, and none with ``mask_tokens: noise``.
        init_from: trained model whose weights a new run begins with, to go on with other data: a checkpoint, the folder of a
            run, a saved folder or a hub id. Its LoRA and sampler head must be the configuration's. With fewer masks
            the first ones are taken; with more, the new ones start as copies of the last. Not read when a run is resumed.
        losses: name -> loss term. Empty: the paper's three.
        loss_schedules: name of a loss term -> factor of its weight in training, from ``start`` to ``end``. In evaluation the
            weight alone counts.
        num_masks_schedule: masks in a block in training, from ``start`` to ``end``, rounded; evaluation has ``num_masks``. A
            step with fewer masks computes fewer positions. None: ``num_masks`` always.
        optimizer: makes the optimizer from the trained parameters, given as pairs of a name and a parameter.
        lr_scheduler: makes the learning-rate schedule, stepped every optimizer step.
    """

    model: MTPModel  # built in configure_model, as sharding needs it

    def __init__(
        self,
        base_model: str,
        revision: str | None = None,
        dtype: str = "auto",
        attention: str | None = None,
        quantization: str | None = None,
        gradient_checkpointing: bool = False,
        num_masks: int = 8,
        mask_tokens: MaskTokens = "learned",
        lora: LoRA = LoRA(),  # noqa: B008 - never changed in place
        sampler_head: SamplerHead | Literal[False] | None = None,
        init_from: str | None = None,
        losses: dict[str, LossTerm] = {},  # noqa: B006 - never changed in place
        loss_schedules: dict[str, Ramp] = {},  # noqa: B006 - never changed in place
        num_masks_schedule: Ramp | None = None,
        optimizer: OptimizerCallable = lambda p: torch.optim.AdamW(p, lr=2e-4),
        lr_scheduler: LRSchedulerCallable = lambda o: WarmupConstant(o, warmup_steps=100),
    ) -> None:
        super().__init__()
        if num_masks < 1:
            raise UsageError(f"model.num_masks must be 1 or more, got {num_masks}.")
        parse_dtype(dtype)
        for name, value, choices in (("attention", attention, ATTENTION), ("quantization", quantization, QUANTIZATION)):
            if value is not None and value not in choices:
                raise UsageError(f"model.{name} must be one of {', '.join(choices)}, or null, got {value!r}.")
        self.base_model = base_model
        self.revision = revision
        self.dtype_name = dtype
        self.attention = attention
        self.quantization = quantization
        self.gradient_checkpointing = gradient_checkpointing
        self.num_masks = num_masks
        self.mask_tokens: MaskTokens = mask_tokens
        self.lora = lora
        self.init_from = init_from
        # In a tuple, so that the head is registered once: as a part of the model.
        default_head = MLPSamplerHead() if mask_tokens == "learned" else None
        self._head = (default_head if sampler_head is None else (sampler_head or None),)
        terms = losses or paper_losses(with_sampler=self.sampler_head is not None)
        _check_heads(terms, self.sampler_head)
        self.schedules = RunSchedules(loss_schedules, num_masks_schedule, terms, num_masks)
        self.losses = nn.ModuleDict(terms)
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.model = None  # type: ignore[assignment]
        self.strict_loading = False  # checkpoints hold trained weights only
        self._step_values: Tensor | float = 0.0  # loss and terms of the batches of the current optimizer step so far
        self.val_terms = nn.ModuleDict({name: TermMean() for name in terms})
        self.val_ntp = TermMean()
        self.val_forced = ForcedAcceptance(num_masks)
        self.val_reference = ForcedAcceptance(num_masks)

    # ---- what the configuration says

    @property
    def terms(self) -> dict[str, LossTerm]:
        """The loss terms by name."""
        return cast("dict[str, LossTerm]", dict(self.losses.items()))

    @property
    def term_means(self) -> dict[str, TermMean]:
        """The terms' values over an evaluation, by name."""
        return cast("dict[str, TermMean]", dict(self.val_terms.items()))

    @property
    def sampler_head(self) -> SamplerHead | None:
        """The sampler head, built or not."""
        return self._head[0]

    @cached_property
    def tokenizer(self) -> Any:
        """The base's tokenizer, loaded once; the data module uses it before the weights are loaded."""
        return load_tokenizer(self.base_model, self.revision)

    @cached_property
    def base_config(self) -> Any:
        """The configuration of the base's text decoder; no weights are read."""
        if self.model is not None:
            return text_config(self.model.base)
        return self.full_config().get_text_config(decoder=True)

    def full_config(self) -> Any:
        """The configuration of the whole base, which may have other parts than the decoder; no weights are read."""
        return load_config(self.base_model, self.revision)

    @property
    def context(self) -> int:
        """Number of positions that the base was made for."""
        return context_length(self.base_config)

    @property
    def vocab_size(self) -> int:
        """Number of token ids that the base has an embedding for; a tokenizer may have more."""
        return int(self.base_config.vocab_size)

    # ---- building

    def configure_model(self) -> None:
        """Load the base and add the trained parts, once, where the strategy wants them."""
        if self.model is not None:
            return
        trainer = attached_trainer(self)
        strategy: Any = None if trainer is None else trainer.strategy
        if trainer is not None:
            if str(trainer.precision) in ("bf16-true", "16-true"):
                remedy = "set model.dtype for the base, and trainer.precision 32-true or bf16-mixed"
                raise UsageError(f"trainer.precision {trainer.precision} would round the trained weights: {remedy}.")
            if isinstance(strategy, FSDPStrategy | ModelParallelStrategy):
                self._check_sharding(strategy)
        # Straight to the device where that is known, not through host memory.
        direct = isinstance(strategy, SingleDeviceStrategy | DDPStrategy)
        device: Any = strategy.root_device if direct else self.device
        if not (isinstance(strategy, FullyShardedStrategy) and strategy.load_in_turns):
            self._build(device, strategy)
            return
        for turn in range(strategy.num_processes):
            if turn == strategy.local_rank:
                self._build(device, strategy)
            strategy.barrier("the next process loads the base")

    def _check_sharding(self, strategy: Any) -> None:
        """Refuse what can't be sharded."""
        if not isinstance(strategy, FullyShardedStrategy):
            raise UsageError(f"trainer.strategy {type(strategy).__name__} can't shard: use configs/strategies/fsdp2.yaml.")
        if self.quantization is not None:
            raise UsageError(f"model.quantization {self.quantization} can't be sharded. Use trainer.strategy: ddp.")
        if any(True for _ in self.losses.parameters()):
            raise UsageError("a loss term has weights of its own, which can't be sharded. Use trainer.strategy: ddp.")

    def _build(self, device: Any, strategy: Any) -> None:
        """Load the base and add the trained parts."""
        start = self._start()
        base = load_base(self.base_model, self.revision, self.dtype_name, self.attention, self.quantization, device)
        parts = self.lora, self.sampler_head, self.tokenizer, self.mask_tokens
        self.model = MTPModel(base, self.num_masks, *parts)
        if start is not None:
            load_weights(self.model, start)
        if self.sampler_head is not None and not type(self.sampler_head).__module__.startswith("mtp_lightning."):
            check_head(self.sampler_head, int(self.base_config.hidden_size))
        if self.gradient_checkpointing:
            self.model.enable_gradient_checkpointing()
        self.model.train()  # from_pretrained gives evaluation mode, where dropout and checkpointing are silently off
        if isinstance(strategy, FullyShardedStrategy):
            shard_model(self.model, strategy.mesh, strategy.cpu_offload)

    def _start(self) -> TrainedParts | None:
        """The weights to begin with, checked before the base is loaded; None: new ones."""
        if self.init_from is None:
            return None
        try:
            parts = read_parts(self.init_from).with_num_masks(self.num_masks)
        except RunError as error:
            raise RunError(f"model.init_from: {error}") from error
        settings = {**parts._asdict(), "base": parts.base_shape}
        compare_settings(f"model.init_from {self.init_from}", settings, checkpoint_settings(self), self.full_config)
        return parts

    def configure_optimizers(self) -> Any:
        """The optimizer over the trained parameters and its schedule."""
        trained = [(name, parameter) for name, parameter in self.named_parameters() if parameter.requires_grad]
        optimizer = self.optimizer(trained)
        scheduler = self.lr_scheduler(optimizer)
        if isinstance(scheduler, WarmupCosine) and scheduler.total_steps is None:
            scheduler.total_steps = int(self.trainer.estimated_stepping_batches)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    # ---- training

    def on_train_start(self) -> None:
        """Drop what an earlier run that failed had summed up, perhaps on another device; ask how long this one is."""
        self._step_values = 0.0
        self.schedules.start(self.trainer)

    def on_before_batch_transfer(self, batch: MaskedInput, dataloader_idx: int) -> MaskedInput:
        """In training, the first masks of each block, as many as the schedule says."""
        num_masks = self.schedules.num_masks(self.global_step) if self.trainer.training else None
        return batch if num_masks is None else batch.first_masks(num_masks)

    def training_step(self, batch: MaskedInput, batch_idx: int) -> Tensor:
        """The weighted loss of a batch, scaled so that accumulated batches and ranks add up to one sum over counts."""
        # Ranks and accumulated batches are averaged by Lightning; each term divides by the count over all of them.
        num_parts = self.trainer.accumulate_grad_batches * self.trainer.world_size
        counts = all_reduce(batch.counts.clone(), "sum")
        output = self._run(batch)
        values = {name: term_value(sums, counts) * num_parts for name, sums in output.sums.items()}
        loss = self.weighted(values, self.schedules.factors(self.global_step))
        self._log_training(torch.stack([loss, *values.values()]).detach())
        return loss

    def _run(self, batch: MaskedInput, **options: Any) -> ForwardOutput:
        """The forward pass with the loss terms."""
        try:
            output: ForwardOutput = self.model(batch, self.terms, **options)
        except StopIteration as error:  # Lightning would take it for the end of the data, and begin again, for ever
            raise RuntimeError("a loss term or sampler head raised StopIteration.") from error
        return output

    def _log_training(self, values: Tensor) -> None:
        """Log the loss and its terms, [1 + terms], once an optimizer step: the mean over its batches and all processes."""
        self._step_values = self._step_values + values / self.trainer.accumulate_grad_batches
        if is_accumulating(self.trainer):
            return
        # In every step, logged or not: a callback may still end the run with this step, which logs it.
        mean, self._step_values = all_reduce(self._step_values, "mean"), 0.0
        self.log("train/loss", mean[0], prog_bar=True)
        self.log("train/learning_rate", self.trainer.optimizers[0].param_groups[0]["lr"])
        self.log_dict({f"train/loss/{name}": value for name, value in zip(self.losses, mean[1:], strict=True)})

    def weighted(self, values: dict[str, Tensor], factors: dict[str, float] = {}) -> Tensor:  # noqa: B006 - not changed
        """The sum of the terms' values times their weights, and times these factors."""
        weights = {name: term.weight * factors.get(name, 1.0) for name, term in self.terms.items()}
        return torch.stack([weights[name] * value for name, value in values.items()]).sum()

    # ---- evaluation

    def evaluation_step(self, batch: MaskedInput) -> None:
        """Update the metrics with one teacher-forced batch."""
        output = self._run(batch, with_measurement=True)
        for name, sums in output.sums.items():
            self.term_means[name].update(sums, batch.counts)
        measured = output.measurement
        assert measured is not None
        self.val_ntp.update([LossSum(measured.ntp_loss, NTP)], batch.counts)
        self.val_forced.update(measured.hits, measured.valid)
        self.val_reference.update(measured.reference, measured.valid)

    def log_evaluation(self, prefix: str) -> None:
        """Log the metrics of all ranks under ``prefix/``, and reset them."""
        values = {name: metric.compute() for name, metric in self.term_means.items()}
        forced, reference = self.val_forced.compute(), self.val_reference.compute()
        figures = {
            **{f"loss/{name}": value for name, value in values.items()},
            "loss": self.weighted(values),
            "ntp_loss": self.val_ntp.compute(),
            "forced_acceptance_length": forced,
            "forced_reference": reference,
            "share_of_reference": torch.tensor(share_of_reference(forced.item(), reference.item())),
            **{f"accuracy/offset_{j + 2}": accuracy for j, accuracy in enumerate(self.val_forced.accuracy())},
        }
        self.log_dict({f"{prefix}/{name}": value for name, value in figures.items()})
        for metric in (self.val_ntp, self.val_forced, self.val_reference, *self.term_means.values()):
            metric.reset()

    @property
    def logged_names(self) -> set[str]:
        """What a run of ``fit`` logs: names that a callback can monitor."""
        figures = {"loss", "ntp_loss", "forced_acceptance_length", "forced_reference", "share_of_reference"}
        terms = {f"loss/{name}" for name in self.terms}
        offsets = {f"accuracy/offset_{j + 2}" for j in range(self.num_masks)}
        training = {"loss", "learning_rate", "gradient_norm"}
        return {f"val/{name}" for name in figures | terms | offsets} | {f"train/{name}" for name in training | terms}

    def validation_step(self, batch: MaskedInput, batch_idx: int) -> None:
        """Measure a validation batch."""
        self.evaluation_step(batch)

    def on_validation_epoch_end(self) -> None:
        """Log the validation figures."""
        self.log_evaluation("val")

    def test_step(self, batch: MaskedInput, batch_idx: int) -> None:
        """Measure a test batch."""
        self.evaluation_step(batch)

    def on_test_epoch_end(self) -> None:
        """Log the test figures."""
        self.log_evaluation("test")

    # ---- checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep trained weights only, and record what they belong to."""
        checkpoint["state_dict"] = trained_state(checkpoint["state_dict"])
        checkpoint[SETTINGS] = checkpoint_settings(self)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another base, number of masks or head, and one that lacks a weight."""
        check_settings(checkpoint, checkpoint_settings(self), self.full_config)
        check_complete(checkpoint, self.state_dict())


def paper_losses(with_sampler: bool) -> dict[str, LossTerm]:
    """The paper's three terms, without the constant NTP part; two of them without a sampler head."""
    terms: dict[str, LossTerm] = {"base": BaseCrossEntropy(), "lcm": LatentConsistency()}
    return {**terms, "sampler": SamplerCrossEntropy()} if with_sampler else terms


def _check_heads(terms: dict[str, LossTerm], head: SamplerHead | None) -> None:
    """Refuse a sampler head that no term trains, and a term that needs the head that is missing."""
    for name, term in terms.items():
        if isinstance(term, TokenLoss) and term.head == "sampler" and head is None:
            raise UsageError(f"loss term {name} ({type(term).__name__}) needs model.sampler_head, which is false.")
    if head is not None and all(
        isinstance(term, LatentConsistency) or (isinstance(term, TokenLoss) and term.head == "base")
        for term in terms.values()
    ):
        raise UsageError("no loss term trains the sampler head: add SamplerCrossEntropy, or set model.sampler_head: false.")
