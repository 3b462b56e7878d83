# SPDX-License-Identifier: Apache-2.0
"""``mtp export``: from a checkpoint to a saved folder, on disk or on the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mtp_lightning.errors import UsageError
from mtp_lightning.evaluation.reporting import note
from mtp_lightning.modeling.base import parse_dtype
from mtp_lightning.paths import resolve
from mtp_lightning.saving.export import check_target, export_checkpoint
from mtp_lightning.saving.export_options import ExportOptions
from mtp_lightning.saving.load import run_checkpoint
from mtp_lightning.saving.saved_folder import CONFIG_FILE, read_config
from mtp_lightning.saving.sglang import start_line


def run_export(config: Any) -> None:
    """``mtp export --ckpt_path C --output DIR``."""
    dtype = None if config.dtype is None else parse_dtype(config.dtype)
    if dtype == "auto":
        raise UsageError("dtype of saved weights must be float64, float32, bfloat16 or float16, got auto.")
    check_output(Path(config.output), config.overwrite)
    checkpoint = Path(resolve(config.ckpt_path))
    if (checkpoint / CONFIG_FILE).is_file():
        raise UsageError(f"--ckpt_path {config.ckpt_path} is an exported folder already: nothing to do.")
    if (best := run_checkpoint(checkpoint)) is not None:
        note(f"checkpoint: {best}")
    options = ExportOptions(**{name: config[name] for name in ExportOptions.__dataclass_fields__})
    base = export_checkpoint(best or checkpoint, config.output, options, dtype)
    print(f"saved to {config.output}")
    if Path(base).is_absolute():
        note(f"the folder names its base by a path of this machine ({base}): for others give --base_name HUB_ID.")
    if options.format == "sglang":
        saved = read_config(Path(config.output))
        print(f"serve it with: {start_line(base, saved['revision'], config.output, saved['num_masks'])}")
    if options.push is not None:
        print(f"uploaded to {options.push}")


def check_output(folder: Path, overwrite: bool) -> None:
    """Refuse a folder that holds anything; with ``overwrite`` anything but a saved folder."""
    check_target(folder)
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise UsageError(f"{folder} holds an exported model: give another --output, or replace it with --overwrite.")
