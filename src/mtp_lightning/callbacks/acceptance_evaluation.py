# SPDX-License-Identifier: Apache-2.0
"""AcceptanceEvaluation: decodes held-out prompts in training and at validation, and reports the tokens gained per step."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from lightning import LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn

from mtp_lightning.callbacks.decoding_callback import DecodingCallback, progress_console, show_progress
from mtp_lightning.callbacks.save_on_signal import EvaluationStopped, stop_after_ctrl_c
from mtp_lightning.callbacks.throughput import pause_clocks
from mtp_lightning.decoding.lockstep import in_step
from mtp_lightning.decoding.options import Decoding
from mtp_lightning.errors import UsageError
from mtp_lightning.evaluation.acceptance import PromptResult, evaluate_prompts, summarise
from mtp_lightning.evaluation.acceptance_report import print_notes, print_table, protocol_text, save_plot
from mtp_lightning.evaluation.reporting import note, save_json
from mtp_lightning.training.distributed import gather, run_folder
from mtp_lightning.training.lightning_private import is_accumulating

FIGURES = ("val/acceptance_length", "val/speed_up")
"""What it logs, with further names for domains."""


class AcceptanceEvaluation(DecodingCallback):
    """Decodes held-out prompts with the real decoder, compares texts, prints a table and writes a plot.

    Logs ``val/acceptance_length``, ``val/acceptance_length/<domain>`` and, with ``num_speed_pairs``, ``val/speed_up``
    (``test/...`` under ``mtp test``). Writes ``acceptance.json`` and ``acceptance.png`` to the run's folder; ``mtp
    validate`` and ``mtp test`` to ``validate`` and ``test`` in it. Processes share the prompts; where parameters are
    sharded, a process that is done early makes dummy forward passes for the others.

    Args:
        prompts: ``.txt`` (one prompt a line) or ``.jsonl`` file (``prompt`` or ``messages``, optional ``domain``) that
            training has not seen, or ``package://...`` for one shipped with this package.
        num_prompts: the most prompts to decode, evenly from the domains; None: all.
        max_new_tokens: maximum tokens per prompt.
        max_steps: maximum steps per prompt (the paper: 100); None: no limit.
        decoding: ``quadratic``, ``linear`` or ``autoregressive``.
        num_masks: masks in a block, at most as many as are trained; ``auto``: all, so that steps are the same everywhere.
        sampler_head: draft with the sampler head; false: from the base head.
        every_n_steps: also evaluate every N optimizer steps of training; None: only at validation.
        at_validation: evaluate at every validation (not in Lightning's sanity check).
        num_lossless: number of prompts of each domain whose text is compared with autoregressive decoding.
        num_speed_pairs: number of prompts timed against autoregressive decoding, in interleaved pairs, with the default of
            ``mtp generate``: as many masks as pay on this machine, whatever ``num_masks`` is here. Not where parameters are
            sharded.
    """

    def __init__(
        self,
        prompts: str,
        num_prompts: int | None = 32,
        max_new_tokens: int = 128,
        max_steps: int | None = None,
        decoding: Decoding = "quadratic",
        num_masks: int | Literal["auto"] = "auto",
        sampler_head: bool = True,
        every_n_steps: int | None = None,
        at_validation: bool = True,
        num_lossless: int = 2,
        num_speed_pairs: int = 0,
    ) -> None:
        super().__init__(prompts, num_prompts, max_new_tokens, max_steps, decoding, num_masks, sampler_head)
        if every_n_steps is not None and every_n_steps < 1:
            raise UsageError(f"every_n_steps of AcceptanceEvaluation must be 1 or more, got {every_n_steps}.")
        for name, value in (("num_lossless", num_lossless), ("num_speed_pairs", num_speed_pairs)):
            if value < 0:
                raise UsageError(f"{name} of AcceptanceEvaluation must be 0 or more, got {value}.")
        self.every_n_steps = every_n_steps
        self.at_validation = at_validation
        self.num_lossless = num_lossless
        self.num_speed_pairs = num_speed_pairs
        self.results: list[PromptResult] = []
        self._evaluated_at: int | None = None  # optimizer step
        self._stopped_at: int | None = None  # optimizer step of an evaluation that Ctrl-C stopped
        self._printed: list[PromptResult] | None = None  # those of the last table

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reset what an earlier fit measured."""
        self._evaluated_at = self._stopped_at = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Evaluate every ``every_n_steps`` optimizer steps."""
        step = trainer.global_step
        if is_accumulating(trainer):  # the step is the previous one, which a resumed run has evaluated
            return
        if not self.every_n_steps or step == 0 or step % self.every_n_steps or step == self._evaluated_at:
            return
        pause_clocks(trainer)
        if not self._evaluate(trainer, pl_module):
            return
        values = self._logged("val")
        # Lightning passes what is logged here to the loggers only every log_every_n_steps, so they get it directly.
        pl_module.log_dict(values, on_step=True, on_epoch=False, logger=False)
        for logger in trainer.loggers:
            logger.log_metrics(values, step=step - 1)  # Lightning counts logged steps from 0
        self._report(trainer, "val", None)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluate, unless this step was evaluated already, and log."""
        if trainer.sanity_checking or not self.at_validation:
            return
        is_evaluated = trainer.state.fn == TrainerFn.FITTING and self._evaluated_at == trainer.global_step
        if is_evaluated or self._evaluate(trainer, pl_module):
            pl_module.log_dict(self._logged("val"), sync_dist=True)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report; the module's forced figures are known only now."""
        if not trainer.sanity_checking and self.at_validation and self._stopped_at != trainer.global_step:
            self._report(trainer, "val", forced_figures(trainer, "val"))

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluate and log."""
        self._evaluate(trainer, pl_module)
        pl_module.log_dict(self._logged("test"), sync_dist=True)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report."""
        self._report(trainer, "test", forced_figures(trainer, "test"))

    def _evaluate(self, trainer: Trainer, pl_module: LightningModule) -> bool:
        """Decode; False if Ctrl-C stopped it, so that there are no figures of this step."""
        model: Any = pl_module.model

        def progress(done: int, count: int) -> None:
            show_progress(trainer, f"acceptance {done}/{count}")
            stop_after_ctrl_c(trainer, FIGURES)

        try:
            stop_after_ctrl_c(trainer, FIGURES)
            with in_step(model):
                results = evaluate_prompts(
                    model,
                    self.loaded,
                    self.options,
                    progress,
                    num_lossless=self.num_lossless,
                    num_speed_pairs=0 if model.is_sharded else self.num_speed_pairs,
                    rank=trainer.global_rank,
                    world_size=trainer.world_size,
                )
        except EvaluationStopped:
            model.clear_decode_cache()
            if self._stopped_at != trainer.global_step:  # not again at the validation of this step
                note(f"mtp: Ctrl-C: step {trainer.global_step} is left without figures of real decoding")
            self._stopped_at = trainer.global_step
            return False
        self.results = [result for share in gather(results) for result in share]
        model.clear_decode_cache()  # training needs the memory, and changes the weights
        self._evaluated_at, self._stopped_at = trainer.global_step, None
        return True

    def _logged(self, prefix: str) -> dict[str, float]:
        summary = summarise(self.results)
        values = {f"{prefix}/acceptance_length": summary["overall"]["acceptance_length"]}
        for domain, figures in summary["domains"].items():
            values[f"{prefix}/acceptance_length/{domain}"] = figures["acceptance_length"]
        if summary["overall"]["speed_up"] is not None:
            values[f"{prefix}/speed_up"] = summary["overall"]["speed_up"]["median"]
        return values

    def _report(self, trainer: Trainer, prefix: str, forced: dict[str, float] | None) -> None:
        folder = run_folder(trainer)  # all processes must ask
        if not trainer.is_global_zero:
            return
        summary = summarise(self.results, forced)
        module: Any = trainer.lightning_module
        dtype = str(module.model.base.dtype).removeprefix("torch.")
        step = trainer.global_step or None  # unknown where no checkpoint is evaluated
        after = "" if step is None else f", after {step} training steps"
        if self.results is self._printed:
            print_notes(summary, progress_console(trainer), dtype)
        else:
            title = f"Acceptance by real decoding, greedy{after}"
            print_table(summary, progress_console(trainer), title, self.protocol, dtype)
        self._printed = self.results
        if getattr(trainer, "fast_dev_run", False):
            return
        options = {"options": vars(self.options), "speed_num_masks": "auto"}  # those of the acceptance length, of the speed
        latest = {"stage": prefix, "step": step, **options, "prompts": self.prompts, "dtype": dtype, **summary}
        save_json({"latest": latest}, folder / "acceptance.json")
        count = summary["overall"]["num_prompts"]
        title = f"Tokens gained per step: {count} held-out prompts, greedy{after}"
        save_plot(summary, folder / "acceptance.png", title, self.protocol)
        log_image(trainer, f"{prefix}/acceptance", folder / "acceptance.png")

    @property
    def protocol(self) -> str:
        """How the acceptance length is measured, in words."""
        return protocol_text(vars(self.options))


def log_image(trainer: Trainer, name: str, path: Path) -> None:
    """Give a PNG file to the loggers that take pictures: TensorBoard and Weights & Biases."""
    step = max(0, trainer.global_step - 1)  # Lightning counts logged steps from 0
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            from matplotlib.image import imread

            logger.experiment.add_image(name, imread(path), step, dataformats="HWC")
        elif hasattr(logger, "log_image"):
            logger.log_image(name, [str(path)])


def forced_figures(trainer: Trainer, prefix: str) -> dict[str, float] | None:
    """The module's teacher-forced figures of the loop that has just ended, or None if it logged none."""
    logged = trainer.callback_metrics
    names = {"acceptance_length": f"{prefix}/forced_acceptance_length", "reference": f"{prefix}/forced_reference"}
    if not all(name in logged for name in names.values()):
        return None
    return {key: logged[name].item() for key, name in names.items()}
