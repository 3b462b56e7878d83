# SPDX-License-Identifier: Apache-2.0
"""``mtp export``: from a checkpoint to a saved folder."""

from __future__ import annotations

from mtp_lightning.commands.parser import CommandParser
from mtp_lightning.errors import UsageError
from mtp_lightning.modeling.base import parse_dtype
from mtp_lightning.saving.export import export_checkpoint


def run_export(args: list[str]) -> None:
    """``mtp export --ckpt_path C --output DIR``."""
    parser = CommandParser(prog="mtp export", description="Saves a checkpoint as a folder of safetensors and JSON.")
    parser.add_argument("--ckpt_path", type=str, required=True, help="checkpoint file that mtp fit wrote")
    parser.add_argument("--output", type=str, required=True, help="folder to write")
    parser.add_argument("--base_model", type=str | None, default=None, help="where the base model is now, if it moved")
    parser.add_argument("--revision", type=str | None, default=None, help="hub revision of the base model")
    parser.add_argument("--dtype", type=str | None, default=None, help="dtype of the weights. Default: the checkpoint's")
    parser.add_argument(
        "--acceptance", type=str | None, default=None, help="figures for the model card. Default: the run's acceptance.json"
    )
    config = parser.parse_args(args)
    dtype = None if config.dtype is None else parse_dtype(config.dtype)
    if dtype == "auto":
        raise UsageError("dtype of saved weights must be float64, float32, bfloat16 or float16, got auto.")
    export_checkpoint(config.ckpt_path, config.output, config.base_model, config.revision, dtype, config.acceptance)
    print(f"saved to {config.output}")
