# SPDX-License-Identifier: Apache-2.0
"""``mtp export``: from a checkpoint to a saved folder, on disk or on the hub."""

from __future__ import annotations

from pathlib import Path

from mtp_lightning.commands.parser import CommandParser
from mtp_lightning.commands.progress import note
from mtp_lightning.errors import UsageError
from mtp_lightning.modeling.base import parse_dtype
from mtp_lightning.saving.export import ExportOptions, export_checkpoint


def run_export(args: list[str]) -> None:
    """``mtp export --ckpt_path C --output DIR``."""
    parser = CommandParser(prog="mtp export", description="Saves a checkpoint as a folder of safetensors and JSON.")
    parser.add_argument("--ckpt_path", type=str, required=True, help="checkpoint file that mtp fit wrote")
    parser.add_argument("--output", type=str, required=True, help="folder to write")
    parser.add_argument("--dtype", type=str | None, default=None, help="dtype of the weights. Default: the checkpoint's")
    parser.add_class_arguments(ExportOptions, None)
    config = parser.parse_args(args)
    dtype = None if config.dtype is None else parse_dtype(config.dtype)
    if dtype == "auto":
        raise UsageError("dtype of saved weights must be float64, float32, bfloat16 or float16, got auto.")
    options = ExportOptions(**{name: config[name] for name in ExportOptions.__dataclass_fields__})
    base = export_checkpoint(config.ckpt_path, config.output, options, dtype)
    print(f"saved to {config.output}")
    if Path(base).is_absolute():
        note(f"the folder names its base by a path of this machine ({base}): for others give --base_name HUB_ID.")
    if options.push is not None:
        print(f"uploaded to {options.push}")
