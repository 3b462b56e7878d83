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
from torchmetrics import MetricCollection, SumMetric

from mtp_lightning.errors import UsageError
from mtp_lightning.losses import BaseCrossEntropy, LatentConsistency, LossTerm, SamplerCrossEntropy, TokenLoss, term_value
from mtp_lightning.metrics import ForcedAcceptance, TermMean
from mtp_lightning.metrics.functional import share_of_reference
from mtp_lightning.model import MTPModel
from mtp_lightning.modeling.base import load_base, load_config, load_tokenizer, parse_dtype
from mtp_lightning.modeling.decoder import context_length, text_config
from mtp_lightning.modeling.gated_lora import LoRA
from mtp_lightning.modeling.label_counts import LABEL_COUNTS, LabelCounts, count_labels, parse_label_counts
from mtp_lightning.modeling.network import ForwardOutput
from mtp_lightning.sampler_heads import MLPSamplerHead, SamplerHead
from mtp_lightning.saving.checkpoint import check_complete, check_settings, checkpoint_settings, trained_state
from mtp_lightning.schedules import WarmupConstant, WarmupCosine
from mtp_lightning.training.collectives import all_reduce
from mtp_lightning.training.distributed import figures_are_logged
from mtp_lightning.training.fully_sharded import FullyShardedStrategy
from mtp_lightning.training.sharding import shard_model
from mtp_lightning.types import NTP, MaskedInput

ATTENTION = ("sdpa", "eager", "flex_attention")
QUANTIZATION = ("4bit", "8bit")


