# SPDX-License-Identifier: Apache-2.0
"""RunSummary: what a run trains, in a few lines at its start; where its results are and how good, at its end."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, cast

import torch
from lightning import Callback, LightningModule, Trainer

from mtp_lightning.data.preparing import sources_of
from mtp_lightning.decoding.packed_linear import has_bfloat16_products
from mtp_lightning.evaluation.reporting import note
from mtp_lightning.training.distributed import run_folder
from mtp_lightning.training.sizing import model_size

FEW_VALIDATION_ROWS = 50
"""Fewer rows than this choose the best checkpoint by chance."""
MANY_EPOCHS = 10
LARGE_SHARE = 0.25
"""Share of trained weights in those of the base from which on it is unusual."""


class RunSummary(Callback):
    """Prints base, LoRA, masks, head and losses in a line each before training, and warns of settings that rarely work."""

    def __init__(self) -> None:
        self._trains = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print what is trained."""
        self._trains = False
        if trainer.is_global_zero:
            for name, text in described(pl_module).items():
                note(f"{name:9} {text}")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print how long the run is and where it writes, and what is unusual about it."""
        self._trains = True
        folder = run_folder(trainer)  # all processes must ask
        if not trainer.is_global_zero:
            return
        steps, epochs = planned(trainer)
        interval = validation_interval(trainer)
        often = "" if interval is None else f", validated every {interval:,}"
        length = f"{steps:,} steps, {epochs:.1f} epochs" if steps else "no limit of steps"
        note(f"{'run':9} {length}{often}")
        note(f"{'results':9} {folder}")
        for text in warnings_of(trainer, pl_module, epochs):
            note(f"warning: {text}")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print where the results are, how good they are, and what to do with them."""
        folder = run_folder(trainer)
        if trainer.is_global_zero and not self._trains and (limit := reached_limit(trainer)):
            note(f"nothing to train: the run is complete at step {trainer.global_step:,}. Raise {limit} to train longer.")
        best = next((path for each in trainer.checkpoint_callbacks if (path := getattr(each, "best_model_path", ""))), "")
        callbacks: list[Any] = cast(Any, trainer).callbacks
        last = next((path for each in callbacks if (path := getattr(each, "last_path", None))), None)
        checkpoint = best or last  # without a validation none is the best
        if trainer.is_global_zero and checkpoint and not trainer.interrupted:
            lines = ending(trainer, folder, Path(checkpoint), "best" if best else "last")
            print("\n" + "\n".join(lines), flush=True)


def millions(number: int) -> str:
    """A number of parameters: ``134_515_008 -> '134.5 M'``."""
    return f"{number / 1e6:,.1f} M" if number >= 1e5 else f"{number:,}"


def described(module: Any) -> dict[str, str]:
    """What a run trains: base, LoRA, masks, head and losses, a line each."""
    model, size = module.model, model_size(module.model)
    head, lora = model.sampler_head, model.lora
    kind, dtype = module.base_config.model_type, str(model.base.dtype).removeprefix("torch.")
    head_size = 0 if head is None else sum(parameter.numel() for parameter in head.parameters())
    losses = [
        f"{name} ({type(term).__name__}{'' if term.weight == 1 else f' x {term.weight:g}'})"
        for name, term in module.terms.items()
    ]
    return {
        "base": f"{module.base_model}: {kind}, {millions(size.base_parameters)} parameters, {dtype}, frozen",
        "LoRA": f"rank {lora.rank}, {'gated' if lora.gated else 'always on'}: {millions(size.lora_parameters)} parameters",
        "masks": f"{model.num_masks} in a block",
        "head": "none, drafts are the base's own"
        if head is None
        else f"{type(head).__name__}: {millions(head_size)} parameters",
        "losses": ", ".join(losses),
    }


