# SPDX-License-Identifier: Apache-2.0
"""What an earlier run left in the folder of one that starts: the checkpoint to resume from, and what will be replaced."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from lightning import Trainer

from mtp_lightning.errors import RunError, UsageError, one_line
from mtp_lightning.evaluation.reporting import note
from mtp_lightning.saving.checkpoint_files import newest_checkpoint, read_run_id, run_of
from mtp_lightning.training.distributed import checkpoint_folders

RESULTS = ("metrics.csv", "acceptance.json", "acceptance.png")
"""What a run writes to its folder besides checkpoints, its configuration, its id, and TensorBoard's events."""
NAMED_BY_USER = ("model.losses", "model.loss_schedules", "data.train", "data.validation", "data.test")
"""Mappings whose keys are the user's own names; those of all others are the arguments of a class."""
NOTHING = "nothing"
"""What a message says for a name that is in one of two configurations alone."""


def results_of_run(trainer: Trainer, folder: Path) -> list[Path]:
    """Checkpoints and results in the folder of a run. All processes must call it."""
    checkpoints = [path for place in dict.fromkeys(checkpoint_folders(trainer)) for path in sorted(place.glob("*.ckpt"))]
    # With those of mtp validate and mtp test.
    files = [folder / place / name for place in ("", "validate", "test") for name in RESULTS]
    return checkpoints + [path for path in files if path.is_file()]


def check_folder_is_free(trainer: Trainer, folder: Path) -> None:
    """Refuse to begin a run in the folder of another one. All processes must call it."""
    paths = results_of_run(trainer, folder)
    if paths and not getattr(trainer, "fast_dev_run", False):
        names = ", ".join(str(path) for path in paths[:3]) + (", ..." if len(paths) > 3 else "")
        raise UsageError(
            f"{str(folder)!r} holds a run already ({names}). Resume it with --ckpt_path last, choose another folder"
            " (trainer.default_root_dir, save_dir of the loggers), or delete it and begin again with --overwrite."
        )


def appends_metrics(trainer: Trainer, folder: Path, path: str, checkpoint: dict[str, Any], overwrite: bool) -> bool:
    """True if the figures in a run's folder belong to the run of the checkpoint in ``path``.

    If they do not: a warning for a checkpoint of that folder, which an earlier run left there. For one from elsewhere the
    folder is refused, unless ``overwrite``. All processes must call it.
    """
    owner = read_run_id(folder)
    if owner is None or owner == run_of(checkpoint):
        return True
    if not overwrite and Path(path).resolve().parent not in [place.resolve() for place in checkpoint_folders(trainer)]:
        check_folder_is_free(trainer, folder)
    if not getattr(trainer, "fast_dev_run", False):
        _warn(
            trainer,
            f"{str(folder)!r} has figures of another run than the checkpoint's: metrics.csv is replaced and begins after"
            f" step {checkpoint['global_step']}.",
        )
    return False


def last_checkpoint(trainer: Trainer, folder: Path, may_begin: bool) -> str | None:
    """The newest complete checkpoint of the run, which ``--ckpt_path last`` means. All processes must call it.

    If there is none: None with ``may_begin`` (``--ckpt_path auto``), else a RunError.
    """
    folders = checkpoint_folders(trainer)
    path = newest_checkpoint(folders, read_run_id(folder), lambda message: _warn(trainer, message))
    if path is not None:
        return str(path)
    missing = f"no complete checkpoint of this run in {str(folders[-1])!r}"
    if not may_begin:
        raise RunError(
            f"{missing}. Give the path of a .ckpt file with --ckpt_path, or the folder of the run to resume"
            " (trainer.default_root_dir, save_dir of the loggers); mtp fit --ckpt_path auto begins a new run without one."
        )
    _warn(trainer, f"{missing}: training begins at step 0.")
    return None


def check_same_settings(
    trainer: Trainer, folder: Path | None, checkpoint_path: str, checkpoint: dict[str, Any], settings: dict[str, Any]
) -> None:
    """Compare ``model`` and ``data`` of a resumed run with its ``config.yaml``, in its folder or that of the checkpoint.

    ``folder`` is None where this run's folder has the ``config.yaml`` of another run.
    What has no effect, because the checkpoint restores it, is refused; a warning names what else differs.
    """
    run, own = run_of(checkpoint), Path(checkpoint_path).absolute().parents[:2]
    places = [*filter(None, [folder]), *(place for place in own if read_run_id(place) == run)]
    path = next((file for place in places if (file := place / "config.yaml").is_file()), None)
    if path is None:
        reason = f"no config.yaml of the run that wrote {checkpoint_path!r} is in its folder"
        _warn(trainer, f"warning: {reason}: settings are not compared, and those of the optimizer are the checkpoint's")
        return
    try:
        saved = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return
    if not isinstance(saved, dict):
        return
    for configuration in (saved, settings):
        data = configuration.get("data")
        if isinstance(data, dict) and data.get("seed", 0) is None:
            data["seed"] = int(configuration.get("seed_everything") or 0)  # what null means
    different = differences("model", saved.get("model", {}), settings["model"])
    different |= differences("data", saved.get("data", {}), settings["data"])
    texts = {key: f"{_text(old)} -> {_text(new)}" for key, (old, new) in different.items()}
    for key, text in texts.items():
        if is_restored(key, settings):
            raise UsageError(
                f"{key} differs from {str(path)!r} ({text}) and would have no effect: the checkpoint restores it."
                " Resume with the same, or start a new run (without --ckpt_path) in another folder."
            )
    if texts:
        shown = ", ".join(f"{key} {text}" for key, text in texts.items())
        _warn(trainer, f"warning: resuming with other settings than those in {str(path)!r}: {shown}")


def is_restored(key: str, settings: dict[str, Any]) -> bool:
    """True for a setting that a resumed run takes from its checkpoint. ``WarmupCosine`` takes the length of this run."""
    if key == "model.lr_scheduler.init_args.total_steps":
        return not settings["model"]["lr_scheduler"]["class_path"].endswith("WarmupCosine")
    return key.startswith(("model.optimizer", "model.lr_scheduler"))


def differences(key: str, saved: Any, new: Any) -> dict[str, tuple[Any, Any]]:
    """Key -> both values, for all that differ below ``key``, whose values in two configurations are given.

    An argument that is in one of them alone belongs to another version of its class: no difference.
    """
    if not (isinstance(saved, dict) and isinstance(new, dict)):
        return {} if saved == new else {key: (saved, new)}
    classes = [value.get("class_path") for value in (saved, new)]
    if len({str(path).rpartition(".")[2] for path in classes}) > 1:  # the module may change between versions
        return {f"{key}.class_path": (classes[0], classes[1])}
    names = [*saved, *(name for name in new if name not in saved)]
    if key not in NAMED_BY_USER:
        names = [name for name in names if name in saved and name in new and name != "class_path"]
    found: dict[str, Any] = {}
    for name in names:
        found |= differences(f"{key}.{name}", saved.get(name, NOTHING), new.get(name, NOTHING))
    return found


def _text(value: Any) -> str:
    return "null" if value is None else one_line(str(value), 60)


def _warn(trainer: Trainer, message: str) -> None:
    """Print a line, once for all processes."""
    if trainer.is_global_zero:
        note(f"mtp: {message}")