class MTPModule(LightningModule):
    """Teaches a base model to predict several tokens a step.

    Args:
        base_model: folder or hub id of a causal language model, or ``package://demo/base``.
        revision: hub revision of the base model.
        dtype: dtype of the frozen base: float32, bfloat16, float16, float64, or auto (as saved). Trained
            weights are float32.
        attention: sdpa, eager or flex_attention. None: the architecture's own choice. FlexAttention avoids the dense mask
            and needs a GPU to train.
        quantization: 4bit or 8bit base weights through bitsandbytes, or None.
        gradient_checkpointing: recompute decoder layers in the backward pass to save memory.
        num_masks: number of mask tokens k; at most so many tokens are drafted a step. The paper: 8.
        lora: settings of the gated LoRA.
        sampler_head: a class of ``mtp_lightning.sampler_heads`` or your own; false: draft from the base head. Not given: the
            paper's ``MLPSamplerHead``.
        losses: name -> loss term. Empty: the paper's three.
        optimizer: how to make the optimizer from the trained parameters.
        lr_scheduler: how to make the learning-rate schedule, stepped every optimizer step.
    """

    def __init__(
        self,
        base_model: str,
        revision: str | None = None,
        dtype: str = "auto",
        attention: str | None = None,
        quantization: str | None = None,
        gradient_checkpointing: bool = False,
        num_masks: int = 8,
        lora: LoRA = LoRA(),  # noqa: B008 - never changed in place
        sampler_head: SamplerHead | Literal[False] | None = None,
        losses: dict[str, LossTerm] = {},  # noqa: B006 - never changed in place
        optimizer: OptimizerCallable = lambda p: torch.optim.AdamW(p, lr=2e-4),
        lr_scheduler: LRSchedulerCallable = lambda o: WarmupConstant(o, warmup_steps=100),
    ) -> None:
        super().__init__()
        if num_masks < 1:
            raise UsageError(f"num_masks must be 1 or more, got {num_masks}. Set model.num_masks in the YAML.")
        parse_dtype(dtype)
        for name, value, choices in (("attention", attention, ATTENTION), ("quantization", quantization, QUANTIZATION)):
            if value is not None and value not in choices:
                raise UsageError(f"{name} must be one of {', '.join(choices)}, or null, got {value!r}. Set model.{name}.")
        self.base_model = base_model
        self.revision = revision
        self.dtype_name = dtype
        self.attention = attention
        self.quantization = quantization
        self.gradient_checkpointing = gradient_checkpointing
        self.num_masks = num_masks
        self.lora = lora
        # In a tuple, so that the head is registered once: as a part of the model.
        self._head = (MLPSamplerHead() if sampler_head is None else (sampler_head or None),)
        chosen = losses or self.paper_losses()
        for name, term in chosen.items():
            if isinstance(term, TokenLoss) and term.head == "sampler" and self.sampler_head is None:
                raise UsageError(
                    f"loss term {name} ({type(term).__name__}) needs a sampler head, and model.sampler_head is false."
                    f" Remove model.losses.{name} or name a sampler head."
                )
        if self.sampler_head is not None and all(
            isinstance(term, LatentConsistency) or (isinstance(term, TokenLoss) and term.head == "base")
            for term in chosen.values()
        ):
            raise UsageError(
                "no loss term trains the sampler head, which would draft untrained. Add SamplerCrossEntropy or another term"
                " of the sampler head to model.losses, or set model.sampler_head: false."
            )
        self.losses = nn.ModuleDict(chosen)
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.model: MTPModel = None  # type: ignore[assignment] # built in configure_model, where sharding wants it
        self.strict_loading = False  # checkpoints hold trained weights only
        self._shares: tuple[int, Tensor] | None = None  # of an optimizer step and what its batches so far add up to
        self._estimate: Tensor | None = None  # what was logged in the place of the mean over all processes
        self._counted: Tensor | None = None  # labels of this process that are not in the model's counts yet, [V]
        self.val_terms = nn.ModuleDict({name: TermMean() for name in chosen})
        self.val_ntp = MetricCollection(
            # Not the default, which drops NaN and would show a broken model as a perfect one.
            {name: SumMetric(nan_strategy="disable") for name in ("total", "count")}
        ).set_dtype(torch.float64)
        self.val_forced = ForcedAcceptance(num_masks)
        self.val_reference = ForcedAcceptance(num_masks)

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

    def paper_losses(self) -> dict[str, LossTerm]:
        """The paper's three terms, without the constant NTP part."""
        terms: dict[str, LossTerm] = {"base": BaseCrossEntropy(), "lcm": LatentConsistency()}
        if self.sampler_head is not None:
            terms["sampler"] = SamplerCrossEntropy()
        return terms

    @cached_property
    def tokenizer(self) -> Any:
        """The base's tokenizer, loaded once; the data module uses it before the weights are there."""
        return load_tokenizer(self.base_model, self.revision)

    @cached_property
    def base_config(self) -> Any:
        """The configuration of the base's text decoder; no weights are read."""
        if self.model is not None:
            return text_config(self.model.base)
        return self.whole_config().get_text_config(decoder=True)

    def whole_config(self) -> Any:
        """The configuration of the base, with what it has beside the decoder; no weights are read."""
        return load_config(self.base_model, self.revision)

    @property
    def context(self) -> int:
        """How many positions the base was made for."""
        return context_length(self.base_config)

    def configure_model(self) -> None:
        """Load the base and put the trained parts on it; once, on the strategy's terms."""
        if self.model is not None:
            return
        device: Any = self.device
        strategy: Any = None if self._trainer is None else self._trainer.strategy
        if self._trainer is not None:
            if str(self._trainer.precision) in ("bf16-true", "16-true"):
                raise UsageError(
                    f"trainer.precision {self._trainer.precision} would round the weights of the losses. Set model.dtype"
                    " for the frozen base, and trainer.precision 32-true or bf16-mixed for what is trained."
                )
            if isinstance(strategy, SingleDeviceStrategy | DDPStrategy):
                device = strategy.root_device  # straight to where it is used, not through the host's memory
            if isinstance(strategy, FSDPStrategy | ModelParallelStrategy):
                self._check_sharding(strategy)
        in_turns = isinstance(strategy, FullyShardedStrategy) and strategy.load_in_turns
        for turn in range(strategy.num_processes if in_turns else 1):
            if not in_turns or turn == strategy.local_rank:
                self._build(device, strategy)
            if in_turns:
                strategy.barrier("the next process loads the base")

    def _check_sharding(self, strategy: Any) -> None:
        """Refuse what can't be sharded."""
        if not isinstance(strategy, FullyShardedStrategy):
            raise UsageError(
                f"trainer.strategy {type(strategy).__name__} can't shard a frozen base with trained float32 weights"
                " and write checkpoints of these. Use --config configs/strategies/fsdp2.yaml, whose strategy is"
                " mtp_lightning.trainer.FullyShardedStrategy."
            )
        if self.quantization is not None:
            raise UsageError(
                f"model.quantization {self.quantization} can't be sharded. Set model.quantization: null, or"
                " trainer.strategy: ddp."
            )
        if any(True for _ in self.losses.parameters()):
            raise UsageError(
                "a loss term has weights of its own, which FullyShardedStrategy would not average over the processes. Use"
                " trainer.strategy: ddp."
            )

    def _build(self, device: Any, strategy: Any) -> None:
        """Load the base and put the trained parts on it."""
        base = load_base(self.base_model, self.revision, self.dtype_name, self.attention, self.quantization, device)
        self.model = MTPModel(base, self.num_masks, self.lora, self.sampler_head, self.tokenizer)
        if self.gradient_checkpointing:
            self.model.enable_gradient_checkpointing()
        self.model.train()  # from_pretrained gives evaluation mode, where dropout and checkpointing are silently off
        if isinstance(strategy, FullyShardedStrategy):
            shard_model(self.model, strategy.mesh, strategy.cpu_offload)

    def configure_optimizers(self) -> Any:
        """The optimizer over the trained parameters and its schedule."""
        optimizer = self.optimizer([p for p in self.parameters() if p.requires_grad])
        scheduler = self.lr_scheduler(optimizer)
        if isinstance(scheduler, WarmupCosine) and scheduler.total_steps is None:
            scheduler.total_steps = int(self.trainer.estimated_stepping_batches)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def training_step(self, batch: MaskedInput, batch_idx: int) -> Tensor:
        """The weighted loss of a batch, scaled so that accumulated batches and ranks add up to one sum over counts."""
        # Ranks and accumulated batches are averaged by Lightning; each term divides by the count over all of them.
        parts = self.trainer.accumulate_grad_batches * self.trainer.world_size
        counts = all_reduce(batch.counts.clone(), "sum")
        output: ForwardOutput = self.model(batch, self.terms)
        if self._counted is None:
            self._counted = batch.mtp_labels.new_zeros(self.model.unembed.vocab_size)
        count_labels(self._counted, batch.mtp_labels)
        values = {name: term_value(sums, counts) * parts for name, sums in output.sums.items()}
        loss = self.weighted(values)
        self._log_training(torch.stack([loss, *values.values()]).detach())
        return loss

    def on_train_batch_end(self, outputs: Any, batch: MaskedInput, batch_idx: int) -> None:
        """A callback may just have ended the run."""
        self.settle_figures()

    def settle_figures(self) -> None:
        """Have the mean in the place of an estimate that goes to a logger after all; all processes must call it."""
        if self._estimate is not None and figures_are_logged(self.trainer):
            hook, self._current_fx_name = self._current_fx_name, "training_step"  # under the same name: in its place
            self._log_step(all_reduce(self._estimate.clone(), "mean"))
            self._current_fx_name, self._estimate = hook, None

    def _log_training(self, shown: Tensor) -> None:
        """Log the loss of an optimizer step and its terms, [1 + terms]: each process and batch has a share of the sums."""
        step = self.trainer.global_step
        before = self._shares[1] if self._shares is not None and self._shares[0] == step else 0.0
        shown = before + shown / self.trainer.accumulate_grad_batches
        self._shares, self._estimate = (step, shown), None
        if self.trainer.fit_loop._should_accumulate():
            return
        # The processes meet only where the figures go to a logger; in between the progress bar has this process's estimate.
        if self.trainer.world_size > 1:
            if figures_are_logged(self.trainer):
                shown = all_reduce(shown.clone(), "mean")
            else:
                self._estimate = shown
        self._log_step(shown)

    def _log_step(self, shown: Tensor) -> None:
        """Log the loss of an optimizer step and its terms, [1 + terms]."""
        self.log("train/loss", shown[0], prog_bar=True)
        self.log_dict({f"train/loss/{name}": value for name, value in zip(self.losses, shown[1:], strict=True)})

    def weighted(self, values: dict[str, Tensor]) -> Tensor:
        """The sum of the terms' values times their weights."""
        return torch.stack([self.terms[name].weight * value for name, value in values.items()]).sum()

    def evaluation_step(self, batch: MaskedInput) -> None:
        """Count one batch of given text into the metrics."""
        output: ForwardOutput = self.model(batch, self.terms, with_measurement=True)
        for name, sums in output.sums.items():
            self.term_means[name].update(sums, batch.counts)
        measured = output.measurement
        assert measured is not None
        self.val_ntp["total"].update(measured.ntp_loss)
        self.val_ntp["count"].update(batch.counts[NTP])
        self.val_forced.update(measured.hits, measured.valid)
        self.val_reference.update(measured.reference, measured.valid)

    def log_evaluation(self, prefix: str) -> None:
        """Log what ``evaluation_step`` counted, over all ranks, and start anew."""
        values = {name: metric.compute() for name, metric in self.term_means.items()}
        figures = {f"{prefix}/loss/{name}": value for name, value in values.items()}
        figures[f"{prefix}/loss"] = self.weighted(values)
        figures[f"{prefix}/ntp_loss"] = self.val_ntp["total"].compute() / self.val_ntp["count"].compute()
        forced, reference = self.val_forced.compute(), self.val_reference.compute()
        figures[f"{prefix}/forced_acceptance_length"] = forced
        figures[f"{prefix}/forced_reference"] = reference
        figures[f"{prefix}/share_of_reference"] = torch.tensor(share_of_reference(forced.item(), reference.item()))
        for j, accuracy in enumerate(self.val_forced.accuracy()):
            figures[f"{prefix}/accuracy/offset_{j + 2}"] = accuracy
        self.log_dict(figures)
        self.val_ntp.reset()
        for mean in self.term_means.values():
            mean.reset()
        self.val_forced.reset()
        self.val_reference.reset()

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

    def _gather_counts(self) -> None:
        """Add the labels that all processes have counted since the last time to the model's counts; all must call it."""
        if self._counted is None:
            return
        total, self._counted = all_reduce(self._counted, "sum").cpu(), None
        known = self.model.label_counts
        self.model.label_counts = LabelCounts(total if known is None else known.counts + total)

    def on_train_start(self) -> None:
        """Forget what a run that failed had counted, perhaps on another device."""
        self._counted = None

    def on_train_end(self) -> None:
        """Leave a model that knows its labels."""
        self._gather_counts()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep trained weights only, and say what they belong to."""
        self._gather_counts()
        if self.model.label_counts is not None:
            checkpoint[LABEL_COUNTS] = self.model.label_counts.counts
        checkpoint["state_dict"] = trained_state(checkpoint["state_dict"])
        checkpoint["mtp_settings"] = checkpoint_settings(self)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another base, number of masks or head, and one that lacks a weight."""
        check_settings(checkpoint, checkpoint_settings(self), self.whole_config)
        check_complete(checkpoint, self.state_dict())
        found, vocab_size = checkpoint.get(LABEL_COUNTS), int(self.base_config.vocab_size)
        self.model.label_counts, self._counted = parse_label_counts(found, vocab_size, "the checkpoint does not fit"), None