def planned(trainer: Trainer) -> tuple[int, float]:
    """Optimizer steps of the run, and how many epochs these are; 0 where there is no limit."""
    steps, batches = float(trainer.estimated_stepping_batches), float(trainer.num_training_batches)
    if not (math.isfinite(steps) and math.isfinite(batches)):
        return 0, 0.0
    return int(steps), steps / max(1, -(-int(batches) // trainer.accumulate_grad_batches))


def reached_limit(trainer: Trainer) -> str | None:
    """The limit that a run has reached, by the name of its key; None if it has not reached any."""
    if 0 <= trainer.max_steps <= trainer.global_step:
        return "trainer.max_steps"
    has_ended = trainer.max_epochs is not None and 0 <= trainer.max_epochs <= trainer.current_epoch
    return "trainer.max_epochs" if has_ended else None


def validation_interval(trainer: Trainer) -> int | None:
    """Optimizer steps between two validations; None if they are counted in epochs or by the clock, or there are none."""
    batches = trainer.val_check_batch
    if trainer.check_val_every_n_epoch is not None or not isinstance(batches, int) or not sum(trainer.num_val_batches):
        return None
    return batches // trainer.accumulate_grad_batches


def warnings_of(trainer: Trainer, module: Any, epochs: float) -> list[str]:
    """What is unusual about a run, and what to do about it."""
    found, rows = [], getattr(getattr(trainer, "datamodule", None), "rows", {})
    if "validation" in rows and (few := len(rows["validation"])) < FEW_VALIDATION_ROWS:
        found.append(f"{few} validation rows choose the best checkpoint: better 50 or more (data.validation_fraction)")
    if both := sorted(_source_names(trainer, "train") & _source_names(trainer, "validation")):
        found.append(f"data.validation names a source of data.train: {', '.join(both)}; take rows that are not trained on")
    if epochs > MANY_EPOCHS:
        again = f"{epochs:.0f} epochs of the same {len(rows.get('train', ())):,} rows"
        found.append(f"{again}: lower trainer.max_epochs, or add data")
    size = model_size(module.model)
    if (share := size.trained_parameters / size.base_parameters) > LARGE_SHARE:
        found.append(f"trained weights are {share:.0%} of the base's: lower model.lora.rank, then the head's hidden_size")
    in_bfloat16 = module.model.base.dtype == torch.bfloat16 or str(trainer.precision).startswith("bf16")
    if in_bfloat16 and trainer.strategy.root_device.type == "cpu" and not has_bfloat16_products():
        found.append("bfloat16 is slow on this CPU: use --model.dtype float32 --trainer.precision 32-true")
    steps, interval = planned(trainer)[0], validation_interval(trainer)
    warmup = max((getattr(each.scheduler, "warmup_steps", 0) or 0 for each in trainer.lr_scheduler_configs), default=0)
    is_whole = trainer.global_step == 0 and not getattr(trainer, "fast_dev_run", False)  # a resumed run keeps its schedule
    if is_whole and 0 < steps < 2 * warmup:
        number = f"{warmup:,} of {steps:,}" if warmup < steps else f"all {steps:,}"
        found.append(f"the learning rate still rises in {number} steps: lower model.lr_scheduler.init_args.warmup_steps")
    if interval is not None and 2 * interval > steps > 0:
        lacks = "one validation" if steps >= interval else "no validation, so no best checkpoint,"
        found.append(f"{lacks} in {steps:,} steps: lower trainer.val_check_interval")
    return found


def _source_names(trainer: Trainer, split: str) -> set[str]:
    """The sources of a split; none where a user's own data module keeps something else under that name."""
    sources = getattr(getattr(trainer, "datamodule", None), split, None)
    names = sources_of(sources) if isinstance(sources, str | list | dict) else []
    return {name for name in names if isinstance(name, str)}


def ending(trainer: Trainer, folder: Path, checkpoint: Path, which: str) -> list[str]:
    """The lines at the end of a run, whose best or last checkpoint this is."""
    figures = {name: float(value) for name, value in trainer.callback_metrics.items()}
    lines = [f"{which} checkpoint: {relative(checkpoint)}"]
    for callback in trainer.checkpoint_callbacks:
        score, monitor = getattr(callback, "best_model_score", None), getattr(callback, "monitor", None)
        if score is not None and monitor:
            lines[0] += f", {monitor.removeprefix('val/').replace('_', ' ')} {float(score):.2f}"
    if (reference := figures.get("val/forced_reference")) is not None:
        lines[0] += f" (of {reference:.2f} that the base's own next tokens reach)"
    if (length := figures.get("val/acceptance_length")) is not None:
        speed = figures.get("val/speed_up")
        module: Any = trainer.lightning_module
        lines.append(
            f"last validation: {length:.2f} tokens a step with {module.num_masks} masks in each"
            + (f"; mtp generate as it is by default {speed:.2f} x plain speed" if speed else "")
        )
    run = relative(folder)
    return [
        *lines,
        f"next: mtp generate {run} --prompt TEXT",
        f"      mtp benchmark {run} --prompts FILE",
        f"      mtp export --ckpt_path {relative(checkpoint)} --output FOLDER",
    ]


def relative(path: Path) -> str:
    """A path as seen from the current folder, if it lies in it."""
    try:
        return str(path.absolute().relative_to(Path.cwd()))
    except ValueError:
        return str(path)
